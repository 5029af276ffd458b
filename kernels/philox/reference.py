"""Counter-based noise: Gumbel values that are a pure function of (seed, position, token id).

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). The key is the 64-bit seed, the counter
``(token // 4, position, 0, 0)``; the four words of a counter belong to four adjacent tokens. The integers are equal on every
device; the logarithms may differ in their last bits.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF
ROUNDS = 10


def philox(key: tuple[Tensor, Tensor], counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Ten rounds of Philox4x32 on broadcastable int64 tensors that hold unsigned 32-bit words; returns four words."""
    (k0, k1), (c0, c1, c2, c3) = key, counter
    for _ in range(ROUNDS):
        hi0, lo0 = _multiply(c0, _MULTIPLIERS[0])
        hi1, lo1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def _multiply(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of an unsigned 32 x 32 bit product. The int64 product wraps, its bit pattern is exact."""
    product = word * factor
    return (product >> 32) & _WORD, product & _WORD


@functools.lru_cache(maxsize=8)
def _token_counters(vocab_size: int, device: torch.device) -> Tensor:
    return torch.arange((vocab_size + 3) // 4, device=device)


def gumbel(seed: Tensor, position: Tensor, vocab_size: int, dtype: torch.dtype) -> Tensor:
    """Standard Gumbel noise [R, vocab_size] for int64 ``seed`` (any bit pattern) and ``position``, both [R].

    ``-log(-log1p(-u))`` with ``u`` in (0, 1): large values come from ``u`` near 0, where a float is finely spaced.
    """
    key = ((seed & _WORD)[:, None], ((seed >> 32) & _WORD)[:, None])
    zero = torch.zeros_like(key[0])
    words = philox(key, (_token_counters(vocab_size, seed.device)[None, :], position[:, None], zero, zero))
    bits = torch.stack(torch.broadcast_tensors(*words), dim=-1).flatten(1)[:, :vocab_size]
    u = ((bits.to(dtype) + 0.5) * 2.0**-32).clamp_(max=1.0 - 2.0**-24)
    return u.neg_().log1p_().neg_().log_().neg_()
