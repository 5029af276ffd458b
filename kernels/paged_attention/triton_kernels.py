"""The two launches of a layer: all items of the work list, then the merge of the tiles that are in pieces."""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.mask_layout import CLEAN
from kernels.paged_attention.triton_tile import LOWEST, finish, fold, gather, start, walk
from kernels.paged_attention.triton_work import ITEM_FIELDS, MERGE_FIELDS

_CLEAN = tl.constexpr(CLEAN)


@triton.jit(do_not_specialize=["num_requests", "table_stride"])
def attention_kernel(
    out,
    partial_acc,
    partial_peak,
    partial_total,
    q,
    k,
    v,
    k_cache,
    v_cache,
    items,
    counts,
    prefix_lengths,
    block_table,
    limit,
    branch,
    num_requests,
    scale,
    table_stride,
    q_row_stride,
    q_head_stride,
    k_row_stride,
    k_head_stride,
    v_row_stride,
    v_head_stride,
    page_stride,
    cache_head_stride,
    slot_stride,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    KV_HEADS: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT_SIZE: tl.constexpr,
):
    """All work items, for every key/value head. ``scale`` includes ``log2(e)``.

    Programs take units in turns, forwards and backwards, so that long ones, which are first in a request, meet short ones.
    """
    num_units = tl.load(counts) * KV_HEADS
    num_programs = tl.num_programs(0)
    for turn in range(0, tl.cdiv(num_units, num_programs)):
        place = tl.where(turn % 2 == 0, tl.program_id(0), num_programs - 1 - tl.program_id(0))
        unit = turn * num_programs + place
        if unit < num_units:
            item = items + unit // KV_HEADS * ITEM_FIELDS
            kv_head = (unit % KV_HEADS).to(tl.int64)
            request = tl.load(item)
            first_row = tl.load(item + 1).to(tl.int64)
            num_rows = tl.load(item + 2)
            packed = tl.load(item + 3) + tl.arange(0, BLOCK_M)
            row = packed // GROUP
            exists = row < num_rows
            dim = tl.arange(0, BLOCK_D)
            stored = exists[:, None] & (dim < HEAD_DIM)[None, :]
            head = kv_head * GROUP + packed % GROUP
            q_offset = (first_row + row) * q_row_stride + head * q_head_stride
            q_tile = tl.load(q + q_offset[:, None] + dim[None, :], mask=stored, other=0.0)
            row_branch = tl.load(branch + first_row + row, mask=exists, other=_CLEAN).to(tl.int32)
            row_limit = tl.load(limit + first_row + row, mask=exists, other=0).to(tl.int32)
            prefix = tl.load(prefix_lengths + request, mask=request < num_requests, other=0).to(tl.int32)

            rows = (q_tile, prefix + tl.minimum(tl.maximum(row_limit, 0), num_rows), row_branch)
            k_head, v_head = k_cache + kv_head * cache_head_stride, v_cache + kv_head * cache_head_stride
            cache = (k_head, v_head, block_table + request.to(tl.int64) * table_stride, page_stride, slot_stride, prefix)
            k_step = k + first_row * k_row_stride + kv_head * k_head_stride
            v_step = v + first_row * v_row_stride + kv_head * v_head_stride
            step = (k_step, v_step, branch + first_row, k_row_stride, v_row_stride)
            begin, end, mask_begin, mask_end = tl.load(item + 4), tl.load(item + 5), tl.load(item + 6), tl.load(item + 7)
            state = walk(
                rows,
                cache,
                step,
                begin,
                end,
                mask_begin,
                mask_end,
                scale,
                HEAD_DIM,
                BLOCK_M,
                BLOCK_D,
                PAGE,
                BLOCK_N,
                SPLIT_SIZE,
            )

            partial = tl.load(item + 8)
            if partial < 0:
                out_offset = ((first_row + row) * (KV_HEADS * GROUP) + head) * HEAD_DIM
                tl.store(out + out_offset[:, None] + dim[None, :], finish(state).to(out.dtype.element_ty), mask=stored)
            else:
                acc, peak, total = state
                cell = (partial * KV_HEADS + kv_head) * BLOCK_M + tl.arange(0, BLOCK_M)
                tl.store(partial_acc + cell[:, None] * BLOCK_D + dim[None, :], acc)
                tl.store(partial_peak + cell, peak)
                tl.store(partial_total + cell, total)


@triton.jit
def merge_kernel(
    out,
    partial_acc,
    partial_peak,
    partial_total,
    merges,
    counts,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr,
    PIECES: tl.constexpr,
):
    """Fold the pieces of a tile (axis 0) in their order, for a key/value head (axis 1) and ``ROWS`` query vectors (axis 2).

    ``PIECES`` at a time: loads of one round are in flight together.
    """
    if tl.program_id(0) < tl.load(counts + 1):
        merge = merges + tl.program_id(0) * MERGE_FIELDS
        kv_head = tl.program_id(1).to(tl.int64)
        in_tile = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
        packed = tl.load(merge + 2) + in_tile
        row = packed // GROUP
        exists = row < tl.load(merge + 1)
        dim = tl.arange(0, BLOCK_D)
        first_cell = (tl.load(merge + 3) * KV_HEADS + kv_head) * BLOCK_M + in_tile
        num_pieces = tl.load(merge + 4)
        state = start(ROWS, BLOCK_D)
        for first in range(0, num_pieces, PIECES):
            piece = first + tl.arange(0, PIECES)
            cell = first_cell[None, :] + piece[:, None] * (KV_HEADS * BLOCK_M)
            held = (piece < num_pieces)[:, None] & exists[None, :]
            acc = tl.load(partial_acc + cell[:, :, None] * BLOCK_D + dim[None, None, :], mask=held[:, :, None], other=0.0)
            peak = tl.load(partial_peak + cell, mask=held, other=LOWEST)
            total = tl.load(partial_total + cell, mask=held, other=0.0)
            state = fold(state, gather(acc, peak, total))
        out_offset = ((tl.load(merge).to(tl.int64) + row) * (KV_HEADS * GROUP) + kv_head * GROUP + packed % GROUP) * HEAD_DIM
        stored = exists[:, None] & (dim < HEAD_DIM)[None, :]
        tl.store(out + out_offset[:, None] + dim[None, :], finish(state).to(out.dtype.element_ty), mask=stored)
