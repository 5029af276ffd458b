"""From the bounds of a plan to the rows of a step: tokens, positions, page slots and the mask, all from device state.

Shape suffixes as in ``kernels.step_rows.metadata``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.decode_state import DecodeState
from kernels.mask_layout import CLEAN
from kernels.step_rows.metadata import StepLayout, StepRows
from kernels.survival.reference import calibrate, rank_branches


def lay_out(
    state: DecodeState, layout: StepLayout, bounds_3N: Tensor, prefill_token_ids: Tensor, page_size: int, mask_token_id: int
) -> StepRows:
    """The rows of a layout. ``bounds_3N``: the slots of its requests, and the bounds of their drafts and branches.

    What a request really uses is state: the drafts that it holds, the branches that are worth running, its position. The rest
    of its rows is padding, which is kept nowhere and seen by no other row.
    """
    slot_N, drafts_bound_N, branches_bound_N = bounds_3N.unbind(0)
    computed_N, block_table_NP = state.num_computed_S[slot_N], state.block_table_SP[slot_N]
    num_drafts_N = _num_drafts(state, slot_N, drafts_bound_N)
    order_NB = _choose_branches(state, layout, slot_N, num_drafts_N, branches_bound_N)
    limit_R, branch_R, offset_R = _mask_data(layout, order_NB)
    # Where no branch is run an anchor would stand before the first token.
    positions_R = (computed_N[layout.request_R] + offset_R).clamp(min=0)
    return StepRows(
        token_ids_R=_token_ids(state, layout, slot_N, order_NB, prefill_token_ids, mask_token_id),
        positions_R=positions_R,
        slot_mapping_R=_slot_mapping(layout, positions_R, block_table_NP, num_drafts_N, page_size),
        limit_R=limit_R,
        branch_R=branch_R,
        prefix_lengths_N=computed_N,
        block_table_NP=block_table_NP,
        num_drafts_N=num_drafts_N,
        order_NB=order_NB,
        verify_slot_D=slot_N[layout.verify_request_D],
        verify_position_D=positions_R[layout.verify_rows_D] + 1,
    )


def _num_drafts(state: DecodeState, slot_N: Tensor, bound_N: Tensor) -> Tensor:
    """Drafts that each request really runs.

    Those of a diffusion request have been emitted, so all of them are, unless nothing more is wanted: then its last block
    may reach beyond its end, where it has no pages.
    """
    held_N, wanted_N = state.num_held_S[slot_N], state.wanted_S[slot_N]
    is_going_on_N = state.is_diffusion_S[slot_N] & (wanted_N > 0)
    useful_N = torch.where(is_going_on_N, held_N, torch.minimum(held_N, wanted_N))
    return torch.minimum(useful_N, bound_N)


def _choose_branches(
    state: DecodeState, layout: StepLayout, slot_N: Tensor, num_drafts_N: Tensor, num_branches_N: Tensor
) -> Tensor:
    """The branches to run, by rank, [N, B]; the same rule of usefulness as ``policy.num_useful_branches``.

    The one block of a diffusion request stands behind its last draft, or behind the prefix when it holds none.
    """
    if layout.max_branches == 0 or layout.max_drafts == 0:
        return slot_N.new_full((len(slot_N), layout.max_branches), -1)
    useful_N = torch.minimum(num_drafts_N, state.wanted_S[slot_N] - 2)
    chance_ND = calibrate(state.draft_probs_SK[slot_N, : layout.max_drafts], state.tried, state.accepted)
    order_NB = rank_branches(chance_ND, num_drafts_N, useful_N, num_branches_N, layout.max_branches)
    return torch.where(state.is_diffusion_S[slot_N][:, None], num_drafts_N[:, None] - 1, order_NB)


def _mask_data(layout: StepLayout, order_NB: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``(limit, branch, position offset)`` of every row; the offset counts from the request's computed tokens.

    A padding mask row keeps its rank as branch, so it sees its own block and nobody sees it. Behind an anchor, the copy of a
    draft takes the place of its clean row.
    """
    if layout.max_branches == 0:
        return layout.index_R + 1, torch.full_like(layout.index_R, CLEAN), layout.index_R
    branch_number_R = order_NB[layout.request_R, layout.rank_R]
    after_draft_R = layout.num_prefill_N[layout.request_R] + branch_number_R + 1
    limit_R = torch.where(layout.clean_R, layout.index_R + 1, after_draft_R - layout.has_anchor_N[layout.request_R])
    branch_R = torch.where(layout.clean_R, CLEAN, layout.rank_R)
    offset_R = torch.where(layout.clean_R, layout.index_R, after_draft_R + layout.in_block_R)
    return limit_R, branch_R, offset_R


def _token_ids(
    state: DecodeState, layout: StepLayout, slot_N: Tensor, order_NB: Tensor, prefill_token_ids: Tensor, mask_token_id: int
) -> Tensor:
    token_ids_R = torch.full((layout.num_rows,), mask_token_id, device=slot_N.device)
    if len(layout.draft_rows):
        token_ids_R[layout.draft_rows] = _block_token_ids(state, layout, slot_N, order_NB, mask_token_id)
    if len(layout.verify_rows_D):
        drafts_D = state.drafts_SK[slot_N[layout.verify_request_D], layout.verify_index_D]
        token_ids_R[layout.verify_rows_D] = drafts_D
    if len(layout.prefill_rows):
        token_ids_R[layout.prefill_rows] = prefill_token_ids
    return token_ids_R


def _block_token_ids(state: DecodeState, layout: StepLayout, slot_N: Tensor, order_NB: Tensor, mask_token_id: int) -> Tensor:
    """Masks; before them the draft that an anchor copies, and in a diffusion block what is decided."""
    rows = layout.draft_rows
    request, in_block = layout.request_R[rows], layout.in_block_R[rows]
    slot, branch = slot_N[request], order_NB[request, layout.rank_R[rows]]
    mask = torch.full_like(slot, mask_token_id)
    number = in_block.clamp(min=0)
    block = torch.where(state.is_decided_SK[slot, number], state.block_SK[slot, number], mask)
    return torch.where(in_block < 0, state.drafts_SK[slot, branch.clamp(min=0)], block)


def _slot_mapping(
    layout: StepLayout, positions_R: Tensor, block_table_NP: Tensor, num_drafts_N: Tensor, page_size: int
) -> Tensor:
    pages_R = block_table_NP[layout.request_R, positions_R // page_size]
    num_clean_N = layout.num_prefill_N + num_drafts_N
    kept_R = layout.clean_R & (layout.index_R < num_clean_N[layout.request_R])
    return (pages_R * page_size + positions_R % page_size) * kept_R
