"""A kernel that writes the noise's integers out, which production code never does."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.philox.triton import philox_words


@triton.jit
def _words_kernel(out, seed, position, width, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    first = tl.program_id(1) * BLOCK
    words = philox_words(tl.load(seed + row), tl.load(position + row), first, BLOCK)
    token = first + tl.arange(0, BLOCK)
    tl.store(out + row * width + token, words.to(tl.int64), mask=token < width)


def noise_words(seed: Tensor, position: Tensor, vocab_size: int) -> Tensor:
    """[R, vocab_size] unsigned 32-bit numbers in int64."""
    out = torch.empty((len(seed), vocab_size), dtype=torch.long, device=seed.device)
    _words_kernel[(len(seed), triton.cdiv(vocab_size, 512))](out, seed, position, vocab_size, BLOCK=512)
    return out
