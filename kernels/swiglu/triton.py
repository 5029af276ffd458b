"""SwiGLU (Shazeer, arXiv 2002.05202) in one Triton kernel, float32 inside: the contract of ``kernels.swiglu.reference``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import SWIGLU, BlockSettings


def swiglu(gate_up: Tensor, settings: BlockSettings = SWIGLU) -> Tensor:
    """``silu(gate) * up`` for ``gate_up`` [rows, 2 * width], gate first, whose last stride is 1; returns [rows, width]."""
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((num_rows, width), dtype=gate_up.dtype, device=gate_up.device)
    assert gate_up.stride(1) == 1
    if num_rows:
        grid = (num_rows, triton.cdiv(width, settings.block))
        _swiglu_kernel[grid](out, gate_up, gate_up.stride(0), WIDTH=width, BLOCK=settings.block, num_warps=settings.num_warps)
    return out


@triton.jit
def _swiglu_kernel(out, gate_up, row_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Program axis 0 is the row, axis 1 a block of its columns."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    source = gate_up + row * row_stride + column
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + WIDTH, mask=inside, other=0.0).to(tl.float32)
    # The sigmoid of -|gate| first: exp of a large positive number would overflow.
    small = tl.exp(-tl.abs(gate))
    result = gate * tl.where(gate < 0, small, 1.0) / (1.0 + small) * up
    tl.store(out + row * WIDTH + column, result.to(out.dtype.element_ty), mask=inside)
