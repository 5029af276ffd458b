"""SwiGLU on a CPU whose bits do not depend on the number of rows: the contract of ``kernels.swiglu.reference``."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from kernels.lanewise import lanewise


def swiglu(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` for ``gate_up`` of shape [rows, 2 * width], gate first; returns [rows, width]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return lanewise(F.silu, gate) * up
