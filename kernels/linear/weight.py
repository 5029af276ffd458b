"""A linear layer's weight in eight bits: values in e4m3 with one scale for each output channel.

``weight[o, i] = values[o, i] * scale[o]``, with ``scale[o] = max over i of |weight[o, i]| / 448``: 448 is the largest e4m3
number, so a row uses the whole range and nothing saturates (FP8 formats: Micikevicius et al., arXiv 2209.05433). The values
are exact in float16, bfloat16 and float32, so a kernel may widen them without any further rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """``values`` [out, in] in e4m3 and ``scale`` [out] in float32."""

    values: Tensor
    scale: Tensor

    @property
    def shape(self) -> torch.Size:
        """``(out, in)``."""
        return self.values.shape

    @property
    def device(self) -> torch.device:
        """Where the values lie."""
        return self.values.device

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] in another type, rounded once."""
        # Float16 has no room for a large value before it is scaled.
        wide = torch.promote_types(dtype, torch.float32)
        return (self.values.to(wide) * self.scale[:, None].to(wide)).to(dtype)


Weight = Tensor | QuantizedWeight
"""What ``linear`` takes: [out, in] either way."""


def with_scale(values: Tensor, scale: Tensor | None) -> Weight:
    """A weight of plain values, or the quantised one that they are with a scale."""
    return values if scale is None else QuantizedWeight(values, scale)


def quantize(weight: Tensor) -> QuantizedWeight:
    """The nearest e4m3 values of ``weight`` [out, in], with a scale for each of its rows; a row of zeros has scale 1."""
    weight = weight.float()
    largest = weight.abs().amax(dim=1)
    scale = torch.where(largest > 0, largest / FP8_MAX, 1.0)
    # Rounding of the quotient may pass the largest number by a bit, which the conversion would turn into NaN.
    values = (weight / scale[:, None]).clamp(-FP8_MAX, FP8_MAX).to(FP8)
    return QuantizedWeight(values, scale)
