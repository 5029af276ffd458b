"""Linear layers on a CPU with weights in oneDNN's blocked layout.

At the row counts of a draft-and-verify step this is faster than the BLAS call behind ``F.linear`` (``docs/decisions/0006``,
measured by ``benchmarks/linear_layers.py``). The two operators are those that torch's own compiler emits for frozen weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.linear import reference
from kernels.linear.weight import QuantizedWeight, Weight

PACKED_BYTES = 1 << 30
"""Packing keeps a second copy of a weight, so only this much is packed; larger models are bound by memory anyway."""

_ROWS_HINT = 16
"""The row count that oneDNN lays a weight out for. A hint of 1 makes it slower at all other row counts."""


def is_available() -> bool:
    """Whether this build of torch has the operators."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class PackedLinear:
    """``linear`` for inference: packs a float32 weight when it is first used. Weights must not change afterwards.

    Weights of other types and in eight bits are left to the reference.
    """

    def __init__(self) -> None:
        # Keeps the weights themselves, too, so that an id cannot come to mean another tensor.
        self._packed: dict[int, tuple[Tensor, Tensor]] = {}
        self._bytes = 0

    def __call__(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        if isinstance(weight, QuantizedWeight):
            return reference.linear(x, weight, bias)
        entry = self._packed.get(id(weight))
        if entry is None:
            if weight.dtype != torch.float32 or self._bytes + weight.nbytes > PACKED_BYTES:
                return reference.linear(x, weight, bias)
            packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _ROWS_HINT)
            entry = self._packed[id(weight)] = (weight, packed)
            self._bytes += weight.nbytes
        return torch.ops.mkldnn._linear_pointwise(x, entry[1], bias, "none", [], "")  # type: ignore[no-any-return]
