"""Rotary frequency tables for the kinds that public checkpoints use."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from engine.config import RopeConfig, RopeKind


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
    """Return float32 frequencies [head_dim / 2] in radians per position, and the factor that scales cos and sin.

    Sources: linear scaling (Chen et al., arXiv 2306.15595), YaRN (Peng et al., arXiv 2309.00071), and the frequency
    interpolation that Llama 3.1 published with its weights. Float32 on purpose: it is what checkpoints were trained with.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    base = 1.0 / (rope.theta**exponent)
    if rope.kind is RopeKind.LINEAR:
        return base / rope.factor, 1.0
    if rope.kind is RopeKind.LLAMA3:
        return _llama3(base, rope), 1.0
    if rope.kind is RopeKind.YARN:
        return _yarn(base, rope, head_dim), _yarn_attention_factor(rope)
    return base, 1.0


def rope_tables(
    rope: RopeConfig, head_dim: int, num_positions: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return ``(cos, sin)``, both [num_positions, head_dim], the sine with the sign that ``kernels.rope_kv_write`` expects."""
    frequencies, scale = inverse_frequencies(rope, head_dim)
    positions = torch.arange(num_positions, dtype=torch.float32)
    angles = torch.outer(positions, frequencies)
    cos, sin = angles.cos() * scale, angles.sin() * scale
    full_cos, signed_sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
    return full_cos.to(device=device, dtype=dtype), signed_sin.to(device=device, dtype=dtype)


def query_scale_table(rope: RopeConfig, num_positions: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """Return the factor of rotated queries by position, [num_positions], or None where all of them are 1.

    Source: the position-dependent temperature that Llama 4 published with its weights. It grows in steps of the original
    context, so a shorter context does without the product.
    """
    if rope.query_scale_beta == 0 or num_positions <= rope.original_max_position:
        return None
    contexts = torch.arange(num_positions) // rope.original_max_position
    return (1 + rope.query_scale_beta * torch.log1p(contexts.float())).to(device=device, dtype=dtype)


def _llama3(base: Tensor, rope: RopeConfig) -> Tensor:
    wavelength = 2 * math.pi / base
    turns = rope.original_max_position / wavelength
    smooth = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0.0, 1.0)
    return (1 - smooth) * base / rope.factor + smooth * base


def _yarn(base: Tensor, rope: RopeConfig, head_dim: int) -> Tensor:
    def dimension_of(turns: float) -> float:
        return head_dim * math.log(rope.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0.0, 1.0)
    return base / rope.factor * ramp + base * (1 - ramp)


def _yarn_attention_factor(rope: RopeConfig) -> float:
    def mscale(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)
