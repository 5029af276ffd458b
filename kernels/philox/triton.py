"""The noise of ``kernels.philox.reference`` as Triton functions that other kernels call where they need it.

The integers are equal bit for bit; the logarithms may differ in their last bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def philox_words(seed, position, first_token, BLOCK: tl.constexpr):
    """The words [BLOCK] of the tokens from ``first_token`` on, a multiple of 4; ``seed`` and ``position`` are int64 scalars."""
    counter = (first_token // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    zero = tl.zeros([BLOCK // 4], tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, counter, zero + position.to(tl.uint32), zero, zero)
    # A counter's four words are neighbours.
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))


@triton.jit
def gumbel_tile(seed, position, first_token, BLOCK: tl.constexpr):
    """``-log(-log1p(-u))`` [BLOCK] in float32, with ``u`` from the words.

    ``log1p(-u)`` is ``log(w) u / (1 - w)`` for ``w = 1 - u`` as rounded, which is exact to the last bits also for a small ``u``
    (Goldberg, "What every computer scientist should know about floating-point arithmetic", theorem 4).
    """
    words = philox_words(seed, position, first_token, BLOCK)
    u = tl.minimum((words.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)
    w = 1.0 - u
    gap = 1.0 - w
    exponential = tl.where(gap == 0.0, u, -tl.log(w) * tl.div_rn(u, tl.where(gap == 0.0, 1.0, gap)))
    return -tl.log(exponential)


@triton.jit
def _gumbel_kernel(out, seed, position, vocab_size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    noise = gumbel_tile(tl.load(seed + row), tl.load(position + row), first, BLOCK)
    token = first + tl.arange(0, BLOCK)
    tl.store(out + row * vocab_size + token, noise, mask=token < vocab_size)


def gumbel(seed: Tensor, position: Tensor, vocab_size: int, dtype: torch.dtype) -> Tensor:
    """Standard Gumbel noise [R, vocab_size] for int64 ``seed`` and ``position``, both [R]; float32 only."""
    if dtype != torch.float32:
        raise ValueError(f"the noise is made in float32, not {dtype}")
    out = torch.empty((len(seed), vocab_size), dtype=dtype, device=seed.device)
    _gumbel_kernel[(len(seed), triton.cdiv(vocab_size, _BLOCK))](
        out, seed, position, vocab_size, BLOCK=_BLOCK, enable_fp_fusion=False
    )
    return out
