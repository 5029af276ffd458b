"""``kernels.survival.reference`` as Triton functions that the kernels of a step call.

Launched without fused multiply-adds, they give the same numbers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.survival.reference import LEAST_DOUBT, MAX_OUTCOMES, NUM_BINS, PRIOR

_BINS = tl.constexpr(NUM_BINS)
_PRIOR = tl.constexpr(PRIOR)
_MAX_OUTCOMES = tl.constexpr(MAX_OUTCOMES)
_LEAST_DOUBT = tl.constexpr(LEAST_DOUBT)
TABLE = tl.constexpr(32)
"""Places of the table, as a power of two."""


@triton.jit
def place_of(prob, index):
    """Where the outcomes of a draft of this number are counted, in the flattened table."""
    doubt = tl.maximum(1.0 - tl.where(prob == prob, prob, 0.0), _LEAST_DOUBT)
    bin = 126 - ((doubt.to(tl.int32, bitcast=True) - 1) >> 23)
    return tl.minimum(tl.maximum(bin, 0), _BINS - 1) + tl.where(index > 1, _BINS, 0)


@triton.jit
def chance_of(state, probs, index, exists):
    """The chances of acceptance of a request's drafts, float64. ``probs`` points to its first."""
    prob = tl.load(probs + index, mask=exists, other=0.0)
    place = place_of(prob, index)
    tried = tl.load(state.tried + place).to(tl.float64)
    accepted = tl.load(state.accepted + place).to(tl.float64)
    return (accepted + _PRIOR * tl.where(prob == prob, prob, 0.0).to(tl.float64)) / (tried + _PRIOR)


@triton.jit
def rank_of_branches(state, probs, num_drafts, num_useful, num_branches, COLUMNS: tl.constexpr):
    """The rank of each branch by its chance to be hit, ``COLUMNS`` where it is not run."""
    i = tl.arange(0, COLUMNS)
    chance = chance_of(state, probs, i, i < num_drafts)
    following = chance_of(state, probs, i + 1, i + 1 < num_drafts)
    survival = tl.cumprod(tl.where(i == 0, 1.0, chance), 0)
    score = (survival * (1.0 - tl.where(i + 1 < num_drafts, following, 0.0))).to(tl.float32)
    score += tl.where((i == 0) & (num_branches > 1), 2.0, 0.0)
    score = tl.where(i < num_useful, score, -1.0)
    is_better = (score[None, :] > score[:, None]) | ((score[None, :] == score[:, None]) & (i[None, :] < i[:, None]))
    rank = tl.sum(is_better.to(tl.int32), 1)
    return tl.where((score >= 0.0) & (rank < num_branches), rank, COLUMNS)


@triton.jit
def count_outcomes(prob, index, is_counted):
    """How many of a tile of drafts count in each place of the table."""
    return tl.histogram(place_of(prob, index).reshape([prob.numel]), TABLE, mask=is_counted.reshape([prob.numel]))


@triton.jit
def add_outcomes(state, tried, accepted):
    """Add a step's counts to the table, and let old outcomes fade."""
    place = tl.arange(0, TABLE)
    exists = place < 2 * _BINS
    tried = tl.load(state.tried + place, mask=exists, other=0.0) + tried.to(tl.float32)
    accepted = tl.load(state.accepted + place, mask=exists, other=0.0) + accepted.to(tl.float32)
    fade = tl.where(tried > _MAX_OUTCOMES, 0.5, 1.0)
    tl.store(state.tried + place, tried * fade, mask=exists)
    tl.store(state.accepted + place, accepted * fade, mask=exists)
