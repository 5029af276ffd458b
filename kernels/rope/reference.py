"""Rotary position embedding (Su et al., arXiv 2104.09864) in the half-split layout of Hugging Face checkpoints.

A head vector ``(a, b)``, split in halves, becomes ``(a cos - b sin, b cos + a sin)``. With the sign folded into the sine
table, ``sin = (-s, s)``, this is ``x * cos + swap_halves(x) * sin``: three operations for queries and keys together.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rope(x_RHD: Tensor, cos_RD: Tensor, sin_RD: Tensor) -> Tensor:
    """Rotate every head of every row; ``sin_RD`` carries the sign of its half. Shapes [R, H, D] and [R, D]."""
    swapped = x_RHD.roll(x_RHD.shape[-1] // 2, dims=-1)
    return torch.addcmul(x_RHD * cos_RD[:, None], swapped, sin_RD[:, None])
