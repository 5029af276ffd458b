"""Triton attention with the step's mask over a paged cache: the same contract as ``kernels.paged_attention.reference``.

One unit of work is a *tile*, up to ``BLOCK_M`` query vectors of one request and one key/value head. Rows and the query heads
that share the key/value head are flattened together (``packed = row * group + head in group``), because a draft-and-verify
step has enough rows for large tiles to pay. A tile walks (``triton_tile``)

* the prefix in whole blocks through the block table, without mask arithmetic,
* the rest of the prefix and the clean rows of the step, by position,
* the mask rows of the step that belong to its branches.

The mask is two small integers a row, see ``kernels.mask_layout``. Slots at or beyond the prefix length are never loaded, so
whatever they hold (even NaN) is harmless. ``prepare`` makes the list of tiles once a step, on the device (``triton_work``); all
layers share it. The grid has a fixed size and reads the number of items from memory. So a captured launch serves any prefix
lengths and row starts within the same numbers of requests and rows, and nothing is specialised on them.

A tile whose context is long is cut into pieces, one program each. A second kernel folds their states in the order of the
pieces.

**Batch invariance.** With ``batch_invariant`` the bits of a clean row's output depend on nothing but its own query and the keys
and values at positions ``0..p``, ``p`` its own position: not on the other requests, nor on where the step begins, that is,
on whether it is the row of an ``ar`` step, a draft, or in the middle of a prompt. The argument:

1. Keys come in blocks of ``BLOCK_N`` positions, and blocks in segments of ``split_size`` positions, both counted from the
   request's first token. A key of the step stands where the cache will have it, and its bits are those that the cache will
   have. So it plays no part where the prefix ends.
2. There is one loop for all clean keys (``_walk_clean``) and one tile height, so a row always runs through the same
   instructions. The instructions treat the rows of a tile alike, and none mixes two rows.
3. Every segment starts from an empty state, and states are folded in the order of the segments. Whether one program does them
   all or one each is decided by the load, and both do the same arithmetic: no multiplication is fused with an addition
   (``enable_fp_fusion=False``), which the compiler might do in one place and not in another.
4. Keys that a row does not see, of other rows in its tile, change nothing: their score is -inf, so the peak stays, the
   state is scaled by ``2^0`` and what is added is zero. The same goes for segments beyond the row's position.

A mask row does not depend on the other requests either: its clean keys are as above, and the masks of its branch follow in
the first segment, in blocks that count from the request's first row of the step. How its own request is cut into steps
decides what those blocks hold.

Page sizes: any. Where a page is a multiple of the key block, or half of it, a block costs one look-up a page; keys of other
pages are gathered, one look-up a key. Head sizes: any; tiles are padded to a power of two. Data types: float16, bfloat16, and
float32 in full precision (for tests).
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from kernels.paged_attention.metadata import AttentionMetadata
from kernels.paged_attention.settings import AttentionSettings, TileSettings, settings_for
from kernels.paged_attention.triton_kernels import attention_kernel, merge_kernel
from kernels.paged_attention.triton_work import Height, WorkList, make_work_list

_INTERPRETED_PROGRAMS = 4
_MERGE_PROGRAMS, _MERGED = 16, 32
"""Programs that merge a tile of one head, and query vectors of all pieces that one holds at a time."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """The per-step work of the kernel: lists of tiles, and the device state that they are read against."""

    lists: tuple[WorkList, ...]
    metadata: AttentionMetadata
    page_size: int
    group_size: int
    split_size: int


def prepare(
    metadata: AttentionMetadata,
    page_size: int,
    group_size: int,
    dtype: torch.dtype,
    *,
    num_kv_heads: int = 8,
    batch_invariant: bool = False,
    settings: AttentionSettings | None = None,
    **changes: Any,
) -> Prepared:
    """Make the work lists of a step, once for all layers. Nothing here waits for the device, and nothing is copied to it.

    ``group_size`` is the number of query heads per key/value head. The host's row starts only serve to choose tile heights;
    what is computed follows the device's. ``num_kv_heads`` only decides how the work is cut. ``settings`` are by default those
    of the data type; ``changes`` are other values for single ones.
    """
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"the Triton attention does not compute in {dtype}")
    settings = settings or settings_for(dtype, batch_invariant)
    if changes:
        settings = replace(settings, **changes)
    for tile in settings.tiles:
        if settings.split_size % tile.block_n:
            raise ValueError(f"split_size {settings.split_size} is not a multiple of the key block, {tile.block_n}")
    device = metadata.limit.device
    lists = tuple(
        make_work_list(
            metadata,
            height,
            group_size,
            num_kv_heads,
            settings.num_programs or _num_programs(height.tile, device),
            settings.min_split,
            settings.split_size,
        )
        for height in _choose_heights(metadata.row_starts, group_size, settings.tiles)
    )
    return Prepared(lists, metadata, page_size, group_size, settings.split_size)


def _choose_heights(row_starts: tuple[int, ...], group_size: int, tiles: tuple[TileSettings, ...]) -> tuple[Height, ...]:
    """At most two, a launch each: requests that fit the smallest tile would waste most of a large one."""
    packed = [(end - start) * group_size for start, end in itertools.pairwise(row_starts)]
    most, small = max(packed, default=0), tiles[0]
    tall = next((tile for tile in tiles if tile.block_m >= most), tiles[-1])
    if tall is small or all(size == 0 or size > small.block_m for size in packed):
        return (Height(tall),)
    return Height(small, most=small.block_m), Height(tall, least=small.block_m)


@functools.cache
def _num_programs(tile: TileSettings, device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETED_PROGRAMS
    processors = int(torch.cuda.get_device_properties(device).multi_processor_count)
    return processors * tile.programs_per_processor


def paged_attention(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, prepared: Prepared, scale: float
) -> Tensor:
    """Return the attention output [R, H, D] of a step's rows.

    Shapes: q [R, H, D]; k, v [R, G, D]; caches [pages, G, page_size, D]. Any strides, as long as the last one is 1 and those of
    the two caches are the same.
    """
    metadata = prepared.metadata
    assert all(t.stride(-1) == 1 for t in (q, k, v, k_cache, v_cache, metadata.block_table))
    assert (k_cache.shape[2], q.shape[1]) == (prepared.page_size, k.shape[1] * prepared.group_size)
    assert k_cache.stride() == v_cache.stride()
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for work in prepared.lists:
        launch(out, q, k, v, k_cache, v_cache, prepared, work, scale * math.log2(math.e))
    return out


def launch(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    prepared: Prepared,
    work: WorkList,
    scale: float,
) -> Any:
    """Run the tiles of one height, then merge those that are in pieces. Returns the compiled kernel that ran the tiles."""
    metadata, tile, num_kv_heads = prepared.metadata, work.tile, k.shape[1]
    block_m = tile.block_m
    head_dim, block_d = q.shape[2], max(16, triton.next_power_of_2(q.shape[2]))
    cells = (work.num_partials, num_kv_heads, block_m)
    partial_acc = torch.empty((*cells, block_d), dtype=torch.float32, device=q.device)
    partial_peak, partial_total = torch.empty((2, *cells), dtype=torch.float32, device=q.device)
    shape = {"HEAD_DIM": head_dim, "BLOCK_D": block_d, "GROUP": prepared.group_size, "KV_HEADS": num_kv_heads}
    options = {"num_warps": tile.num_warps, "enable_fp_fusion": prepared.split_size == 0}
    compiled = attention_kernel[(work.num_programs,)](
        out,
        partial_acc,
        partial_peak,
        partial_total,
        q,
        k,
        v,
        k_cache,
        v_cache,
        work.items,
        work.counts,
        metadata.prefix_lengths,
        metadata.block_table,
        metadata.limit,
        metadata.branch,
        len(metadata.prefix_lengths),
        scale,
        metadata.block_table.stride(0),
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        *k_cache.stride()[:3],
        **shape,
        BLOCK_M=block_m,
        PAGE=prepared.page_size,
        BLOCK_N=tile.block_n,
        SPLIT_SIZE=prepared.split_size,
        num_stages=tile.num_stages,
        maxnreg=tile.max_registers,
        **options,
    )
    rows = block_m // _MERGE_PROGRAMS
    merge_kernel[(len(work.merges), num_kv_heads, _MERGE_PROGRAMS)](
        out,
        partial_acc,
        partial_peak,
        partial_total,
        work.merges,
        work.counts,
        **shape,
        BLOCK_M=block_m,
        ROWS=rows,
        # One at a time is the order in which a program folds the segments that it has to itself.
        PIECES=1 if prepared.split_size else _MERGED // rows,
        **options,
    )
    return compiled
