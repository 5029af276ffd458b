"""What mini-sglang's offline interface takes and gives; like the real one it reads shape and tokenizer from a folder."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoTokenizer


class LLM:
    def __init__(self, model_path, dtype, **options):
        assert options["use_dummy_weight"]
        config = AutoConfig.from_pretrained(model_path)
        assert config.architectures == ["Qwen3ForCausalLM"]
        assert (config.num_hidden_layers, config.num_key_value_heads) == (2, 2)
        assert config.rope_parameters["rope_theta"] == 10_000.0
        self.tokenizer = AutoTokenizer.from_pretrained(model_path)
        self.dtype = dtype

    def generate(self, prompts, sampling_params):
        assert sampling_params.ignore_eos
        for _ in range(sampling_params.max_tokens):
            torch.randn(200, 200, dtype=self.dtype) @ torch.randn(200, 200, dtype=self.dtype)
        return [{"token_ids": [1] * sampling_params.max_tokens} for _ in prompts]
