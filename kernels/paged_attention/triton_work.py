"""The work list of a step, made wholly on the device: which program computes what.

Requests become *tiles* (up to ``BLOCK_M`` query vectors of one request, for each key/value head), and a tile whose context is
long becomes several *pieces*, so that the work fills the machine. What lies in device memory alone (prefix lengths, row starts,
the mask) decides; the host knows upper bounds that do not depend on the context, and sizes buffers and grids by them. So a
captured step serves every length, and nothing waits or is copied.

``plan_kernel``, one program, gives every request its number of tiles and pieces and its places in the lists. ``fill_kernel``,
one program a tile, finds the keys that the tile's rows can see and writes its items. Rows behind the last request are tiles
of one more request, which sees nothing: their output is zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.mask_layout import CLEAN
from kernels.paged_attention.metadata import AttentionMetadata
from kernels.paged_attention.settings import TileSettings

_CLEAN = tl.constexpr(CLEAN)
_MOST = tl.constexpr(2**31 - 1)

ITEM_FIELDS = tl.constexpr(12)
"""int32 fields of an item: request, first row, rows of the request, first packed index, begin and end of its clean keys (their
positions, the request's first token is 0), begin and end of its mask keys (row numbers within the request), place of its
partial result, -1 if it is the whole of its tile; 3 unused."""

MERGE_FIELDS = tl.constexpr(8)
"""int32 fields of a tile that has to be merged: first row, rows of the request, first packed index, place of its first
partial result, their number; 3 unused."""

RECORD_FIELDS = tl.constexpr(9)
"""int32 fields of a request, each an array: first row, rows, tiles, tiles up to and with its last, its first item, pieces a
tile, tokens a piece, its first partial result, its first merge."""

_REQUESTS, _SCAN = 128, 128
"""Requests, and keys of a request, that are looked at together: the numbers of a step are no part of what is compiled."""


@dataclass(frozen=True, slots=True)
class WorkList:
    """The items of one tile height, in memory of a size that depends on the bounds alone.

    ``items`` [I, 12], ``merges`` [M, 8]; ``counts`` [3] says how many items, merges and tiles there are. ``num_partials``
    bounds the partial results, ``num_programs`` is the size of the persistent grid.
    """

    tile: TileSettings
    items: Tensor
    merges: Tensor
    counts: Tensor
    num_partials: int
    num_programs: int


@dataclass(frozen=True, slots=True)
class Height:
    """Which requests get such tiles: those with ``least < rows * group <= most``."""

    tile: TileSettings
    least: int = 0
    most: int = _MOST.value


def make_work_list(
    metadata: AttentionMetadata,
    height: Height,
    group_size: int,
    num_kv_heads: int,
    num_programs: int,
    min_split: int,
    split_size: int,
) -> WorkList:
    """Launch both kernels.

    ``min_split``: tokens of context below which a program of its own does not pay. ``split_size``: 0 lets the load decide how
    long pieces are; otherwise a piece is this many tokens, or, where a program can spare the time, the whole tile.
    """
    num_requests, num_rows, device = len(metadata.prefix_lengths), len(metadata.limit), metadata.limit.device
    num_records = num_requests + 1
    # What the grid can take for every head. More pieces than twice that never come up when the load decides, see the kernel.
    at_once = max(num_programs // num_kv_heads, 1)
    num_partials = (8 if split_size else 2) * at_once
    max_tiles = num_records + num_rows * group_size // height.tile.block_m

    def integers(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    records, counts = integers(RECORD_FIELDS.value, num_records), integers(3)
    items = integers(max_tiles + num_partials, ITEM_FIELDS.value)
    # The grid of the merge, in every layer: a tile that is merged has two pieces or more.
    merges = integers(min(num_partials // 2, max_tiles), MERGE_FIELDS.value)
    plan_kernel[(1,)](
        records,
        counts,
        metadata.device_row_starts,
        metadata.prefix_lengths,
        num_requests,
        num_rows,
        height.least,
        height.most,
        at_once,
        min_split,
        num_partials,
        GROUP=group_size,
        BLOCK_M=height.tile.block_m,
        BLOCK_N=height.tile.block_n,
        SPLIT_SIZE=split_size,
        REQUESTS=_REQUESTS,
    )
    fill_kernel[(max_tiles,)](
        items,
        merges,
        records,
        counts,
        metadata.prefix_lengths,
        metadata.limit,
        metadata.branch,
        num_requests,
        GROUP=group_size,
        BLOCK_M=height.tile.block_m,
        REQUESTS=_REQUESTS,
        SCAN=_SCAN,
    )
    return WorkList(height.tile, items, merges, counts, num_partials, num_programs)


@triton.jit
def _tiles_of(request, step, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """``(first row, rows, prefix, tiles)`` of requests. The rows behind the last request are those of one more."""
    row_starts, prefix_lengths, num_requests, num_rows, least_packed, most_packed = step
    exists = request < num_requests
    first_row = tl.load(row_starts + request, mask=request <= num_requests, other=0).to(tl.int32)
    end_row = tl.load(row_starts + request + 1, mask=exists, other=0).to(tl.int32)
    end_row = tl.where(request == num_requests, num_rows, end_row)
    prefix = tl.load(prefix_lengths + request, mask=exists, other=0).to(tl.int32)
    rows = tl.maximum(end_row - first_row, 0)
    chosen = (rows * GROUP > least_packed) & (rows * GROUP <= most_packed)
    return first_row, rows, prefix, tl.where(chosen, tl.cdiv(rows * GROUP, BLOCK_M), 0)


@triton.jit(
    do_not_specialize=["num_requests", "num_rows", "least_packed", "most_packed", "at_once", "min_split", "num_partials"]
)
def plan_kernel(
    records,
    counts,
    row_starts,
    prefix_lengths,
    num_requests,
    num_rows,
    least_packed,
    most_packed,
    at_once,
    min_split,
    num_partials,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT_SIZE: tl.constexpr,
    REQUESTS: tl.constexpr,
):
    """Tiles and pieces of every request.

    With ``W`` tokens to read in all, ``T`` tiles and room for ``P`` at once, a program's share is ``W / max(P - T, P / 2)``
    tokens, and a tile has as many pieces as its context has shares, all equally long. So there are at most
    ``T + max(P - T, P / 2)`` items: one round where tiles leave half the machine idle. Tiles that are split have at most
    ``2 W / share <= 2 P`` pieces.
    """
    step = (row_starts, prefix_lengths, num_requests, num_rows, least_packed, most_packed)
    num_records = num_requests + 1
    num_tiles = 0
    tokens = tl.full([], 0, tl.int64)
    for start in range(0, num_records, REQUESTS):
        request = start + tl.arange(0, REQUESTS)
        _, _, prefix, tiles = _tiles_of(request, step, GROUP, BLOCK_M)
        num_tiles += tl.sum(tiles, 0)
        tokens += tl.sum(tiles.to(tl.int64) * prefix, 0)
    share = tokens // tl.maximum(tl.maximum(at_once - num_tiles, at_once // 2), 1) + 1
    share = tl.maximum(share, min_split).to(tl.int32)

    first_tile = 0
    first_item = 0
    first_partial = 0
    first_merge = 0
    for start in range(0, num_records, REQUESTS):
        request = start + tl.arange(0, REQUESTS)
        first_row, rows, prefix, tiles = _tiles_of(request, step, GROUP, BLOCK_M)
        if SPLIT_SIZE:
            size = tl.full([REQUESTS], SPLIT_SIZE, tl.int32)
            pieces = tl.where(prefix + rows > share, tl.cdiv(prefix + rows, SPLIT_SIZE), 1)
        else:
            size = tl.cdiv(tl.cdiv(prefix, tl.maximum(tl.cdiv(prefix, share), 1)), BLOCK_N) * BLOCK_N
            pieces = tl.maximum(tl.cdiv(prefix, tl.maximum(size, 1)), 1)
        partials = tl.where(pieces > 1, tiles * pieces, 0)
        end_partial = first_partial + tl.cumsum(partials, 0)
        pieces = tl.where(end_partial <= num_partials, pieces, 1)
        merges = tl.where(pieces > 1, tiles, 0)
        end_tile = first_tile + tl.cumsum(tiles, 0)
        first_items = first_item + tl.cumsum(tiles * pieces, 0) - tiles * pieces
        first_merges = first_merge + tl.cumsum(merges, 0) - merges
        record = (first_row, rows, tiles, end_tile, first_items, pieces, size, end_partial - partials, first_merges)
        for i in tl.static_range(RECORD_FIELDS):
            tl.store(records + i * num_records + request, record[i], mask=request < num_records)
        first_tile += tl.sum(tiles, 0)
        first_item += tl.sum(tiles * pieces, 0)
        first_partial += tl.sum(partials, 0)
        first_merge += tl.sum(merges, 0)
    tl.store(counts, first_item)
    tl.store(counts + 1, first_merge)
    tl.store(counts + 2, num_tiles)


@triton.jit
def _visible_keys(
    limit, branch, first_row, num_rows, first_packed, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, SCAN: tl.constexpr
):
    """In-step keys that some row of a tile sees: how many clean ones, and begin and end of the mask keys (row numbers).

    Exact for the masks when rows are sorted by branch; otherwise the span from the first to the last.
    """
    row = (first_packed + tl.arange(0, BLOCK_M)) // GROUP
    valid = row < num_rows
    row_limit = tl.load(limit + first_row + row, mask=valid, other=0).to(tl.int32)
    row_branch = tl.load(branch + first_row + row, mask=valid, other=_CLEAN).to(tl.int32)
    lowest = tl.min(tl.where(row_branch == _CLEAN, _MOST, row_branch), 0)
    highest = tl.max(tl.where(row_branch == _CLEAN, -1, row_branch), 0)
    begin = _MOST
    end = 0
    if lowest <= highest:
        for start in range(0, num_rows, SCAN):
            key = start + tl.arange(0, SCAN)
            key_branch = tl.load(branch + first_row + key, mask=key < num_rows, other=_CLEAN).to(tl.int32)
            seen = (key_branch != _CLEAN) & (key_branch >= lowest) & (key_branch <= highest)
            begin = tl.minimum(begin, tl.min(tl.where(seen, key, _MOST), 0))
            end = tl.maximum(end, tl.max(tl.where(seen, key + 1, 0), 0))
    return tl.minimum(tl.max(row_limit, 0), num_rows), begin, end


@triton.jit(do_not_specialize=["num_requests"])
def fill_kernel(
    items,
    merges,
    records,
    counts,
    prefix_lengths,
    limit,
    branch,
    num_requests,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    REQUESTS: tl.constexpr,
    SCAN: tl.constexpr,
):
    """Items of tile ``program_id``: all its pieces. The clean keys of the step belong to the last, its mask keys to the first.

    A request's tiles go from its last rows to its first, since later ones see more. The items of one piece are neighbours, so
    that tiles which read the same keys run at the same time.
    """
    number = tl.program_id(0)
    if number < tl.load(counts + 2):
        num_records = num_requests + 1
        request = 0
        for start in range(0, num_records, REQUESTS):
            other = start + tl.arange(0, REQUESTS)
            end_tile = tl.load(records + 3 * num_records + other, mask=other < num_records, other=_MOST)
            request += tl.sum((end_tile <= number).to(tl.int32), 0)
        field = records + request
        first_row = tl.load(field)
        num_rows = tl.load(field + num_records)
        tiles = tl.load(field + 2 * num_records)
        tile = number - tl.load(field + 3 * num_records) + tiles
        first_item = tl.load(field + 4 * num_records)
        pieces = tl.load(field + 5 * num_records)
        size = tl.load(field + 6 * num_records)
        first_partial = tl.load(field + 7 * num_records) + tile * pieces
        first_packed = (tiles - 1 - tile) * BLOCK_M

        prefix = 0
        clean_end = 0
        mask_begin = 0
        mask_end = 0
        if request < num_requests:
            prefix = tl.load(prefix_lengths + request).to(tl.int32)
            num_clean, mask_begin, mask_end = _visible_keys(
                limit, branch, first_row, num_rows, first_packed, GROUP, BLOCK_M, SCAN
            )
            clean_end = prefix + num_clean

        for piece in range(0, pieces):
            item = items + (first_item + piece * tiles + tile) * ITEM_FIELDS
            last = piece == pieces - 1
            tl.store(item, request)
            tl.store(item + 1, first_row)
            tl.store(item + 2, num_rows)
            tl.store(item + 3, first_packed)
            tl.store(item + 4, piece * size)
            tl.store(item + 5, tl.where(last, clean_end, tl.minimum((piece + 1) * size, clean_end)))
            tl.store(item + 6, mask_begin)
            tl.store(item + 7, tl.where(piece == 0, mask_end, 0))
            tl.store(item + 8, tl.where(pieces > 1, first_partial + piece, -1))
        if pieces > 1:
            merge = merges + (tl.load(field + 8 * num_records) + tile) * MERGE_FIELDS
            tl.store(merge, first_row)
            tl.store(merge + 1, num_rows)
            tl.store(merge + 2, first_packed)
            tl.store(merge + 3, first_partial)
            tl.store(merge + 4, pieces)
