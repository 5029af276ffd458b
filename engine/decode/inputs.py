"""From a plan to the rows of a step: tokens, positions, page slots and the mask, all from device state.

Shape suffixes: N requests of the step, R rows, B branches at most.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from engine.decode.calibration import SurvivalTable
from engine.decode.layout import StepLayout, build_layout
from engine.decode.verify import rank_branches
from engine.input_batch import InputBatch, SamplingNeeds
from engine.step import IntArray, StepPlan, spread
from engine.upload import upload
from kernels.mask_layout import CLEAN
from kernels.paged_attention.metadata import AttentionMetadata


@dataclass(frozen=True, slots=True)
class StepBounds:
    """What the host says of a step to the device, [N] each: the requests' slots, and the bounds of their plans."""

    slot_N: Tensor
    num_drafts_N: Tensor
    num_branches_N: Tensor

    @staticmethod
    def of(columns_3N: Tensor) -> StepBounds:
        """Views of the rows of one tensor."""
        return StepBounds(*columns_3N.unbind(0))


def bounds_of(plan: StepPlan) -> IntArray:
    """The columns of ``StepBounds``, [3, N], on the host."""
    return np.stack((plan.slots, plan.num_drafts, plan.num_branches))


@dataclass(frozen=True, slots=True)
class StepInputs:
    """One laid-out step. ``draft_rows`` are those that a checkpoint's draft adapter is for: all rows of exact branches.

    The runner reads the first group of fields. The judge reads the second, and of the first the layout, the positions and the
    prefix lengths.
    """

    layout: StepLayout
    token_ids_R: Tensor
    positions_R: Tensor
    slot_mapping_R: Tensor
    attention: AttentionMetadata
    draft_rows: Tensor

    slot_N: Tensor
    num_drafts_N: Tensor
    most_branches_N: Tensor
    order_NB: Tensor
    needs: SamplingNeeds
    has_diffusion: bool


