"""Elementwise functions on a CPU with the same bits for the same number, wherever it stands.

torch computes whole vectors with vector instructions, and what is left over at the end of a call, or where two threads divide
it, with scalar code. The two round a sigmoid differently in the last bit. So numbers are handed over in whole vectors, and in
calls that are too small to be divided.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

_LANES = 64
"""At least two of the widest vectors: torch unrolls its loops by two."""

_UNDIVIDED = 32768
"""Elements up to which torch does not divide an elementwise call between threads (``at::internal::GRAIN_SIZE``)."""


def lanewise(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``function(x)`` for an elementwise function that maps zero to a finite number."""
    flat = F.pad(x.flatten(), (0, -x.numel() % _LANES))
    return torch.cat([function(part) for part in flat.split(_UNDIVIDED)])[: x.numel()].view(x.shape)
