"""The draft-and-verify step (TiDAR, arXiv 2511.08923): how a plan becomes rows, and what its logits mean.

``ar``, ``linear`` and ``tidar`` are one code path with different draft plans; ``diffusion`` shares their rows and is judged
beside them. Shape suffixes: N requests of the step, R rows, D drafts at most, B branches at most, K block length at most, Q
rows with logits, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.decode import diffusion
from engine.decode.calibration import SurvivalTable
from engine.decode.constrain import DraftWalk, GrammarTable
from engine.decode.layout import RequestShape, StepLayout, build_layout
from engine.decode.logprobs import Logprobs, raw_logprobs
from engine.decode.pending import PendingResult
from engine.decode.sampling import Ahead, GrammarRows, probability_of, process_logits, row_sampling, sample
from engine.decode.verify import num_accepted, rank_branches
from engine.input_batch import InputBatch, SamplingNeeds
from engine.sampling_params import DecodingMode
from engine.step import StepPlan
from kernels.mask_layout import CLEAN
from kernels.paged_attention.metadata import AttentionMetadata


@dataclass(frozen=True, slots=True)
class DecoderSettings:
    """What is the same for all requests of a server.

    ``trust_ar``: the paper's beta, the weight of the autoregressive logits where a branch's first mask reads the same
    position; below 1 the ``tidar`` mode is lossy. ``draft_temperature``: None drafts at each request's own temperature, 0
    drafts the likeliest token. ``diffusion_threshold``: the probability from which the ``diffusion`` mode decides a token.
    """

    trust_ar: float = 1.0
    draft_temperature: float | None = None
    diffusion_threshold: float = 0.9


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
    has_diffusion: bool


class TidarDecoder:
    """Lays out plans and judges logits. It owns the device state of the running requests."""

    def __init__(
        self, batch: InputBatch, page_size: int, mask_token_id: int | None, settings: DecoderSettings | None = None
    ) -> None:
        self.batch, self.page_size, self.mask_token_id = batch, page_size, mask_token_id
        self.settings = settings or DecoderSettings()
        self.grammars = GrammarTable(batch.drafts_SK.shape[1], batch.vocab_size, batch.device)
        self.survival = SurvivalTable(batch.device)

    # -- lay out -------------------------------------------------------------------------------------------------------

    def lay_out(self, plan: StepPlan) -> StepInputs:
        """Turn a plan into rows, with what the device knows: drafts held, branches worth running, positions."""
        batch, device = self.batch, self.batch.device
        batch.update(plan.admissions, plan.page_updates)
        for admission in plan.admissions:
            self.grammars.admit(admission)
        has_diffusion = any(batch.modes[r.slot] is DecodingMode.DIFFUSION for r in plan.requests)
        first_masks = has_diffusion or self.settings.trust_ar < 1.0
        layout = build_layout(tuple(RequestShape.of(r) for r in plan.requests), first_masks, device)
        slot_N = torch.tensor([r.slot for r in plan.requests], device=device)
        computed_N = batch.num_computed_S[slot_N]
        num_drafts_N = self._num_drafts(layout, slot_N)
        order_NB = self._choose_branches(layout, slot_N, num_drafts_N)
        limit_R, branch_R, offset_R = _mask_data(layout, order_NB)
        # Where no branch is run an anchor would stand before the first token.
        positions_R = (computed_N[layout.request_R] + offset_R).clamp(min=0)
        block_table_NP = batch.block_table_SP[slot_N]
        return StepInputs(
            layout=layout,
            token_ids_R=self._token_ids(plan, layout, slot_N, order_NB),
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
            has_diffusion=has_diffusion,
        )

    def _num_drafts(self, layout: StepLayout, slot_N: Tensor) -> Tensor:
        """Drafts that each request really runs. Those of a diffusion request have been emitted, so all of them are."""
        held_N, wanted_N = self.batch.num_held_S[slot_N], self.batch.wanted_S[slot_N]
        useful_N = torch.where(self.batch.is_diffusion_S[slot_N], held_N, torch.minimum(held_N, wanted_N))
        return torch.minimum(useful_N, layout.num_drafts_N)

    def _choose_branches(self, layout: StepLayout, slot_N: Tensor, num_drafts_N: Tensor) -> Tensor:
        """The branches to run, by rank, [N, B]; the same rule of usefulness as ``policy.num_useful_branches``.

        The one block of a diffusion request stands behind its last draft, or behind the prefix when it holds none.
        """
        if layout.max_branches == 0 or layout.max_drafts == 0:
            return slot_N.new_full((len(slot_N), layout.max_branches), -1)
        useful_N = torch.minimum(num_drafts_N, self.batch.wanted_S[slot_N] - 2)
        probs_ND = self.survival.calibrate(self.batch.draft_probs_SK[slot_N, : layout.max_drafts])
        order = rank_branches(probs_ND, num_drafts_N, useful_N, layout.num_branches_N, layout.max_branches)
        rank = torch.arange(layout.max_branches, device=order.device)
        order = order.masked_fill(rank >= layout.num_branches_N[:, None], -1)
        return torch.where(self.batch.is_diffusion_S[slot_N][:, None], num_drafts_N[:, None] - 1, order)

    def _token_ids(self, plan: StepPlan, layout: StepLayout, slot_N: Tensor, order_NB: Tensor) -> Tensor:
        batch = self.batch
        token_ids_R = torch.full((layout.num_rows,), self.mask_token_id or 0, device=batch.device)
        if len(layout.draft_rows):
            token_ids_R[layout.draft_rows] = self._block_token_ids(layout, slot_N, order_NB)
        if len(layout.verify_rows_D):
            drafts_D = batch.drafts_SK[slot_N[layout.verify_request_D], layout.verify_index_D]
            token_ids_R[layout.verify_rows_D] = drafts_D
        if len(layout.prefill_rows):
            prefill = [token for r in plan.requests for token in r.prefill_token_ids]
            token_ids_R[layout.prefill_rows] = torch.tensor(prefill, device=batch.device)
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

    # -- judge ---------------------------------------------------------------------------------------------------------

    def judge(self, plan: StepPlan, inputs: StepInputs, logits_QV: Tensor | None) -> PendingResult:
        """Sample, accept, take the hit branch's drafts and write the next step's state; batch-wide, on the device."""
        layout, batch, slot_N = inputs.layout, self.batch, inputs.slot_N
        if logits_QV is None:
            batch.num_computed_S[slot_N] += layout.num_prefill_N
            return PendingResult(plan, None)
        constrained = self.grammars.constrained(plan)
        sampled_ND = self._sample_verified(inputs, logits_QV, self.grammars.verify_rows(plan, layout, constrained))
        drafts_ND = batch.drafts_SK[slot_N, : layout.max_drafts]
        accepted_N = num_accepted(sampled_ND, drafts_ND, inputs.num_drafts_N)
        is_diffusion_N = batch.is_diffusion_S[slot_N]
        if inputs.has_diffusion:
            accepted_N = torch.where(is_diffusion_N, inputs.num_drafts_N, accepted_N)
        elif layout.max_drafts > 1:
            self.survival.observe(batch.draft_probs_SK[slot_N, : layout.max_drafts], inputs.num_drafts_N, accepted_N)
        next_computed_N = inputs.attention.prefix_lengths + layout.num_prefill_N + accepted_N
        batch.num_computed_S[slot_N] = next_computed_N
        emitted_N, tokens_NK, num_verified_N = accepted_N, sampled_ND, inputs.num_drafts_N
        if inputs.has_diffusion:
            # A diffusion request's drafts were emitted before; what it emits is the block that this step completes.
            block = self._decide(inputs, logits_QV)
            emitted_N = torch.where(is_diffusion_N, block.num_emitted_N, accepted_N)
            tokens_NK = _beside(is_diffusion_N, block.tokens_NK, sampled_ND)
            num_verified_N = inputs.num_drafts_N.masked_fill(is_diffusion_N, 0)
        batch.wanted_S[slot_N] -= emitted_N
        if inputs.needs.penalties:
            assert batch.counts is not None
            batch.counts.add(slot_N, tokens_NK, emitted_N)
        num_held_N = self._hold(inputs, logits_QV, sampled_ND, accepted_N, next_computed_N)
        if inputs.has_diffusion:
            num_held_N = torch.where(is_diffusion_N, block.num_held_N, num_held_N)
            batch.drafts_SK[slot_N] = torch.where(is_diffusion_N[:, None], block.drafts_NK, batch.drafts_SK[slot_N])
        # A prefill chunk leaves the one draft that its request was admitted with.
        batch.num_held_S[slot_N] = num_held_N
        if constrained:
            self._constrain(plan, inputs, logits_QV, constrained, torch.stack((emitted_N, num_held_N), dim=1), sampled_ND)
        counts = torch.stack((emitted_N, num_verified_N, num_held_N, accepted_N), dim=1)
        return PendingResult(
            plan,
            torch.cat((counts, tokens_NK), dim=1),
            self._logprobs(plan, inputs, logits_QV, sampled_ND),
            self._prompt_logprobs(plan, inputs, logits_QV),
            tuple(self.grammars.error(r.slot) for r in plan.requests),
        )

    def _sample_verified(self, inputs: StepInputs, logits_QV: Tensor, grammar: GrammarRows | None) -> Tensor:
        """``t[i]``, the token taken after draft ``i``, [N, D]; entries beyond a request's drafts are meaningless."""
        layout = inputs.layout
        sampled_ND = logits_QV.new_zeros((len(inputs.slot_N), layout.max_drafts), dtype=torch.long)
        if layout.max_drafts == 0:
            return sampled_ND
        slot_D = inputs.slot_N[layout.verify_request_D]
        # Row i is processed as if drafts 1..i had been emitted; draft 0 has been.
        ahead = Ahead(layout.verify_index_D, self.batch.drafts_SK[slot_D, 1 : layout.max_drafts])
        rows = row_sampling(self.batch, slot_D, inputs.needs, ahead, grammar)
        logits_DV = logits_QV[: len(layout.verify_rows_D)]
        if self.settings.trust_ar < 1.0 and layout.max_branches:
            logits_DV = self._mix(inputs, logits_QV, logits_DV)
        processed = process_logits(logits_DV, rows, self.mask_token_id)
        tokens_D = sample(processed, rows, inputs.positions_R[layout.verify_rows_D] + 1)
        sampled_ND[layout.verify_request_D, layout.verify_index_D] = tokens_D
        return sampled_ND

    def _mix(self, inputs: StepInputs, logits_QV: Tensor, logits_DV: Tensor) -> Tensor:
        """The paper's Trust Diff: both readings of the position after draft ``i``, where branch ``i`` was run.

        A weighted sum of logits, so what is sampled is the normalised geometric mean of the two distributions.
        """
        layout, beta = inputs.layout, self.settings.trust_ar
        is_branch_DB = inputs.order_NB[layout.verify_request_D] == layout.verify_index_D[:, None]
        is_mixed_D = is_branch_DB.any(dim=1) & self.batch.is_tidar_S[inputs.slot_N[layout.verify_request_D]]
        place_D = layout.masks_NBK[layout.verify_request_D, is_branch_DB.int().argmax(dim=1), 0]
        mixed_DV = beta * logits_DV + (1.0 - beta) * logits_QV[place_D]
        return torch.where(is_mixed_D[:, None], mixed_DV, logits_DV)

    def _hold(
        self, inputs: StepInputs, logits_QV: Tensor, sampled_ND: Tensor, accepted_N: Tensor, next_computed_N: Tensor
    ) -> Tensor:
        """Write the drafts of the next step; return how many each request now holds."""
        layout, batch = inputs.layout, self.batch
        if layout.max_drafts:
            last_N = sampled_ND.gather(1, (accepted_N - 1).clamp(min=0)[:, None]).squeeze(1)
            drafts_N = batch.drafts_SK[inputs.slot_N, 0]
            batch.drafts_SK[inputs.slot_N, 0] = torch.where(inputs.num_drafts_N > 0, last_N, drafts_N)
        width = layout.max_block - 1
        if layout.max_branches == 0 or width == 0:
            return torch.ones_like(accepted_N)
        is_hit_NB = (inputs.order_NB == (accepted_N - 1)[:, None]) & (accepted_N > 0)[:, None]
        rank_N = is_hit_NB.int().argmax(dim=1)
        places_NK = layout.masks_NBK[torch.arange(len(rank_N), device=rank_N.device), rank_N, 1:]
        # Mask j stands at the position of the token that it drafts, and takes that position's noise.
        number_K = torch.arange(1, width + 1, device=rank_N.device)
        tokens_Q, probs_Q = self._draw_drafts(
            inputs.needs,
            logits_QV[places_NK.flatten()],
            inputs.slot_N.repeat_interleave(width),
            number_K.repeat(len(rank_N)),
            (next_computed_N[:, None] + number_K).flatten(),
        )
        batch.drafts_SK[inputs.slot_N, 1 : width + 1] = tokens_Q.view(-1, width)
        batch.draft_probs_SK[inputs.slot_N, 1 : width + 1] = probs_Q.view(-1, width)
        return torch.where(is_hit_NB.any(dim=1), layout.block_length_N, 1)

    def _draw_drafts(
        self,
        needs: SamplingNeeds,
        logits_QV: Tensor,
        slot_Q: Tensor,
        number_Q: Tensor,
        position_Q: Tensor,
        grammar: GrammarRows | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Drafts of the given numbers (1 is the first guess) and their probabilities.

        Penalties count what has been emitted: the drafts of a block are made at once, so none of them knows the others.
        """
        rows = row_sampling(self.batch, slot_Q, needs, Ahead(number_Q - 1, slot_Q.new_zeros((len(slot_Q), 0))), grammar)
        processed = process_logits(logits_QV, rows, self.mask_token_id)
        tokens_Q = sample(processed, rows, position_Q, self.settings.draft_temperature)
        return tokens_Q, probability_of(processed, tokens_Q)

    # -- diffusion -----------------------------------------------------------------------------------------------------

    def _decide(self, inputs: StepInputs, logits_QV: Tensor) -> _Decided:
        """One more forward of the diffusion blocks; rows of other requests are meaningless."""
        layout, batch, slot_N = inputs.layout, self.batch, inputs.slot_N
        width, max_block = batch.drafts_SK.shape[1], layout.max_block
        remaining_N = batch.num_held_S[slot_N] - inputs.num_drafts_N
        places_NK = torch.arange(width, device=slot_N.device) + inputs.num_drafts_N[:, None]
        drafts_NK = batch.drafts_SK[slot_N].gather(1, places_NK.clamp(max=width - 1))
        if layout.max_branches == 0:
            return _Decided(drafts_NK, torch.zeros_like(slot_N), drafts_NK, remaining_N)
        # A block is only decided on top of all that was emitted; a short plan may have left drafts for the next step.
        is_active_N = (layout.num_branches_N > 0) & (remaining_N == 0) & batch.is_diffusion_S[slot_N]
        number_K = torch.arange(max_block, device=slot_N.device)
        positions_NK = (inputs.attention.prefix_lengths + layout.num_prefill_N + inputs.num_drafts_N)[:, None] + number_K
        candidates_Q, confidence_Q = self._draw_drafts(
            inputs.needs,
            logits_QV[layout.masks_NBK[:, 0].flatten()],
            slot_N.repeat_interleave(max_block),
            number_K.repeat(len(slot_N)) + 1,
            positions_NK.flatten(),
        )
        block = diffusion.decide(
            batch.block_SK[slot_N, :max_block],
            batch.is_decided_SK[slot_N, :max_block],
            candidates_Q.view(-1, max_block),
            confidence_Q.view(-1, max_block),
            layout.block_length_N,
            self.settings.diffusion_threshold,
        )
        is_complete_N = block.is_complete_N & is_active_N
        is_decided_NK = torch.where(is_active_N[:, None], block.is_decided_NK, batch.is_decided_SK[slot_N, :max_block])
        batch.block_SK[slot_N, :max_block] = torch.where(
            is_active_N[:, None], block.tokens_NK, batch.block_SK[slot_N, :max_block]
        )
        batch.is_decided_SK[slot_N, :max_block] = is_decided_NK & ~is_complete_N[:, None]
        tokens_NK = torch.nn.functional.pad(block.tokens_NK, (0, width - max_block))
        return _Decided(
            tokens_NK,
            torch.minimum(layout.block_length_N, batch.wanted_S[slot_N]) * is_complete_N,
            torch.where(is_complete_N[:, None], tokens_NK, drafts_NK),
            torch.where(is_complete_N, layout.block_length_N, remaining_N),
        )

    # -- grammars ------------------------------------------------------------------------------------------------------

    def _constrain(
        self,
        plan: StepPlan,
        inputs: StepInputs,
        logits_QV: Tensor,
        constrained: Sequence[int],
        counts_N2: Tensor,
        sampled_ND: Tensor,
    ) -> None:
        """Take what the constrained requests emitted and now hold through their grammars. Reads from the device."""
        layout, batch = inputs.layout, self.batch
        chosen_C = torch.tensor(constrained, device=batch.device)
        slot_C = inputs.slot_N[chosen_C]
        width = layout.max_drafts
        read = torch.cat((counts_N2[chosen_C], sampled_ND[chosen_C], batch.drafts_SK[slot_C]), dim=1).tolist()
        walks = []
        for i, row in zip(constrained, read, strict=True):
            slot, num_emitted, num_held = plan.requests[i].slot, row[0], row[1]
            self.grammars.advance(slot, row[2 : 2 + num_emitted])
            walks.append(DraftWalk(slot, row[2 + width : 2 + width + num_held]))
        computed_C = batch.num_computed_S[slot_C]
        accepted_C = (computed_C - inputs.attention.prefix_lengths[chosen_C] - layout.num_prefill_N[chosen_C]) - 1

        def resample(numbers: Sequence[int], draft: int, masks: Tensor) -> list[int]:
            walk = torch.tensor(numbers, device=batch.device)
            request, slot = chosen_C[walk], slot_C[walk]
            rank = (inputs.order_NB[request] == accepted_C[walk, None]).int().argmax(dim=1)
            tokens, probs = self._draw_drafts(
                inputs.needs,
                logits_QV[layout.masks_NBK[request, rank, draft]],
                slot,
                torch.full_like(slot, draft),
                computed_C[walk] + draft,
                GrammarRows(torch.arange(len(walk), device=batch.device), masks.to(batch.device)),
            )
            batch.drafts_SK[slot, draft], batch.draft_probs_SK[slot, draft] = tokens, probs
            drawn: list[int] = tokens.tolist()
            return drawn

        self.grammars.walk(walks, resample)

    # -- log-probabilities ---------------------------------------------------------------------------------------------

    def _logprobs(self, plan: StepPlan, inputs: StepInputs, logits_QV: Tensor, sampled_ND: Tensor) -> Logprobs | None:
        """Of every verifying row of the requests that want them, request by request."""
        starts, asked = inputs.layout.verify_starts, [self.batch.params[r.slot].logprobs for r in plan.requests]
        rows = [row for i, n in enumerate(asked) if n is not None for row in range(starts[i], starts[i + 1])]
        if not rows:
            return None
        rows_Q = torch.tensor(rows, device=self.batch.device)
        tokens_Q = sampled_ND[inputs.layout.verify_request_D[rows_Q], inputs.layout.verify_index_D[rows_Q]]
        return raw_logprobs(logits_QV[rows_Q], tokens_Q, max(n for n in asked if n is not None))

    def _prompt_logprobs(self, plan: StepPlan, inputs: StepInputs, logits_QV: Tensor) -> Logprobs | None:
        targets = [token for r in plan.requests for token in r.prompt_targets]
        if not targets:
            return None
        most = max(self.batch.params[r.slot].prompt_logprobs or 0 for r in plan.requests)
        return raw_logprobs(logits_QV[inputs.layout.prompt_logits :], torch.tensor(targets, device=self.batch.device), most)


@dataclass(frozen=True, slots=True)
class _Decided:
    """What a forward did for diffusion requests: tokens [N, K] of which ``num_emitted`` are emitted, and the drafts to come."""

    tokens_NK: Tensor
    num_emitted_N: Tensor
    drafts_NK: Tensor
    num_held_N: Tensor


def _beside(is_first_N: Tensor, first_NK: Tensor, second_ND: Tensor) -> Tensor:
    """Rows of ``first`` or of ``second``, the narrower one padded with zeros."""
    width = max(first_NK.shape[1], second_ND.shape[1])
    first, second = (torch.nn.functional.pad(t, (0, width - t.shape[1])) for t in (first_NK, second_ND))
    return torch.where(is_first_N[:, None], first, second)


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
