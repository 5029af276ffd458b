"""A linear layer, ``x W^T + b``."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return [rows, out] for ``x`` [rows, in], ``weight`` [out, in] and ``bias`` [out]."""
    return F.linear(x, weight, bias)
