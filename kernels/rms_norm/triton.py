"""RMSNorm (Zhang and Sennrich, arXiv 1910.07467), with the residual addition in front of it, in one pass over a row.

One program holds one row in registers: it is read once, summed in float32 and written once. The contracts are those of
``kernels.rms_norm.reference``; any row count and hidden size, any row stride.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import RMS_NORM, WarpSettings


def rms_norm(x: Tensor, weight: Tensor, eps: float, settings: WarpSettings = RMS_NORM) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` for ``x`` [R, E] whose last stride is 1."""
    return _launch(x, None, weight, eps, settings)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, settings: WarpSettings = RMS_NORM
) -> tuple[Tensor, Tensor]:
    """Return ``(rms_norm(x + residual), x + residual)``; the sum is written over ``residual``."""
    return _launch(x, residual, weight, eps, settings), residual


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, settings: WarpSettings) -> Tensor:
    num_rows, width = x.shape
    out = torch.empty((num_rows, width), dtype=x.dtype, device=x.device)
    total = x if residual is None else residual
    assert weight.is_contiguous()
    assert (total.shape, x.stride(1), total.stride(1)) == (x.shape, 1, 1)
    block = triton.next_power_of_2(width)
    if num_rows:
        _rms_norm_kernel[(num_rows,)](
            out,
            x,
            total,
            weight,
            eps,
            x.stride(0),
            total.stride(0),
            WIDTH=width,
            BLOCK=block,
            ADD=residual is not None,
            num_warps=settings.num_warps(block),
        )
    return out


@triton.jit
def _rms_norm_kernel(
    out, x, residual, weight, eps, x_stride, residual_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr
):
    """One row a program. The norm is that of the rounded sum, which is what the next addition reads."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    value = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        place = residual + row * residual_stride + column
        total = (value + tl.load(place, mask=inside, other=0.0).to(tl.float32)).to(residual.dtype.element_ty)
        tl.store(place, total, mask=inside)
        value = total.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(value * value, 0) / WIDTH + eps)
    scaled = value * inverse * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + column, scaled.to(out.dtype.element_ty), mask=inside)