class RowBuilder:
    """Lays plans out over the state of the running requests, which it does not change."""

    def __init__(self, batch: InputBatch, survival: SurvivalTable, page_size: int, mask_token_id: int | None) -> None:
        self.batch, self.survival, self.page_size, self.mask_token_id = batch, survival, page_size, mask_token_id

    def lay_out(self, plan: StepPlan, first_masks: bool) -> StepInputs:
        """Turn a plan into rows, with what the device knows: drafts held, branches worth running, positions.

        ``first_masks``: the logits of mask 0 are wanted, whoever is in the step.
        """
        host, device = self.batch.host, self.batch.device
        has_diffusion = host.has_diffusion(plan.slots)
        layout = build_layout(plan.shapes, first_masks or has_diffusion, device)
        bounds = StepBounds.of(upload(bounds_of(plan), device))
        prefill = upload(plan.prefill_token_ids, device)
        max_prefix = tuple(plan.max_computed.tolist())
        inputs = self.rows(layout, bounds, prefill, max_prefix, host.needs(plan.slots), has_diffusion)
        return replace(inputs, draft_rows=self._exact_draft_rows(plan, layout)) if has_diffusion else inputs

    def rows(
        self,
        layout: StepLayout,
        bounds: StepBounds,
        prefill_token_ids: Tensor,
        max_prefix: tuple[int, ...],
        needs: SamplingNeeds,
        has_diffusion: bool = False,
    ) -> StepInputs:
        """The rows of a layout for these requests: device operations alone, so that they can be captured."""
        batch, slot_N = self.batch, bounds.slot_N
        computed_N = batch.num_computed_S[slot_N]
        num_drafts_N = self._num_drafts(bounds)
        order_NB = self._choose_branches(layout, bounds, num_drafts_N)
        limit_R, branch_R, offset_R = _mask_data(layout, order_NB)
        # Where no branch is run an anchor would stand before the first token.
        positions_R = (computed_N[layout.request_R] + offset_R).clamp(min=0)
        block_table_NP = batch.block_table_SP[slot_N]
        return StepInputs(
            layout=layout,
            token_ids_R=self._token_ids(prefill_token_ids, layout, slot_N, order_NB),
            positions_R=positions_R,
            slot_mapping_R=self._slot_mapping(layout, positions_R, block_table_NP, num_drafts_N),
            attention=AttentionMetadata(
                row_starts=layout.row_starts,
                device_row_starts=layout.device_row_starts,
                prefix_lengths=computed_N,
                max_prefix=max_prefix,
                block_table=block_table_NP,
                limit=limit_R,
                branch=branch_R,
            ),
            draft_rows=layout.draft_rows,
            slot_N=slot_N,
            num_drafts_N=num_drafts_N,
            most_branches_N=bounds.num_branches_N,
            order_NB=order_NB,
            needs=needs,
            has_diffusion=has_diffusion,
        )

    def _exact_draft_rows(self, plan: StepPlan, layout: StepLayout) -> Tensor:
        """All rows of branches but those of diffusion requests. The host knows whose are whose; a mask would wait for it."""
        counts_N = plan.num_mask_rows * ~self.batch.host.is_diffusion_S[plan.slots]
        return upload(spread(np.array(layout.row_starts[1:]) - counts_N, counts_N), self.batch.device)

    def _num_drafts(self, bounds: StepBounds) -> Tensor:
        """Drafts that each request really runs.

        Those of a diffusion request have been emitted, so all of them are, unless nothing more is wanted: then its last block
        may reach beyond its end, where it has no pages.
        """
        slot_N = bounds.slot_N
        held_N, wanted_N = self.batch.num_held_S[slot_N], self.batch.wanted_S[slot_N]
        is_going_on_N = self.batch.is_diffusion_S[slot_N] & (wanted_N > 0)
        useful_N = torch.where(is_going_on_N, held_N, torch.minimum(held_N, wanted_N))
        return torch.minimum(useful_N, bounds.num_drafts_N)

    def _choose_branches(self, layout: StepLayout, bounds: StepBounds, num_drafts_N: Tensor) -> Tensor:
        """The branches to run, by rank, [N, B]; the same rule of usefulness as ``policy.num_useful_branches``.

        The one block of a diffusion request stands behind its last draft, or behind the prefix when it holds none.
        """
        slot_N, num_branches_N = bounds.slot_N, bounds.num_branches_N
        if layout.max_branches == 0 or layout.max_drafts == 0:
            return slot_N.new_full((len(slot_N), layout.max_branches), -1)
        useful_N = torch.minimum(num_drafts_N, self.batch.wanted_S[slot_N] - 2)
        probs_ND = self.survival.calibrate(self.batch.draft_probs_SK[slot_N, : layout.max_drafts])
        order = rank_branches(probs_ND, num_drafts_N, useful_N, num_branches_N, layout.max_branches)
        rank = torch.arange(layout.max_branches, device=order.device)
        order = order.masked_fill(rank >= num_branches_N[:, None], -1)
        return torch.where(self.batch.is_diffusion_S[slot_N][:, None], num_drafts_N[:, None] - 1, order)

    def _token_ids(self, prefill: Tensor, layout: StepLayout, slot_N: Tensor, order_NB: Tensor) -> Tensor:
        batch = self.batch
        token_ids_R = torch.full((layout.num_rows,), self.mask_token_id or 0, device=batch.device)
        if len(layout.draft_rows):
            token_ids_R[layout.draft_rows] = self._block_token_ids(layout, slot_N, order_NB)
        if len(layout.verify_rows_D):
            drafts_D = batch.drafts_SK[slot_N[layout.verify_request_D], layout.verify_index_D]
            token_ids_R[layout.verify_rows_D] = drafts_D
        if len(layout.prefill_rows):
            token_ids_R[layout.prefill_rows] = prefill
        return token_ids_R

    def _block_token_ids(self, layout: StepLayout, slot_N: Tensor, order_NB: Tensor) -> Tensor:
        """Masks; before them the draft that an anchor copies, and in a diffusion block what is decided."""
        rows = layout.draft_rows
        request, in_block = layout.request_R[rows], layout.in_block_R[rows]
        slot, branch = slot_N[request], order_NB[request, layout.rank_R[rows]]
        mask = torch.full_like(slot, self.mask_token_id or 0)
        number = in_block.clamp(min=0)
        block = torch.where(self.batch.is_decided_SK[slot, number], self.batch.block_SK[slot, number], mask)
        return torch.where(in_block < 0, self.batch.drafts_SK[slot, branch.clamp(min=0)], block)

    def _slot_mapping(self, layout: StepLayout, positions_R: Tensor, block_table_NP: Tensor, num_drafts_N: Tensor) -> Tensor:
        """Where K/V of a row is kept: clean rows in their final page slot, all others in the null page."""
        pages_R = block_table_NP[layout.request_R, positions_R // self.page_size]
        num_clean_N = layout.num_prefill_N + num_drafts_N
        kept_R = layout.clean_R & (layout.index_R < num_clean_N[layout.request_R])
        return (pages_R * self.page_size + positions_R % self.page_size) * kept_R


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
