"""All rows of a step in one launch: the same contract as ``kernels.step_rows.reference``, and the same numbers.

It is little work, but as some eighty operations on a few integers it would take as long as several layers do. A program takes
``ROWS`` rows of one request; what it has to know of the request, how many drafts and which branches are run, each of the
request's programs finds out anew. Numbers of requests, rows and branches are no part of what is compiled: a server does that
once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.decode_state import DecodeState
from kernels.mask_layout import CLEAN
from kernels.step_rows.metadata import REQUEST_FIELDS, StepLayout, StepRows
from kernels.survival.triton import rank_of_branches

_CLEAN = tl.constexpr(CLEAN)
_FIELDS = tl.constexpr(REQUEST_FIELDS)
_ROWS, _PAGES = 128, 1024
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def _number_of(rank, ranks, COLUMNS: tl.constexpr):
    """The branch that has each rank, -1 where none is run; ``ranks`` are those of the branches."""
    branch = tl.arange(0, COLUMNS)[None, :]
    return tl.max(tl.where(ranks[None, :] == rank[:, None], branch, -1), 1)


@triton.jit
def _request(state, slot, n, bounds, num_requests, draft_stride, max_branches, COLUMNS: tl.constexpr):
    """``(drafts that are run, rank of each branch, number of a diffusion block or -2)`` of request ``n``."""
    held = tl.load(state.num_held_S + slot)
    wanted = tl.load(state.wanted_S + slot)
    is_diffusion = tl.load(state.is_diffusion_S + slot)
    useful = tl.where(is_diffusion & (wanted > 0), held, tl.minimum(held, wanted))
    num_drafts = tl.minimum(useful, tl.load(bounds + num_requests + n)).to(tl.int32)
    ranks = tl.full([COLUMNS], COLUMNS, tl.int32)
    if max_branches > 0:
        num_useful = tl.minimum(num_drafts, wanted.to(tl.int32) - 2)
        num_branches = tl.load(bounds + 2 * num_requests + n).to(tl.int32)
        probs = state.draft_probs_SK + slot * draft_stride
        ranks = rank_of_branches(state, probs, num_drafts, num_useful, num_branches, COLUMNS)
    return num_drafts, ranks, tl.where(is_diffusion, num_drafts - 1, -2)


@triton.jit(do_not_specialize=["num_requests", "max_branches", "max_pages", "draft_stride", "page_size", "mask_token_id"])
def _lay_out_kernel(
    rows,
    state,
    requests,
    bounds,
    prefill_token_ids,
    num_requests,
    max_branches,
    max_pages,
    draft_stride,
    page_size,
    mask_token_id,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    PAGES: tl.constexpr,
):
    """Program axis 0 is the request, axis 1 a part of its rows. ``COLUMNS``: drafts a request may hold, as a power of two."""
    n = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    slot = tl.load(bounds + n)
    computed = tl.load(state.num_computed_S + slot)
    pages = state.block_table_SP + slot * max_pages
    drafts = state.drafts_SK + slot * draft_stride
    num_drafts, ranks, block_number = _request(state, slot, n, bounds, num_requests, draft_stride, max_branches, COLUMNS)
    if part == 0:
        tl.store(rows.prefix_lengths_N + n, computed)
        tl.store(rows.num_drafts_N + n, num_drafts)
        rank = tl.arange(0, COLUMNS)
        number = tl.where(block_number > -2, block_number, _number_of(rank, ranks, COLUMNS))
        tl.store(rows.order_NB + n * max_branches + rank, number, mask=rank < max_branches)
    for first in range(part * PAGES, max_pages, tl.num_programs(1) * PAGES):
        page = first + tl.arange(0, PAGES)
        exists = page < max_pages
        tl.store(rows.block_table_NP + n * max_pages + page, tl.load(pages + page, mask=exists, other=0), mask=exists)

    fields = requests + n * _FIELDS
    first_row = tl.load(fields)
    num_rows = tl.load(fields + 1).to(tl.int32)
    num_prefill = tl.load(fields + 4).to(tl.int32)
    num_clean = num_prefill + tl.load(fields + 5).to(tl.int32)
    block_length = tl.load(fields + 6).to(tl.int32)
    has_anchor = tl.load(fields + 7).to(tl.int32)

    index = part * ROWS + tl.arange(0, ROWS)
    exists = index < num_rows
    row = first_row + index
    clean = index < num_clean
    in_branches = tl.maximum(index - num_clean, 0)
    rank = in_branches // (block_length + has_anchor)
    in_block = in_branches % (block_length + has_anchor) - has_anchor
    number = tl.where(block_number > -2, block_number, _number_of(rank, ranks, COLUMNS))
    after_draft = num_prefill + number + 1
    tl.store(rows.limit_R + row, tl.where(clean, index + 1, after_draft - has_anchor), mask=exists)
    tl.store(rows.branch_R + row, tl.where(clean, _CLEAN, rank), mask=exists)
    # Where no branch is run an anchor would stand before the first token.
    position = tl.maximum(computed + tl.where(clean, index, after_draft + in_block), 0)
    tl.store(rows.positions_R + row, position, mask=exists)
    kept = clean & (index < num_prefill + num_drafts)
    page = tl.load(pages + position // page_size, mask=exists & kept, other=0)
    tl.store(rows.slot_mapping_R + row, tl.where(kept, page * page_size + position % page_size, 0), mask=exists)

    # Prompt tokens, then drafts; masks, before them the draft that an anchor copies, and in a diffusion block what is decided.
    is_prefill = index < num_prefill
    verifies = clean & (index >= num_prefill)
    is_mask = (index >= num_clean) & (in_block >= 0)
    prefill = tl.load(prefill_token_ids + tl.load(fields + 2) + index, mask=exists & is_prefill, other=0)
    draft_number = tl.where(clean, index - num_prefill, tl.maximum(number, 0))
    draft = tl.load(drafts + draft_number, mask=exists & ~is_prefill & ~is_mask, other=0)
    decided = tl.load(state.is_decided_SK + slot * draft_stride + in_block, mask=exists & is_mask, other=0) != 0
    block = tl.load(state.block_SK + slot * draft_stride + in_block, mask=exists & is_mask & decided, other=0)
    token = tl.where(is_prefill, prefill, tl.where(is_mask, tl.where(decided, block, mask_token_id), draft))
    tl.store(rows.token_ids_R + row, token, mask=exists)

    place = tl.load(fields + 3) + index - num_prefill
    tl.store(rows.verify_slot_D + place, tl.zeros([ROWS], tl.int64) + slot, mask=exists & verifies)
    tl.store(rows.verify_position_D + place, position + 1, mask=exists & verifies)


def lay_out(
    state: DecodeState, layout: StepLayout, bounds_3N: Tensor, prefill_token_ids: Tensor, page_size: int, mask_token_id: int
) -> StepRows:
    """The rows of a layout for the requests in these slots, within these bounds of their drafts and branches."""
    num_requests, max_branches, device = bounds_3N.shape[1], layout.max_branches, bounds_3N.device
    (_, max_drafts), (_, max_pages) = state.drafts_SK.shape, state.block_table_SP.shape
    columns = triton.next_power_of_2(max_drafts)
    assert all(t.is_contiguous() for t in (*state, bounds_3N, prefill_token_ids, layout.requests_N8))
    assert max(layout.max_drafts, max_branches, layout.max_block) <= max_drafts

    def integers(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.long, device=device)

    num_rows, num_verifying = layout.num_rows, len(layout.verify_rows_D)
    rows = StepRows(
        token_ids_R=integers(num_rows),
        positions_R=integers(num_rows),
        slot_mapping_R=integers(num_rows),
        limit_R=integers(num_rows),
        branch_R=integers(num_rows),
        prefix_lengths_N=integers(num_requests),
        block_table_NP=integers(num_requests, max_pages),
        num_drafts_N=integers(num_requests),
        order_NB=integers(num_requests, max_branches),
        verify_slot_D=integers(num_verifying),
        verify_position_D=integers(num_verifying),
    )
    _lay_out_kernel[(num_requests, max(triton.cdiv(layout.most_rows, _ROWS), 1))](
        rows,
        state,
        layout.requests_N8,
        bounds_3N,
        prefill_token_ids,
        num_requests,
        max_branches,
        max_pages,
        max_drafts,
        page_size,
        mask_token_id,
        COLUMNS=columns,
        ROWS=_ROWS,
        PAGES=_PAGES,
        **_OPTIONS,
    )
    return rows
