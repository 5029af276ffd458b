"""Tiny random checkpoints: one written by hand, any other by Transformers."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

TINY: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
}


def tiny_tensors() -> dict[str, Tensor]:
    """Random tensors that fit TINY (head size 4)."""
    generator = torch.Generator().manual_seed(0)
    layer = {
        "input_layernorm.weight": (16,),
        "post_attention_layernorm.weight": (16,),
        "self_attn.q_proj.weight": (16, 16),
        "self_attn.k_proj.weight": (8, 16),
        "self_attn.v_proj.weight": (8, 16),
        "self_attn.o_proj.weight": (16, 16),
        "mlp.gate_proj.weight": (24, 16),
        "mlp.up_proj.weight": (24, 16),
        "mlp.down_proj.weight": (16, 24),
    }
    shapes = {"model.embed_tokens.weight": (32, 16), "model.norm.weight": (16,), "lm_head.weight": (32, 16)}
    shapes |= {f"model.layers.{i}.{name}": shape for i in range(2) for name, shape in layer.items()}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def transformers_model(architecture: str, folder: Path, max_shard_size: str = "1GB", **changes: Any) -> Any:
    """Make a model of the architecture with no parameter at its initial value, save it into ``folder`` and return it."""
    values = {key: value for key, value in TINY.items() if key != "architectures"} | changes
    config_class = getattr(transformers, architecture.replace("ForCausalLM", "Config"))
    return _randomised(getattr(transformers, architecture)(config_class(**values, pad_token_id=0)), folder, max_shard_size)


def multimodal_model(architecture: str, folder: Path, max_shard_size: str = "1GB", **changes: Any) -> Any:
    """The same with a language model of the architecture inside a Mistral 3 that has a small vision tower.

    As in the files that Mistral published, only the language model's own configuration says whether its head is tied.
    """
    values = {key: value for key, value in TINY.items() if key != "architectures"} | changes
    text = getattr(transformers, architecture.replace("ForCausalLM", "Config"))(**values, pad_token_id=0)
    vision = transformers.PixtralVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        head_dim=8,
        image_size=28,
        patch_size=14,
    )
    tied = text.tie_word_embeddings
    config = transformers.Mistral3Config(text_config=text, vision_config=vision, tie_word_embeddings=tied)
    model = _randomised(transformers.Mistral3ForConditionalGeneration(config), folder, max_shard_size)
    written = json.loads((folder / "config.json").read_text())
    del written["tie_word_embeddings"]
    (folder / "config.json").write_text(json.dumps(written))
    return model


def _randomised(model: Any, folder: Path, max_shard_size: str) -> Any:
    model.eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            # Wide enough that a wrong bias, norm or rotation moves the logits far beyond rounding.
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + (parameter.ndim == 1))
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model
