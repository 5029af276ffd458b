"""One launch for all columns: the same contract as ``kernels.gather.reference``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 128


@triton.jit(do_not_specialize=["count"])
def _gather_kernel(out, columns, numbers, count, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    q = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = q < count
    number = tl.load(numbers + q, mask=exists, other=0)
    for i in tl.static_range(COLUMNS):
        tl.store(out[i] + q, tl.load(columns[i] + number, mask=exists), mask=exists)


def gather(columns: tuple[Tensor, ...], number_Q: Tensor) -> tuple[Tensor, ...]:
    """The entries ``number`` [Q] of every column [S]."""
    assert all(column.stride(0) == 1 for column in (*columns, number_Q))
    count = len(number_Q)
    out = tuple(torch.empty(count, dtype=column.dtype, device=column.device) for column in columns)
    grid = (triton.cdiv(count, _BLOCK),)
    _gather_kernel[grid](out, columns, number_Q, count, COLUMNS=len(columns), BLOCK=_BLOCK, num_warps=4)
    return out
