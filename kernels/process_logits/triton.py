"""Truncation of logits rows without a sort, and without writing them: see ``kernels.logits_rows.triton``.

Each of min-p, top-k and top-p keeps the logits from some threshold on, so a row needs one number:

* top-k: the largest value that at least ``k`` logits reach;
* top-p: the largest value such that those that reach it have ``top_p`` of the probability that min-p and top-k left; of the
  tokens equal to it the first ones that are needed.

Both are found by the same search over the 2^32 float32 values in their order: a round sums the weight (1, or the probability)
at and above 16 candidates and so fixes four bits, eight rounds fix all. A chunk that lies below the candidates is skipped.
Sums are made in an order that depends on the vocabulary alone, so the result is the same in every batch. Nothing waits for the
host, and shapes depend on the number of rows alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.logits_rows.triton import LAUNCH, Rows, bind_rows, block_size, chunks_of, processed_tile
from kernels.process_logits.metadata import RowSampling

_CANDIDATES = tl.constexpr(16)
_ROUNDS = 8
_LOWEST = tl.constexpr(-(2**31))
_ALL_TIES = tl.constexpr(2**31 - 1)


class Cut(NamedTuple):
    """Where rows are truncated: logits of at least ``threshold`` stay, of those equal to it ``num_ties``, first ids first.

    Thresholds [Q] are in the order of ``_order``. ``ties`` [Q, chunks]: how many of a chunk equal it. None: nothing truncates,
    or top-p does not.
    """

    threshold: Tensor | None = None
    num_ties: Tensor | None = None
    ties: Tensor | None = None


class _Search(NamedTuple):
    """A search under way, round by round, [rounds + 1, Q] each.

    ``low``: the highest candidate known to be reached. ``above``: the weight at and above the lowest one known not to be.
    ``target``: the weight that reaches. ``sums`` [2, Q, chunks, candidates] are those of the last two rounds.
    """

    low: Tensor
    above: Tensor
    target: Tensor
    sums: Tensor


@triton.jit
def _order(x):
    """Integers in the order of the floats."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def truncated_tile(x, cut, q, chunk, CHUNKS: tl.constexpr, CHUNKS_PADDED: tl.constexpr):
    """Processed logits of one chunk, with what truncation drops at -inf."""
    if cut.threshold is not None:
        threshold = tl.load(cut.threshold + q)
        key = _order(x)
        keep = key >= threshold
        if cut.ties is not None:
            other = tl.arange(0, CHUNKS_PADDED)
            before = tl.sum(tl.load(cut.ties + q * CHUNKS + other, mask=other < chunk, other=0), 0)
            number = before + tl.cumsum((key == threshold).to(tl.int32), 0)
            keep = (key > threshold) | (keep & (number <= tl.load(cut.num_ties + q)))
        x = tl.where(keep, x, float("-inf"))
    return x


@triton.jit
def _peak_kernel(peaks, rows, CHUNKS: tl.constexpr, BLOCK: tl.constexpr):
    """The largest logit of every chunk."""
    q = tl.program_id(0)
    chunk = tl.program_id(1)
    x = processed_tile(rows, q, chunk * BLOCK + tl.arange(0, BLOCK))
    tl.store(peaks + q * CHUNKS + chunk, tl.max(x, 0))


@triton.jit
def _peak(peaks, q, CHUNKS: tl.constexpr, CHUNKS_PADDED: tl.constexpr):
    chunk = tl.arange(0, CHUNKS_PADDED)
    return tl.max(tl.load(peaks + q * CHUNKS + chunk, mask=chunk < CHUNKS, other=float("-inf")), 0)


@triton.jit
def _floor(q, peak, temperature, min_p, kth):
    """Where min-p and top-k let row ``q`` begin. ``kth``: the results of the search for top-k."""
    floor = tl.full([], _LOWEST, tl.int32)
    if min_p is not None:
        least = tl.load(min_p + q)
        is_on = (least > 0) & (tl.load(temperature + q) != 0)
        lowest = _order(peak + tl.log(tl.where(is_on, least, 1.0)).to(tl.float32))
        floor = tl.where(is_on, lowest, floor)
    if kth is not None:
        floor = tl.maximum(floor, tl.load(kth + q))
    return floor


