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
    """Ten rounds of Philox4x32 on int64 tensors that hold unsigned 32-bit words; returns four words.

    Shapes broadcast; the key's must fit into those of ``c0`` with ``c3`` and of ``c1`` with ``c2``.
    """
    (k0, k1), (c0, c1, c2, c3) = key, counter
    for _ in range(ROUNDS):
        # An int64 product wraps, but its bit pattern is exact. The high half of a word that is not multiplied may hold
        # anything: it is cut off once, after the exclusive or.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = ((product1 >> 32) ^ c1).bitwise_xor_(k0).bitwise_and_(_WORD)
        c2 = ((product0 >> 32) ^ c3).bitwise_xor_(k1).bitwise_and_(_WORD)
        c1, c3 = product1, product0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1 & _WORD, c2, c3 & _WORD


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
    u = torch.empty((len(seed), words[0].shape[1], 4), dtype=dtype, device=seed.device)
    for i, word in enumerate(words):
        u[:, :, i] = word
    u = u.flatten(1)[:, :vocab_size].add_(0.5).mul_(2.0**-32).clamp_(max=1.0 - 2.0**-24)
    return u.neg_().log1p_().neg_().log_().neg_()
