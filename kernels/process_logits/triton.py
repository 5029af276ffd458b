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

from kernels.launch import LOGITS, BlockSettings
from kernels.logits_rows.triton import LAUNCH_SMALL, Rows, bind_rows, chunks_of, is_wanted, launch_of, processed_tile
from kernels.process_logits.metadata import RowSampling

_CANDIDATES = tl.constexpr(16)
_ROUNDS = tl.constexpr(8)
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
def _peaks_kernel(peaks, rows, CHUNKS: tl.constexpr, BLOCK: tl.constexpr):
    """The largest logit of every chunk, in the order."""
    q = tl.program_id(0)
    chunk = tl.program_id(1)
    x = processed_tile(rows, q, chunk * BLOCK + tl.arange(0, BLOCK))
    tl.store(peaks + q * CHUNKS + chunk, tl.max(_order(x), 0))


@triton.jit
def _floor_kernel(peak, threshold, temperature, peaks, min_p, kth, CHUNKS, CHUNKS_PADDED: tl.constexpr):
    """The largest logit of every row, and where min-p and top-k let it begin. ``kth``: what the search for top-k found."""
    q = tl.program_id(0)
    chunk = tl.arange(0, CHUNKS_PADDED)
    highest = tl.max(tl.load(peaks + q * CHUNKS + chunk, mask=chunk < CHUNKS, other=_LOWEST), 0)
    largest = (highest ^ ((highest >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    floor = tl.full([], _LOWEST, tl.int32)
    if min_p is not None:
        least = tl.load(min_p + q)
        is_on = (least > 0) & (tl.load(temperature + q) != 0)
        lowest = _order(largest + tl.log(tl.where(is_on, least, 1.0)).to(tl.float32))
        floor = tl.where(is_on, lowest, floor)
    if kth is not None:
        floor = tl.maximum(floor, tl.load(kth + q))
    tl.store(peak + q, largest)
    tl.store(threshold + q, floor)


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
    wanted,
    peaks,
    peak,
    floor,
    num_rows,
    round,
    IS_MASS: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNKS_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One round: take in the sums of the round before, then sum at and above the new candidates. The last one only takes in.

    ``wanted`` [Q]: how many logits have to reach the value, 0 for a row without top-k; with ``IS_MASS`` what share of the
    probability from ``floor`` on, 1 for a row without top-p.
    """
    q = tl.program_id(0)
    chunk = tl.program_id(1)
    goal = tl.load(wanted + q).to(tl.float32)
    is_on = goal < 1.0 if IS_MASS else goal > 0.0
    is_on &= (tl.load(rows.temperature + q) != 0) & is_wanted(rows, q)
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
    if is_on & (round < _ROUNDS):
        candidate = tl.arange(0, _CANDIDATES)
        weight = tl.zeros([_CANDIDATES], tl.float32)
        if tl.load(peaks + q * CHUNKS + chunk) >= low:
            token = chunk * BLOCK + tl.arange(0, BLOCK)
            x = processed_tile(rows, q, token)
            key = _order(x)
            share = (token < rows.vocab_size).to(tl.float32)
            if IS_MASS:
                share = tl.where(key >= tl.load(floor + q), tl.exp(x - tl.load(peak + q)), 0.0)
            for i in tl.static_range(_CANDIDATES):
                reached = tl.sum(tl.where(key >= low + (i << (28 - 4 * round)), share, 0.0), 0)
                weight = tl.where(candidate == i, reached, weight)
        row = search.sums + (round % 2 * num_rows + q) * CHUNKS * _CANDIDATES
        tl.store(row + chunk * _CANDIDATES + candidate, weight)


@triton.jit
def _nucleus_kernel(threshold, num_ties, peak, low, above, target):
    """Raise the threshold to what the search for top-p found, and count how many tokens at it are needed."""
    q = tl.program_id(0)
    last = tl.load(low + q)
    # Where there is no top-p nothing was searched for.
    is_on = last > _LOWEST
    value = (last ^ ((last >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    each = tl.exp(tl.where(is_on, value - tl.load(peak + q), 0.0))
    needed = tl.ceil((tl.load(target + q) - tl.load(above + q)) / each).to(tl.int32)
    tl.store(num_ties + q, tl.where(is_on, tl.maximum(needed, 1), _ALL_TIES))
    tl.store(threshold + q, tl.maximum(tl.load(threshold + q), last))


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


def find_cut(rows: Rows, sampling: RowSampling, settings: BlockSettings = LOGITS) -> Cut:
    """Where each row is truncated. Only launches."""
    needs = sampling.needs
    if not needs.noise or not (needs.min_p or needs.top_k or needs.top_p):
        return Cut()
    num_rows, device, chunks = len(sampling.temperature), rows.logits.device, chunks_of(rows.vocab_size, settings)
    grid = (num_rows, chunks["CHUNKS"])
    launch = launch_of(rows.vocab_size, settings)
    peaks = torch.empty(grid, dtype=torch.int32, device=device)
    _peaks_kernel[grid](peaks, rows, CHUNKS=grid[1], **launch)
    peak = torch.empty(num_rows, dtype=torch.float32, device=device)
    # A tensor each: a kernel would be compiled anew where the second half of one begins at no multiple of 16 bytes.
    threshold, num_ties = (torch.empty(num_rows, dtype=torch.int32, device=device) for _ in range(2))
    kth = None
    if needs.top_k:
        kth = _search(rows, sampling.top_k, peaks, peak, threshold, settings, is_mass=False).low[-1]
    min_p = sampling.min_p if needs.min_p else None
    _floor_kernel[(num_rows,)](peak, threshold, sampling.temperature, peaks, min_p, kth, **chunks, **LAUNCH_SMALL)
    if not needs.top_p:
        return Cut(threshold)
    found = _search(rows, sampling.top_p, peaks, peak, threshold, settings, is_mass=True)
    _nucleus_kernel[(num_rows,)](threshold, num_ties, peak, found.low[-1], found.above[-1], found.target[-1], **LAUNCH_SMALL)
    ties = torch.empty(grid, dtype=torch.int32, device=device)
    _ties_kernel[grid](ties, threshold, rows, CHUNKS=grid[1], **launch)
    return Cut(threshold, num_ties, ties)


def _search(
    rows: Rows, wanted: Tensor, peaks: Tensor, peak: Tensor, floor: Tensor, settings: BlockSettings, *, is_mass: bool
) -> _Search:
    """``peak`` and ``floor`` are read only with ``is_mass``."""
    num_rows, num_chunks = peaks.shape
    above, target = (torch.empty((_ROUNDS.value + 1, num_rows), dtype=torch.float32, device=peaks.device) for _ in range(2))
    low = torch.empty_like(above, dtype=torch.int32)
    sums = torch.empty((2, num_rows, num_chunks, _CANDIDATES.value), dtype=torch.float32, device=peaks.device)
    search = _Search(low, above, target, sums)
    options = launch_of(rows.vocab_size, settings) | chunks_of(rows.vocab_size, settings)
    for number in range(_ROUNDS.value + 1):
        grid = (num_rows, num_chunks if number < _ROUNDS.value else 1)
        values = (search, rows, wanted, peaks, peak, floor, num_rows, number)
        _search_kernel[grid](*values, IS_MASS=is_mass, **options)
    return search


def process_logits(
    logits_QV: Tensor, sampling: RowSampling, mask_token_id: int | None, settings: BlockSettings = LOGITS
) -> Tensor:
    """The processed logits written out, [Q, V] float32. Sampling does without."""
    rows = bind_rows(logits_QV, None, sampling, mask_token_id)
    cut = find_cut(rows, sampling, settings)
    out = torch.empty(logits_QV.shape, dtype=torch.float32, device=logits_QV.device)
    chunks = chunks_of(rows.vocab_size, settings)
    grid = (len(out), chunks["CHUNKS"])
    _write_kernel[grid](out, rows, cut, **chunks, **launch_of(rows.vocab_size, settings))
    return out
