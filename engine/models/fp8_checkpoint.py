"""Reads what a checkpoint says of its quantisation.

One scheme is served: the ``float-quantized`` format of compressed-tensors with e4m3 weights and a scale for each output
channel, which vLLM's llm-compressor writes as ``FP8_DYNAMIC``. Its activations would be quantised anew in every step; here
they stay in 16 bits, which is the more exact of the two (``docs/decisions/0011``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from engine.config import Quantization
from engine.models.loader import ModelLoadError

_WEIGHTS: Mapping[str, Any] = {"num_bits": 8, "type": "float", "strategy": "channel"}


def stored_quantization(values: Any, source: str) -> Quantization:
    """What ``quantization_config`` means for the loader. Raises ModelLoadError for every other scheme."""
    if values is None:
        return Quantization.NONE
    problems = list(_problems(values)) if isinstance(values, dict) else ["quantization_config is not an object"]
    if problems:
        raise ModelLoadError(
            f"{source}: this quantisation is not supported ({'; '.join(problems)}): use the model's unquantised checkpoint, "
            "with --quantization fp8 for eight-bit weights, or one in the compressed-tensors format float-quantized with "
            "e4m3 weights and a scale per channel"
        )
    return Quantization.STORED


def _problems(config: Mapping[str, Any]) -> Iterator[str]:
    method, groups = config.get("quant_method"), config.get("config_groups")
    if method != "compressed-tensors":
        yield f"quant_method is {method!r}"
        return
    if config.get("kv_cache_scheme") is not None:
        yield "it quantises the KV cache"
    sparsity = config.get("sparsity_config")
    if sparsity and sparsity.get("format") not in (None, "dense"):
        yield "its weights are sparse"
    if not isinstance(groups, dict) or not groups or not all(isinstance(group, dict) for group in groups.values()):
        yield "it has no config_groups"
        return
    for name, group in groups.items():
        file_format = group.get("format") or config.get("format")
        if file_format != "float-quantized":
            yield f"{name} has the format {file_format!r}"
        yield from _group_problems(name, group)


def _group_problems(name: str, group: Mapping[str, Any]) -> Iterator[str]:
    weights, inputs = group.get("weights") or {}, group.get("input_activations")
    for key, wanted in _WEIGHTS.items():
        if weights.get(key) != wanted:
            yield f"{name} has weights with {key} {weights.get(key)!r}, not {wanted!r}"
    if weights.get("dynamic") or not weights.get("symmetric", True):
        yield f"{name} has weights with dynamic or asymmetric scales"
    if group.get("targets") != ["Linear"]:
        yield f"{name} is for {group.get('targets')}, not ['Linear']"
    if inputs is not None and not inputs.get("dynamic"):
        yield f"{name} has static scales of activations"
    if group.get("output_activations") is not None:
        yield f"{name} quantises outputs"
