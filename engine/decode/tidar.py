"""The draft-and-verify step (TiDAR, arXiv 2511.08923): how a plan becomes rows, and what its logits mean.

``ar``, ``linear`` and ``tidar`` are one code path with different draft plans. Shape suffixes: N requests of the step, R rows,
D drafts at most, B branches at most, K block length at most, Q rows with logits, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.decode.layout import StepLayout, build_layout
from engine.decode.sampling import probability_of, process_logits, row_sampling, sample
from engine.decode.verify import num_accepted, rank_branches
from engine.input_batch import InputBatch, SamplingNeeds
from engine.step import RequestResult, StepPlan, StepResult
from kernels.mask_layout import CLEAN
from kernels.paged_attention.metadata import AttentionMetadata


@dataclass(frozen=True, slots=True)
class StepInputs:
    """One laid-out step.

    The runner reads the first group of fields. The judge reads the second, and of the first the layout, the positions and the
    prefix lengths.
    """

    layout: StepLayout
    token_ids_R: Tensor
    positions_R: Tensor
    slot_mapping_R: Tensor
    attention: AttentionMetadata

    slot_N: Tensor
    num_drafts_N: Tensor
    order_NB: Tensor
    needs: SamplingNeeds


class PendingResult:
    """A judged step that the host has not read yet. ``read`` waits for the device."""

    def __init__(self, plan: StepPlan, packed: Tensor | None) -> None:
        self._plan, self._event = plan, None
        self._packed = packed
        if packed is not None and packed.is_cuda:
            self._packed = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
            self._packed.copy_(packed, non_blocking=True)
            self._event = torch.cuda.current_stream(packed.device).record_event()

    def read(self) -> StepResult:
        """The result as plain data."""
        if self._event is not None:
            self._event.synchronize()
        if self._packed is None:
            nothing = RequestResult((), 0, 1)
            return StepResult(self._plan.step_id, (nothing,) * len(self._plan.requests))
        rows = self._packed.tolist()
        results = tuple(RequestResult(tuple(row[3 : 3 + row[0]]), row[1], row[2]) for row in rows)
        return StepResult(self._plan.step_id, results)


class TidarDecoder:
    """Lays out plans and judges logits. It owns the device state of the running requests."""

    def __init__(self, batch: InputBatch, page_size: int, mask_token_id: int | None) -> None:
        self.batch, self.page_size, self.mask_token_id = batch, page_size, mask_token_id

    def lay_out(self, plan: StepPlan) -> StepInputs:
        """Turn a plan into rows, with what the device knows: drafts held, branches worth running, positions."""
        batch, device = self.batch, self.batch.device
        batch.update(plan.admissions, plan.page_updates)
        layout = build_layout(
            tuple(
                (len(r.prefill_token_ids), r.draft_plan.num_drafts, r.draft_plan.num_branches, r.draft_plan.block_length)
                for r in plan.requests
            ),
            device,
        )
        slot_N = torch.tensor([r.slot for r in plan.requests], device=device)
        computed_N = batch.num_computed_S[slot_N]
        wanted_N = batch.wanted_S[slot_N]
        num_drafts_N = torch.minimum(torch.minimum(batch.num_held_S[slot_N], wanted_N), layout.num_drafts_N)
        order_NB = self._choose_branches(layout, slot_N, num_drafts_N, wanted_N)
        limit_R, branch_R, offset_R = _mask_data(layout, order_NB)
        positions_R = computed_N[layout.request_R] + offset_R
        block_table_NP = batch.block_table_SP[slot_N]
        return StepInputs(
            layout=layout,
            token_ids_R=self._token_ids(plan, layout, slot_N),
            positions_R=positions_R,
            slot_mapping_R=self._slot_mapping(layout, positions_R, block_table_NP, num_drafts_N),
            attention=AttentionMetadata(
                row_starts=layout.row_starts,
                prefix_lengths=computed_N,
                max_prefix=tuple(r.max_computed for r in plan.requests),
                block_table=block_table_NP,
                limit=limit_R,
                branch=branch_R,
            ),
            slot_N=slot_N,
            num_drafts_N=num_drafts_N,
            order_NB=order_NB,
            needs=SamplingNeeds.of([batch.params[r.slot] for r in plan.requests]),
        )

    def _choose_branches(self, layout: StepLayout, slot_N: Tensor, num_drafts_N: Tensor, wanted_N: Tensor) -> Tensor:
        """The branches to run, by rank, [N, B]; the same rule of usefulness as ``policy.num_useful_branches``."""
        if layout.max_branches == 0:
            return slot_N.new_zeros((len(slot_N), 0))
        useful_N = torch.minimum(num_drafts_N, wanted_N - 2)
        probs_ND = self.batch.draft_probs_SK[slot_N, : layout.max_drafts]
        order = rank_branches(probs_ND, num_drafts_N, useful_N, layout.num_branches_N, layout.max_branches)
        rank = torch.arange(layout.max_branches, device=order.device)
        return order.masked_fill(rank >= layout.num_branches_N[:, None], -1)

    def _token_ids(self, plan: StepPlan, layout: StepLayout, slot_N: Tensor) -> Tensor:
        token_ids_R = torch.full((layout.num_rows,), self.mask_token_id or 0, device=self.batch.device)
        if len(layout.verify_rows_D):
            drafts_D = self.batch.drafts_SK[slot_N[layout.verify_request_D], layout.verify_index_D]
            token_ids_R[layout.verify_rows_D] = drafts_D
        if len(layout.prefill_rows):
            prefill = [token for r in plan.requests for token in r.prefill_token_ids]
            token_ids_R[layout.prefill_rows] = torch.tensor(prefill, device=self.batch.device)
        return token_ids_R

    def _slot_mapping(self, layout: StepLayout, positions_R: Tensor, block_table_NP: Tensor, num_drafts_N: Tensor) -> Tensor:
        """Where K/V of a row is kept: clean rows in their final page slot, all others in the null page."""
        pages_R = block_table_NP[layout.request_R, positions_R // self.page_size]
        num_clean_N = layout.num_prefill_N + num_drafts_N
        kept_R = layout.clean_R & (layout.index_R < num_clean_N[layout.request_R])
        return (pages_R * self.page_size + positions_R % self.page_size) * kept_R

    def judge(self, plan: StepPlan, inputs: StepInputs, logits_QV: Tensor | None) -> PendingResult:
        """Sample, accept, take the hit branch's drafts and write the next step's state; batch-wide, on the device."""
        layout, batch = inputs.layout, self.batch
        if logits_QV is None:
            batch.num_computed_S[inputs.slot_N] += layout.num_prefill_N
            return PendingResult(plan, None)
        num_verify = len(layout.verify_rows_D)
        sampled_ND = self._sample_verified(inputs, logits_QV[:num_verify])
        drafts_ND = batch.drafts_SK[inputs.slot_N, : layout.max_drafts]
        accepted_N = num_accepted(sampled_ND, drafts_ND, inputs.num_drafts_N)
        last_N = sampled_ND.gather(1, (accepted_N - 1).clamp(min=0)[:, None]).squeeze(1)
        drafting_N = inputs.num_drafts_N > 0
        next_computed_N = inputs.attention.prefix_lengths + layout.num_prefill_N + accepted_N
        batch.num_computed_S[inputs.slot_N] = next_computed_N
        batch.wanted_S[inputs.slot_N] -= accepted_N
        batch.drafts_SK[inputs.slot_N, 0] = torch.where(drafting_N, last_N, drafts_ND[:, 0])
        num_held_N = self._take_drafts(inputs, logits_QV, accepted_N, next_computed_N)
        # A prefill chunk leaves the one draft that its request was admitted with.
        batch.num_held_S[inputs.slot_N] = num_held_N
        counts = torch.stack((accepted_N, inputs.num_drafts_N, num_held_N), dim=1)
        return PendingResult(plan, torch.cat((counts, sampled_ND), dim=1))

    def _sample_verified(self, inputs: StepInputs, logits_DV: Tensor) -> Tensor:
        """``t[i]``, the token taken after draft ``i``, [N, D]; entries beyond a request's drafts are meaningless."""
        layout = inputs.layout
        rows = row_sampling(self.batch, inputs.slot_N[layout.verify_request_D], inputs.needs)
        processed = process_logits(logits_DV, rows, self.mask_token_id)
        tokens_D = sample(processed, rows, inputs.positions_R[layout.verify_rows_D] + 1)
        sampled_ND = tokens_D.new_zeros((len(inputs.slot_N), layout.max_drafts))
        sampled_ND[layout.verify_request_D, layout.verify_index_D] = tokens_D
        return sampled_ND

    def _take_drafts(self, inputs: StepInputs, logits_QV: Tensor, accepted_N: Tensor, next_computed_N: Tensor) -> Tensor:
        """Sample the masks of the branch that was hit into the drafts; return how many drafts each request now holds."""
        layout, batch = inputs.layout, self.batch
        width = layout.max_block - 1
        if layout.max_branches == 0 or width == 0:
            return torch.ones_like(accepted_N)
        is_hit_NB = (inputs.order_NB == (accepted_N - 1)[:, None]) & (accepted_N > 0)[:, None]
        rank_N = is_hit_NB.int().argmax(dim=1)
        places_NK = layout.masks_NBK[torch.arange(len(rank_N), device=rank_N.device), rank_N]
        slot_Q = inputs.slot_N.repeat_interleave(width)
        rows = row_sampling(batch, slot_Q, inputs.needs)
        processed = process_logits(logits_QV[places_NK.flatten()], rows, self.mask_token_id)
        index_K = torch.arange(1, width + 1, device=rank_N.device)
        # Mask j stands at the position of the token that it drafts, and takes that position's noise.
        tokens_Q = sample(processed, rows, (next_computed_N[:, None] + index_K).flatten())
        batch.drafts_SK[inputs.slot_N, 1 : width + 1] = tokens_Q.view(-1, width)
        batch.draft_probs_SK[inputs.slot_N, 1 : width + 1] = probability_of(processed, tokens_Q).view(-1, width)
        return torch.where(is_hit_NB.any(dim=1), layout.block_length_N, 1)


def _mask_data(layout: StepLayout, order_NB: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``(limit, branch, position offset)`` of every row; the offset counts from the request's computed tokens.

    A padding mask row keeps its rank as branch, so it sees its own block and nobody sees it.
    """
    if layout.max_branches == 0:
        return layout.index_R + 1, torch.full_like(layout.index_R, CLEAN), layout.index_R
    branch_number_R = order_NB[layout.request_R, layout.rank_R]
    mask_limit_R = layout.num_prefill_N[layout.request_R] + branch_number_R + 1
    limit_R = torch.where(layout.clean_R, layout.index_R + 1, mask_limit_R)
    branch_R = torch.where(layout.clean_R, CLEAN, layout.rank_R)
    offset_R = torch.where(layout.clean_R, layout.index_R, mask_limit_R + layout.in_block_R)
    return limit_R, branch_R, offset_R
