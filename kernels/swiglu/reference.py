"""SwiGLU (Shazeer, arXiv 2002.05202) on the output of one merged gate-and-up projection."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def swiglu(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` for ``gate_up`` of shape [rows, 2 * width], gate first; returns [rows, width]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
