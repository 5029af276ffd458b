"""A linear layer, ``x W^T + b``."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from kernels.linear.weight import QuantizedWeight, Weight


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """Return [rows, out] for ``x`` [rows, in], ``weight`` [out, in] and ``bias`` [out].

    A quantised weight is widened to the type of ``x`` in every call.
    """
    if isinstance(weight, QuantizedWeight):
        weight = weight.dequantize(x.dtype)
    return F.linear(x, weight, bias)
