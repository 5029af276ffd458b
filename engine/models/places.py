"""Where the tensors of a checkpoint belong in the model, by their names there."""

from __future__ import annotations

from torch import Tensor

from engine.config import Quantization
from engine.models.transformer import DecoderLayer, Transformer
from kernels.linear.weight import QuantizedWeight, Weight


def places(model: Transformer) -> dict[str, Weight]:
    """Where every tensor of the checkpoint goes; weights that are quantised while they are loaded take their scales along."""
    tensors = named_tensors(model)
    if model.config.quantization is not Quantization.AT_LOAD:
        return {**tensors}
    scales = {name.removesuffix("_scale"): tensors.pop(name)[:, 0] for name in [*tensors] if name.endswith("_scale")}
    return {name: QuantizedWeight(tensor, scales[name]) if name in scales else tensor for name, tensor in tensors.items()}


def named_tensors(model: Transformer) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by its name there: the model's parameters, or views of those that are merged here."""
    names = model.config.tensor_names
    places: dict[str, Tensor] = {f"{names.body}embed_tokens.weight": model.embedding, f"{names.body}norm.weight": model.norm}
    if model.lm_head is not None:
        places[names.head] = model.lm_head
    for index, layer in enumerate(model.layers):
        assert isinstance(layer, DecoderLayer)
        places |= {f"{names.body}layers.{index}.{name}": place for name, place in _layer_tensors(layer).items()}
    return places


def adapter_tensors(model: Transformer) -> dict[str, Tensor]:
    """Every tensor of the draft LoRA by its name in the adapter's file; empty when the model has none."""
    places: dict[str, Tensor] = {}
    for index, layer in enumerate(model.layers):
        assert isinstance(layer, DecoderLayer)
        prefix = f"base_model.model.{model.config.tensor_names.body}layers.{index}.self_attn.o_proj.lora_"
        if layer.output_lora_a is not None and layer.output_lora_b is not None:
            places |= {f"{prefix}A.weight": layer.output_lora_a, f"{prefix}B.weight": layer.output_lora_b}
    return places


def _layer_tensors(layer: DecoderLayer) -> dict[str, Tensor]:
    places: dict[str, Tensor | None] = {
        "input_layernorm.weight": layer.input_norm,
        "post_attention_layernorm.weight": layer.post_attention_norm,
        "self_attn.o_proj.weight": layer.output,
        "self_attn.o_proj.bias": layer.output_bias,
        "mlp.down_proj.weight": layer.down,
        "mlp.down_proj.bias": layer.down_bias,
        "self_attn.o_proj.weight_scale": _column(layer.output_scale),
        "mlp.down_proj.weight_scale": _column(layer.down_scale),
    }
    for kind, qkv, gate_up in (
        ("weight", layer.qkv, layer.gate_up),
        ("bias", layer.qkv_bias, layer.gate_up_bias),
        ("weight_scale", _column(layer.qkv_scale), _column(layer.gate_up_scale)),
    ):
        if qkv is not None:
            parts = qkv.split(layer.qkv_sizes)
            places |= {f"self_attn.{name}_proj.{kind}": part for name, part in zip("qkv", parts, strict=True)}
        if gate_up is not None:
            places |= {f"mlp.{name}_proj.{kind}": part for name, part in zip(("gate", "up"), gate_up.chunk(2), strict=True)}
    if layer.qk_norm is not None:
        places |= {f"self_attn.{name}_norm.weight": row for name, row in zip("qk", layer.qk_norm, strict=True)}
    return {name: place for name, place in places.items() if place is not None}


def _column(scale: Tensor | None) -> Tensor | None:
    """Scales as compressed-tensors stores them, [out, 1]."""
    return None if scale is None else scale[:, None]
