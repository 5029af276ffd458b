"""Writes a trained model as a Hugging Face folder: Qwen3 names, bfloat16 tensors and a ``tidar`` section."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.config import ModelConfig
from engine.models.places import named_tensors
from engine.models.transformer import Transformer
from training.tokenizer import END


def hf_tensors(model: Transformer) -> dict[str, Tensor]:
    """The weights under Qwen3's tensor names, each with its own memory, as safetensors wants it."""
    return {name: t.detach().to(torch.bfloat16).clone().contiguous() for name, t in named_tensors(model).items()}


def hf_config(config: ModelConfig) -> dict[str, object]:
    """``config.json`` of the exported checkpoint."""
    assert config.tidar is not None
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope.theta,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": None,
        "eos_token_id": END,
        "dtype": "bfloat16",
        "tidar": {
            "block_length": config.tidar.block_length,
            "mask_token_id": config.tidar.mask_token_id,
            "prediction": "same_position",
        },
    }


def export(model: Transformer, folder: Path) -> None:
    """Write config, generation config and weights; the tokenizer files are written by ``training.tokenizer``."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(hf_tensors(model), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(hf_config(model.config), indent=2) + "\n")
    generation = {"eos_token_id": [END], "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