@triton.jit
def _narrow(search, cell, q, num_rows, round, goal, IS_MASS: tl.constexpr, CHUNKS: tl.constexpr, CHUNKS_PADDED: tl.constexpr):
    """Take in the sums of the round before: returns this round's ``(low, above, target)``."""
    chunk = tl.arange(0, CHUNKS_PADDED)[:, None]
    candidate = tl.arange(0, _CANDIDATES)
    row = search.sums + ((round - 1) % 2 * num_rows + q) * CHUNKS * _CANDIDATES
    sums = tl.load(row + chunk * _CANDIDATES + candidate[None, :], mask=chunk < CHUNKS, other=0.0)
    weight = tl.sum(sums, 0)
    if round == 1:
        low = tl.full([], _LOWEST, tl.int32)
        above = tl.full([], 0.0, tl.float32)
        whole = tl.sum(tl.where(candidate == 0, weight, 0.0), 0)
        target = goal * whole if IS_MASS else tl.minimum(goal, whole)
    else:
        low = tl.load(search.low + cell - num_rows)
        above = tl.load(search.above + cell - num_rows)
        target = tl.load(search.target + cell - num_rows)
    # Sums in a fixed order fall with their candidates even as rounded, and the first candidate always reaches the target.
    num_reached = tl.maximum(tl.sum((weight >= target).to(tl.int32), 0), 1)
    above = tl.where(num_reached < _CANDIDATES, tl.sum(tl.where(candidate == num_reached, weight, 0.0), 0), above)
    low += (num_reached - 1) << (32 - 4 * round)
    return low, above, target


