"""Triton attention with the step's mask over a paged cache: the same contract as ``kernels.paged_attention.reference``.

One program computes one *tile*: up to ``BLOCK_M`` query vectors of one request and one key/value head. Rows and the query
heads that share the key/value head are flattened together (``packed = row * group + head in group``), because a
draft-and-verify step has enough rows for large tiles to pay. A program walks the request's prefix through the block table,
then the rows of the step that its own rows may see, with the online softmax of FlashAttention-2 (Dao, arXiv 2307.08691,
algorithm 1) in float32 and base 2: ``2^(x log2 e) = e^x``.

* Prefix: no mask arithmetic except for the length check of the last block of keys. Slots at or beyond the prefix length are
  never loaded, so whatever they hold (even NaN) is harmless. Lengths are read from device memory: the host knows only upper
  bounds, nothing waits for the device, and nothing is specialised on them.
* In-step rows: two small integers a row, see ``kernels.mask_layout``. Key blocks that no row of a tile can see are left out:
  a tile visits the clean rows below its largest limit and the span of its own branches (exact when rows are sorted by branch).
* Context split: where tiles alone cannot fill the device, the prefix of a request is cut into pieces of ``split_size`` tokens,
  one program each (the first also takes the in-step rows). A second kernel merges the normalised partial outputs in a fixed
  order by their log-sum-exp, the rescaling of FlashAttention-2 (section 3.1) applied to whole pieces.

``prepare`` makes the list of tiles from host integers and one asynchronous copy, and a small kernel adds each tile's in-step
key blocks; all layers share it. After that ``paged_attention`` only allocates and launches.

Not there yet: a list made wholly on the device with a persistent grid (a captured step whose rows are spread differently over
its requests needs a new list), and bitwise batch invariance (a fixed ``split_size`` fixes the merge, but the tile height still
follows the batch).

Page sizes: any. A page that is a multiple of the key block (64 keys, 32 in float32) costs one look-up a block; keys of other
pages are gathered, one look-up a key. Head sizes: any; tiles are padded to a power of two. Data types: float16, bfloat16, and
float32 in full precision (for tests).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.mask_layout import CLEAN
from kernels.paged_attention.metadata import AttentionMetadata

_CLEAN = tl.constexpr(CLEAN)
_LOWEST = tl.constexpr(-1.0e30)
"""Start of the running maximum. Finite, so that a block in which a row sees nothing gives ``2^(-inf) = 0`` and not NaN."""

_ITEM_FIELDS = tl.constexpr(12)
"""int32 fields of a work item: request, first row, rows of the request, first packed index, split, number of splits, slot of
the partial result; then, filled in on the device: blocks of clean keys, blocks left out after them, blocks in all; 2 unused."""

_MIN_TILE, _MAX_TILE, _MAX_TILE_FLOAT32 = 16, 128, 32
_MIN_SPLIT_TOKENS, _MAX_SPLITS = 256, 64
_PROGRAMS_PER_PROCESSOR = 2


@dataclass(frozen=True, slots=True)
class _Launch:
    """Work items of one tile height. ``num_partials`` is 0 where no request is split."""

    block_m: int
    items: Tensor
    num_partials: int


@dataclass(frozen=True, slots=True)
class Prepared:
    """The per-step work of the kernel: lists of tiles, and the device state that they are read against."""

    launches: tuple[_Launch, ...]
    metadata: AttentionMetadata
    page_size: int
    group_size: int
    block_n: int
    step_n: int
    split_size: int


def prepare(
    metadata: AttentionMetadata,
    page_size: int,
    group_size: int,
    dtype: torch.dtype,
    *,
    num_kv_heads: int = 8,
    split_size: int | None = None,
) -> Prepared:
    """Make the work lists of a step, once for all layers. Nothing here waits for the device.

    ``group_size`` is the number of query heads per key/value head. ``num_kv_heads`` only serves to tell whether the tiles fill
    the device. ``split_size`` is the number of prefix tokens per program, a multiple of the key block: None lets the load
    decide, 0 means no split.
    """
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"the Triton attention does not compute in {dtype}")
    largest_tile, block_n = (_MAX_TILE_FLOAT32, 32) if dtype == torch.float32 else (_MAX_TILE, 64)
    starts = metadata.row_starts
    packed = [(starts[i + 1] - starts[i]) * group_size for i in range(len(starts) - 1)]
    most = max(packed, default=0)
    step_n = min(block_n, max(16, triton.next_power_of_2(most // group_size)))
    height = min(largest_tile, max(_MIN_TILE, triton.next_power_of_2(most)))
    # At most two launches a layer: requests that fit the smallest tile would waste most of a large one.
    small = [i for i, size in enumerate(packed) if 0 < size <= _MIN_TILE]
    large = [i for i, size in enumerate(packed) if size > _MIN_TILE]
    num_tiles = len(small) + sum(-(-packed[i] // height) for i in large)
    if split_size is None:
        longest = max(metadata.max_prefix, default=0)
        split_size = _choose_split_size(num_tiles * num_kv_heads, longest, block_n, metadata.limit.device)
    if split_size % block_n:
        raise ValueError(f"split_size {split_size} is not a multiple of the key block, {block_n}")
    launches = tuple(
        _launch(metadata, members, packed, block_m, group_size, step_n, split_size)
        for members, block_m in ((small, _MIN_TILE), (large, height))
        if members
    )
    return Prepared(launches, metadata, page_size, group_size, block_n, step_n, split_size)


@functools.cache
def _num_processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _choose_split_size(num_programs: int, longest: int, block_n: int, device: torch.device) -> int:
    """Tokens per program such that the longest request's splits fill the device, 0 where tiles alone do."""
    if device.type != "cuda" or not num_programs:
        return 0
    wanted = _PROGRAMS_PER_PROCESSOR * _num_processors(device) // num_programs
    splits = min(wanted, longest // _MIN_SPLIT_TOKENS, _MAX_SPLITS)
    return -(-longest // (splits * block_n)) * block_n if splits > 1 else 0


def _launch(
    metadata: AttentionMetadata,
    members: list[int],
    packed: list[int],
    block_m: int,
    group_size: int,
    step_n: int,
    split_size: int,
) -> _Launch:
    values: list[int] = []
    num_items = num_partials = 0
    for i in members:
        first_row = metadata.row_starts[i]
        num_rows = metadata.row_starts[i + 1] - first_row
        splits = max(1, -(-metadata.max_prefix[i] // split_size)) if split_size else 1
        for first_packed in range(0, packed[i], block_m):
            for split in range(splits):
                values += (i, first_row, num_rows, first_packed, split, splits, num_partials + split, 0, 0, 0, 0, 0)
            num_items += splits
            num_partials += splits if splits > 1 else 0
    device = metadata.limit.device
    # From pinned memory the copy is ordered on the stream and the host goes on.
    host = torch.tensor(values, dtype=torch.int32, pin_memory=device.type == "cuda").view(num_items, _ITEM_FIELDS.value)
    items = host.to(device, non_blocking=True)
    _bound_tiles_kernel[(num_items,)](
        items, metadata.limit, metadata.branch, GROUP=group_size, BLOCK_M=block_m, STEP_N=step_n, SCAN=128
    )
    return _Launch(block_m, items, num_partials)


def paged_attention(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, prepared: Prepared, scale: float
) -> Tensor:
    """Return the attention output [R, H, D] of a step's rows.

    Shapes: q [R, H, D]; k, v [R, G, D]; caches [pages, G, page_size, D]. Any strides, as long as the last one is 1.
    """
    head_dim, num_kv_heads = q.shape[2], k.shape[1]
    metadata = prepared.metadata
    assert all(t.stride(-1) == 1 for t in (q, k, v, k_cache, v_cache, metadata.block_table))
    assert (k_cache.shape[2], q.shape[1]) == (prepared.page_size, num_kv_heads * prepared.group_size)
    block_d = max(16, triton.next_power_of_2(head_dim))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for launch in prepared.launches:
        split = launch.num_partials > 0
        block_m, grid = launch.block_m, (launch.items.shape[0], num_kv_heads)
        partial, partial_lse = out, out  # placeholders that the kernel never touches
        if split:
            shape = (launch.num_partials, num_kv_heads, block_m, block_d)
            partial = torch.empty(shape, dtype=torch.float32, device=q.device)
            partial_lse = torch.empty(shape[:3], dtype=torch.float32, device=q.device)
        _attention_kernel[grid](
            out,
            partial,
            partial_lse,
            q,
            k,
            v,
            k_cache,
            v_cache,
            launch.items,
            metadata.prefix_lengths,
            metadata.block_table,
            metadata.limit,
            metadata.branch,
            scale * math.log2(math.e),
            prepared.split_size,
            metadata.block_table.stride(0),
            *q.stride()[:2],
            *k.stride()[:2],
            *v.stride()[:2],
            *out.stride()[:2],
            *k_cache.stride()[:3],
            *v_cache.stride()[:3],
            HEAD_DIM=head_dim,
            BLOCK_D=block_d,
            GROUP=prepared.group_size,
            PAGE=prepared.page_size,
            BLOCK_M=block_m,
            BLOCK_N=prepared.block_n,
            STEP_N=prepared.step_n,
            SPLIT=split,
            num_warps=8 if block_m > 64 else 4,
            num_stages=2 if q.dtype == torch.float32 else 3,
        )
        if split:
            _merge_kernel[grid](
                out,
                partial,
                partial_lse,
                launch.items,
                *out.stride()[:2],
                HEAD_DIM=head_dim,
                BLOCK_D=block_d,
                GROUP=prepared.group_size,
                BLOCK_M=block_m,
            )
    return out


@triton.jit
def _bound_tiles_kernel(
    items, limit, branch, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, STEP_N: tl.constexpr, SCAN: tl.constexpr
):
    """Find the blocks of in-step keys that a tile visits: the first ``clean_blocks``; after a gap, a span of mask rows."""
    item = items + tl.program_id(0) * _ITEM_FIELDS
    first_row = tl.load(item + 1)
    num_rows = tl.load(item + 2)
    packed = tl.load(item + 3) + tl.arange(0, BLOCK_M)
    row = packed // GROUP
    valid = row < num_rows
    row_branch = tl.load(branch + first_row + row, mask=valid, other=_CLEAN).to(tl.int32)
    row_limit = tl.load(limit + first_row + row, mask=valid, other=0).to(tl.int32)
    clean_blocks = tl.cdiv(tl.minimum(tl.max(row_limit, 0), num_rows), STEP_N)

    lowest = tl.min(tl.where(row_branch == _CLEAN, 2147483647, row_branch), 0)
    highest = tl.max(tl.where(row_branch == _CLEAN, -2147483647, row_branch), 0)
    mask_begin = num_rows
    mask_end = 0
    if lowest <= highest:
        for start in range(0, num_rows, SCAN):
            key = start + tl.arange(0, SCAN)
            key_branch = tl.load(branch + first_row + key, mask=key < num_rows, other=_CLEAN).to(tl.int32)
            own = (key_branch != _CLEAN) & (key_branch >= lowest) & (key_branch <= highest)
            mask_begin = tl.minimum(mask_begin, tl.min(tl.where(own, key, 2147483647), 0))
            mask_end = tl.maximum(mask_end, tl.max(tl.where(own, key + 1, 0), 0))
    # Blocks are aligned, so that one which holds both clean and mask keys is visited once.
    gap = tl.maximum(mask_begin // STEP_N - clean_blocks, 0)
    mask_blocks = tl.maximum(tl.cdiv(mask_end, STEP_N) - clean_blocks - gap, 0)
    tl.store(item + 7, clean_blocks)
    tl.store(item + 8, gap)
    tl.store(item + 9, clean_blocks + mask_blocks)


@triton.jit
def _accumulate(acc, peak, total, scores, v):
    """Fold scores [M, N] (base 2, unseen keys at -inf) and values [N, D] into the running state of the online softmax."""
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    decay = tl.exp2(peak - new_peak)
    weights = tl.exp2(scores - new_peak[:, None])
    total = total * decay + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return acc, new_peak, total


@triton.jit(do_not_specialize=["split_size", "table_stride"])
def _attention_kernel(
    out,
    partial,
    partial_lse,
    q,
    k,
    v,
    k_cache,
    v_cache,
    items,
    prefix_lengths,
    block_table,
    limit,
    branch,
    scale,
    split_size,
    table_stride,
    q_row_stride,
    q_head_stride,
    k_row_stride,
    k_head_stride,
    v_row_stride,
    v_head_stride,
    out_row_stride,
    out_head_stride,
    k_page_stride,
    k_cache_head_stride,
    k_slot_stride,
    v_page_stride,
    v_cache_head_stride,
    v_slot_stride,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEP_N: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Attention of one work item (program axis 0) and key/value head (axis 1). ``scale`` includes ``log2(e)``."""
    item = items + tl.program_id(0) * _ITEM_FIELDS
    kv_head = tl.program_id(1).to(tl.int64)
    request = tl.load(item)
    first_row = tl.load(item + 1)
    num_rows = tl.load(item + 2)

    packed = tl.load(item + 3) + tl.arange(0, BLOCK_M)
    row = packed // GROUP
    head = kv_head * GROUP + packed % GROUP
    valid = row < num_rows
    row_in_step = (first_row + row).to(tl.int64)
    dim = tl.arange(0, BLOCK_D)
    in_head = dim < HEAD_DIM
    q_pointers = q + (row_in_step * q_row_stride + head * q_head_stride)[:, None] + dim[None, :]
    q_tile = tl.load(q_pointers, mask=valid[:, None] & in_head[None, :], other=0.0)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    peak = tl.full([BLOCK_M], _LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)

    begin = 0
    end = tl.load(prefix_lengths + request).to(tl.int32)
    if SPLIT:
        split = tl.load(item + 4)
        num_splits = tl.load(item + 5)
        begin = split * split_size
        # The last piece takes what is left. A prefix shorter than its upper bound leaves the last pieces empty.
        end = tl.where(split == num_splits - 1, end, tl.minimum(end, begin + split_size))
    full_end = begin + tl.maximum(end - begin, 0) // BLOCK_N * BLOCK_N

    table = block_table + request.to(tl.int64) * table_stride
    k_head_base = k_cache + kv_head * k_cache_head_stride
    v_head_base = v_cache + kv_head * v_cache_head_stride
    offset = tl.arange(0, BLOCK_N)
    for start in range(begin, full_end, BLOCK_N):
        if PAGE % BLOCK_N == 0:
            page = tl.load(table + start // PAGE).to(tl.int64)
            slot = start % PAGE + offset
        else:
            page = tl.load(table + (start + offset) // PAGE).to(tl.int64)
            slot = (start + offset) % PAGE
        k_pointers = (k_head_base + page * k_page_stride + slot * k_slot_stride)[:, None] + dim[None, :]
        v_pointers = (v_head_base + page * v_page_stride + slot * v_slot_stride)[:, None] + dim[None, :]
        if HEAD_DIM == BLOCK_D:
            k_tile = tl.load(k_pointers)
            v_tile = tl.load(v_pointers)
        else:
            k_tile = tl.load(k_pointers, mask=in_head[None, :], other=0.0)
            v_tile = tl.load(v_pointers, mask=in_head[None, :], other=0.0)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale
        acc, peak, total = _accumulate(acc, peak, total, scores, v_tile)

    if full_end < end:
        position = full_end + offset
        in_prefix = position < end
        page = tl.load(table + position // PAGE, mask=in_prefix, other=0).to(tl.int64)
        slot = position % PAGE
        k_pointers = (k_head_base + page * k_page_stride + slot * k_slot_stride)[:, None] + dim[None, :]
        v_pointers = (v_head_base + page * v_page_stride + slot * v_slot_stride)[:, None] + dim[None, :]
        k_tile = tl.load(k_pointers, mask=in_prefix[:, None] & in_head[None, :], other=0.0)
        v_tile = tl.load(v_pointers, mask=in_prefix[:, None] & in_head[None, :], other=0.0)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale
        scores = tl.where(in_prefix[None, :], scores, float("-inf"))
        acc, peak, total = _accumulate(acc, peak, total, scores, v_tile)

    clean_blocks = tl.load(item + 7)
    gap = tl.load(item + 8)
    num_blocks = tl.load(item + 9)
    if SPLIT:
        num_blocks = tl.where(split == 0, num_blocks, 0)
    row_limit = tl.minimum(tl.load(limit + row_in_step, mask=valid, other=0).to(tl.int32), num_rows)
    row_branch = tl.load(branch + row_in_step, mask=valid, other=_CLEAN).to(tl.int32)
    for i in range(0, num_blocks):
        key = tl.where(i < clean_blocks, i, i + gap) * STEP_N + tl.arange(0, STEP_N)
        is_row = key < num_rows
        key_in_step = (first_row + key).to(tl.int64)
        # A key beyond the last row counts as clean, and lies above every limit.
        key_branch = tl.load(branch + key_in_step, mask=is_row, other=_CLEAN).to(tl.int32)
        k_pointers = k + (key_in_step * k_row_stride + kv_head * k_head_stride)[:, None] + dim[None, :]
        v_pointers = v + (key_in_step * v_row_stride + kv_head * v_head_stride)[:, None] + dim[None, :]
        k_tile = tl.load(k_pointers, mask=is_row[:, None] & in_head[None, :], other=0.0)
        v_tile = tl.load(v_pointers, mask=is_row[:, None] & in_head[None, :], other=0.0)
        key_clean = (key_branch == _CLEAN)[None, :]
        sees_clean = key_clean & (key[None, :] < row_limit[:, None])
        same_branch = key_branch[None, :] == row_branch[:, None]
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale
        scores = tl.where(sees_clean | (same_branch & (key_branch != _CLEAN)[None, :]), scores, float("-inf"))
        acc, peak, total = _accumulate(acc, peak, total, scores, v_tile)

    seen = total > 0.0
    divisor = tl.where(seen, total, 1.0)
    result = acc / divisor[:, None]
    stored = valid
    if SPLIT:
        cell = (tl.load(item + 6) * tl.num_programs(1) + kv_head) * BLOCK_M + tl.arange(0, BLOCK_M)
        to_merge = row < tl.where(num_splits > 1, num_rows, 0)
        stored = row < tl.where(num_splits > 1, 0, num_rows)
        tl.store(partial_lse + cell, tl.where(seen, peak + tl.log2(divisor), float("-inf")), mask=to_merge)
        tl.store(partial + cell[:, None] * BLOCK_D + dim[None, :], result, mask=to_merge[:, None])
    out_pointers = out + (row_in_step * out_row_stride + head * out_head_stride)[:, None] + dim[None, :]
    tl.store(out_pointers, result.to(out.dtype.element_ty), mask=stored[:, None] & in_head[None, :])


@triton.jit
def _merge_kernel(
    out,
    partial,
    partial_lse,
    items,
    out_row_stride,
    out_head_stride,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Merge the splits of a tile in their order, each weighted by ``2^lse``. Items other than a tile's first do nothing."""
    item = items + tl.program_id(0) * _ITEM_FIELDS
    kv_head = tl.program_id(1).to(tl.int64)
    first_row = tl.load(item + 1)
    num_rows = tl.load(item + 2)
    packed = tl.load(item + 3) + tl.arange(0, BLOCK_M)
    split = tl.load(item + 4)
    num_splits = tl.load(item + 5)
    slot = tl.load(item + 6)
    if (split == 0) & (num_splits > 1):
        row = packed // GROUP
        valid = row < num_rows
        dim = tl.arange(0, BLOCK_D)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        peak = tl.full([BLOCK_M], _LOWEST, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        for s in range(0, num_splits):
            cell = ((slot + s) * tl.num_programs(1) + kv_head) * BLOCK_M + tl.arange(0, BLOCK_M)
            lse = tl.load(partial_lse + cell, mask=valid, other=float("-inf"))
            value = tl.load(partial + cell[:, None] * BLOCK_D + dim[None, :], mask=valid[:, None], other=0.0)
            new_peak = tl.maximum(peak, lse)
            decay = tl.exp2(peak - new_peak)
            weight = tl.exp2(lse - new_peak)
            total = total * decay + weight
            acc = acc * decay[:, None] + value * weight[:, None]
            peak = new_peak
        result = acc / tl.where(total > 0.0, total, 1.0)[:, None]
        row_in_step = (first_row + row).to(tl.int64)
        head = kv_head * GROUP + packed % GROUP
        out_pointers = out + (row_in_step * out_row_stride + head * out_head_stride)[:, None] + dim[None, :]
        tl.store(out_pointers, result.to(out.dtype.element_ty), mask=valid[:, None] & (dim < HEAD_DIM)[None, :])