@triton.jit(do_not_specialize=["round", "num_rows"])
def _search_kernel(
    search,
    rows,
    peaks,
    wanted,
    min_p,
    kth,
    num_rows,
    round,
    IS_MASS: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNKS_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One round: take in the sums of the round before, then sum at and above the new candidates. The last one only takes in.

    ``wanted`` [Q]: how many logits have to reach the value, 0 for a row without top-k; with ``IS_MASS`` what share of the
    probability, 1 for a row without top-p.
    """
    q = tl.program_id(0)
    chunk = tl.program_id(1)
    goal = tl.load(wanted + q).to(tl.float32)
    is_on = goal < 1.0 if IS_MASS else goal > 0.0
    is_on &= tl.load(rows.temperature + q) != 0
    cell = round * num_rows + q
    low = tl.full([], _LOWEST, tl.int32)
    above = tl.full([], 0.0, tl.float32)
    target = tl.full([], 0.0, tl.float32)
    if is_on & (round > 0):
        low, above, target = _narrow(search, cell, q, num_rows, round, goal, IS_MASS, CHUNKS, CHUNKS_PADDED)
    if chunk == 0:
        tl.store(search.low + cell, low)
        tl.store(search.above + cell, above)
        tl.store(search.target + cell, target)
    if is_on & (round < 8):
        candidate = tl.arange(0, _CANDIDATES)
        weight = tl.zeros([_CANDIDATES], tl.float32)
        if _order(tl.load(peaks + q * CHUNKS + chunk)) >= low:
            token = chunk * BLOCK + tl.arange(0, BLOCK)
            x = processed_tile(rows, q, token)
            key = _order(x)
            share = (token < rows.vocab_size).to(tl.float32)
            if IS_MASS:
                peak = _peak(peaks, q, CHUNKS, CHUNKS_PADDED)
                share = tl.where(key >= _floor(q, peak, rows.temperature, min_p, kth), tl.exp(x - peak), 0.0)
            for i in tl.static_range(16):
                reached = tl.sum(tl.where(key >= low + (i << (28 - 4 * round)), share, 0.0), 0)
                weight = tl.where(candidate == i, reached, weight)
        row = search.sums + (round % 2 * num_rows + q) * CHUNKS * _CANDIDATES
        tl.store(row + chunk * _CANDIDATES + candidate, weight)


@triton.jit
def _cut_kernel(threshold, num_ties, temperature, peaks, min_p, kth, low, above, target, CHUNKS, CHUNKS_PADDED: tl.constexpr):
    """The end of truncation: thresholds, and how many of the tokens at it top-p needs. ``low`` to ``target``: its search."""
    q = tl.program_id(0)
    peak = _peak(peaks, q, CHUNKS, CHUNKS_PADDED)
    floor = _floor(q, peak, temperature, min_p, kth)
    if low is not None:
        last = tl.load(low + q)
        each = tl.exp((last ^ ((last >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True) - peak)
        missing = tl.load(target + q) - tl.load(above + q)
        # Without top-p nothing was searched for.
        is_on = last > _LOWEST
        needed = tl.ceil(missing / tl.where(is_on, each, 1.0)).to(tl.int32)
        tl.store(num_ties + q, tl.where(is_on, tl.maximum(needed, 1), _ALL_TIES))
        floor = tl.maximum(floor, last)
    tl.store(threshold + q, floor)


@triton.jit
def _ties_kernel(ties, threshold, rows, CHUNKS: tl.constexpr, BLOCK: tl.constexpr):
    q = tl.program_id(0)
    chunk = tl.program_id(1)
    x = processed_tile(rows, q, chunk * BLOCK + tl.arange(0, BLOCK))
    count = tl.sum((_order(x) == tl.load(threshold + q)).to(tl.int32), 0)
    tl.store(ties + q * CHUNKS + chunk, count)


@triton.jit
def _write_kernel(out, rows, cut, CHUNKS: tl.constexpr, CHUNKS_PADDED: tl.constexpr, BLOCK: tl.constexpr):
    q = tl.program_id(0)
    chunk = tl.program_id(1)
    token = chunk * BLOCK + tl.arange(0, BLOCK)
    x = truncated_tile(processed_tile(rows, q, token), cut, q, chunk, CHUNKS, CHUNKS_PADDED)
    tl.store(out + q.to(tl.int64) * rows.vocab_size + token, x, mask=token < rows.vocab_size)


def find_cut(rows: Rows, sampling: RowSampling) -> Cut:
    """Where each row is truncated. Only launches."""
    needs = sampling.needs
    if not needs.noise or not (needs.min_p or needs.top_k or needs.top_p):
        return Cut()
    num_rows, device, chunks = len(sampling.temperature), rows.logits.device, chunks_of(rows.vocab_size)
    grid = (num_rows, chunks["CHUNKS"])
    block = block_size(rows.vocab_size)
    peaks = torch.empty(grid, dtype=torch.float32, device=device)
    _peak_kernel[grid](peaks, rows, CHUNKS=grid[1], BLOCK=block, **LAUNCH)
    min_p = sampling.min_p if needs.min_p else None
    kth = _search(rows, peaks, sampling.top_k, None, None, is_mass=False).low[-1] if needs.top_k else None
    nucleus = _search(rows, peaks, sampling.top_p, min_p, kth, is_mass=True) if needs.top_p else None
    threshold, num_ties = torch.empty((2, num_rows), dtype=torch.int32, device=device)
    ends = (None, None, None) if nucleus is None else (nucleus.low[-1], nucleus.above[-1], nucleus.target[-1])
    _cut_kernel[(num_rows,)](threshold, num_ties, sampling.temperature, peaks, min_p, kth, *ends, **chunks, **LAUNCH)
    if nucleus is None:
        return Cut(threshold)
    ties = torch.empty(grid, dtype=torch.int32, device=device)
    _ties_kernel[grid](ties, threshold, rows, CHUNKS=grid[1], BLOCK=block, **LAUNCH)
    return Cut(threshold, num_ties, ties)


def _search(rows: Rows, peaks: Tensor, wanted: Tensor, min_p: Tensor | None, kth: Tensor | None, *, is_mass: bool) -> _Search:
    num_rows, num_chunks = peaks.shape
    above, target = torch.empty((2, _ROUNDS + 1, num_rows), dtype=torch.float32, device=peaks.device)
    low = torch.empty_like(above, dtype=torch.int32)
    search = _Search(low, above, target, peaks.new_empty((2, num_rows, num_chunks, _CANDIDATES.value)))
    for number in range(_ROUNDS + 1):
        grid = (num_rows, num_chunks if number < _ROUNDS else 1)
        _search_kernel[grid](
            search,
            rows,
            peaks,
            wanted,
            min_p,
            kth,
            num_rows,
            number,
            IS_MASS=is_mass,
            BLOCK=block_size(rows.vocab_size),
            **chunks_of(rows.vocab_size),
            **LAUNCH,
        )
    return search


def process_logits(logits_QV: Tensor, sampling: RowSampling, mask_token_id: int | None) -> Tensor:
    """The processed logits written out, [Q, V] float32. Sampling does without."""
    rows = bind_rows(logits_QV, None, sampling, mask_token_id)
    cut = find_cut(rows, sampling)
    out = torch.empty(logits_QV.shape, dtype=torch.float32, device=logits_QV.device)
    chunks = chunks_of(rows.vocab_size)
    grid = (len(out), chunks["CHUNKS"])
    _write_kernel[grid](out, rows, cut, BLOCK=block_size(rows.vocab_size), **chunks, **LAUNCH)
    return out
