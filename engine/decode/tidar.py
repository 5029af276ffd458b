"""The draft-and-verify step (TiDAR, arXiv 2511.08923): how a plan becomes rows, and what its logits mean.

``ar``, ``linear`` and ``tidar`` are one code path with different draft plans; ``diffusion`` shares their rows and is judged
beside them. Shape suffixes: N requests of the step, R rows, D drafts at most, B branches at most, K block length at most, Q
rows with logits, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.decode.calibration import SurvivalTable
from engine.decode.constrain import GrammarTable
from engine.decode.diffusion import denoise
from engine.decode.inputs import RowBuilder, StepInputs
from engine.decode.logprobs import prompt_logprobs, verified_logprobs
from engine.decode.pending import PendingResult
from engine.decode.sampling import Ahead, row_sampling
from engine.decode.verify import imposed_drafts
from engine.input_batch import InputBatch, SamplingNeeds
from engine.step import StepPlan
from kernels.backend import REFERENCE, Kernels
from kernels.process_logits.metadata import GrammarRows
from kernels.verify.reference import Verified


@dataclass(frozen=True, slots=True)
class DecoderSettings:
    """What is the same for all requests of a server.

    ``trust_ar``: the paper's beta, the weight of the autoregressive logits where a branch's first mask reads the same
    position; below 1 the ``tidar`` mode is lossy. ``draft_temperature``: None drafts at each request's own temperature, 0
    drafts the likeliest token. ``diffusion_threshold``: the probability from which the ``diffusion`` mode decides a token.
    ``synthetic_acceptance``: a coin with this chance accepts drafts, for benchmarks of weights that were never trained.
    """

    trust_ar: float = 1.0
    draft_temperature: float | None = None
    diffusion_threshold: float = 0.9
    synthetic_acceptance: float | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """A judged step on the device: ``packed`` [N, 4 + K] as ``PendingResult`` has it, and the tokens after every draft."""

    packed: Tensor
    sampled_ND: Tensor


class TidarDecoder:
    """Lays out plans and judges logits. It owns the device state of the running requests."""

    def __init__(
        self,
        batch: InputBatch,
        page_size: int,
        mask_token_id: int | None,
        settings: DecoderSettings | None = None,
        kernels: Kernels = REFERENCE,
    ) -> None:
        self.batch, self.mask_token_id, self.settings = batch, mask_token_id, settings or DecoderSettings()
        self.kernels = kernels
        self.survival = SurvivalTable(batch.device)
        self.rows = RowBuilder(batch, self.survival, page_size, mask_token_id)
        self.grammars = GrammarTable(batch.drafts_SK.shape[1], batch.vocab_size, batch.device)

    @property
    def first_masks(self) -> bool:
        """Whether the logits of mask 0 are wanted in every step."""
        return self.settings.trust_ar < 1.0

    def admit(self, plan: StepPlan) -> None:
        """Take admitted requests and new pages in."""
        self.batch.update(plan)
        for admission in plan.admissions:
            self.grammars.admit(admission)

    def lay_out(self, plan: StepPlan) -> StepInputs:
        """Turn the plan into rows."""
        return self.rows.lay_out(plan, self.first_masks)

    def judge(self, plan: StepPlan, inputs: StepInputs, logits_QV: Tensor | None) -> PendingResult:
        """What the logits mean: the device's verdict, then what the host has a part in, grammars and log-probabilities."""
        batch, host = self.batch, self.batch.host
        if logits_QV is None:
            batch.num_computed_S[inputs.slot_N] += inputs.layout.num_prefill_N
            return PendingResult(plan, host, None)
        constrained = self.grammars.constrained(plan)
        verdict = self.verify(inputs, logits_QV, self.grammars.verify_rows(plan, inputs.layout, constrained))
        if constrained:
            self.grammars.follow(
                batch, plan, inputs, logits_QV, constrained, verdict.packed, verdict.sampled_ND, self._draw_drafts
            )
        return PendingResult(
            plan,
            host,
            verdict.packed,
            verified_logprobs(host, plan, inputs.layout, logits_QV, verdict.sampled_ND),
            prompt_logprobs(host, plan, inputs.layout, logits_QV),
            self.grammars.errors(plan),
        )

    def verify(self, inputs: StepInputs, logits_QV: Tensor, grammar: GrammarRows | None = None) -> Verdict:
        """Sample, accept, take the hit branch's drafts and write the next step's state: batch-wide, on the device alone."""
        layout, batch, slot_N = inputs.layout, self.batch, inputs.slot_N
        sampled_ND = self._sample_verified(inputs, logits_QV, grammar)
        drafts_ND = batch.drafts_SK[slot_N, : layout.max_drafts]
        if self.settings.synthetic_acceptance is not None and layout.max_drafts:
            first_N = inputs.attention.prefix_lengths + layout.num_prefill_N
            drafts_ND = imposed_drafts(sampled_ND, batch.seed_S[slot_N], first_N, self.settings.synthetic_acceptance)
        verified = self.kernels.verify(sampled_ND, drafts_ND, inputs.num_drafts_N, inputs.order_NB, layout.masks_NBK)
        accepted_N = verified.accepted_N
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
            block = denoise(batch, inputs, logits_QV, self._draw, self.settings.diffusion_threshold)
            emitted_N = torch.where(is_diffusion_N, block.num_emitted_N, accepted_N)
            tokens_NK = _beside(is_diffusion_N, block.tokens_NK, sampled_ND)
            num_verified_N = inputs.num_drafts_N.masked_fill(is_diffusion_N, 0)
        batch.wanted_S[slot_N] -= emitted_N
        if inputs.needs.penalties:
            assert batch.counts is not None
            batch.counts.add(slot_N, tokens_NK, emitted_N)
        num_held_N = self._hold(inputs, logits_QV, verified, next_computed_N)
        if inputs.has_diffusion:
            num_held_N = torch.where(is_diffusion_N, block.num_held_N, num_held_N)
            batch.drafts_SK[slot_N] = torch.where(is_diffusion_N[:, None], block.drafts_NK, batch.drafts_SK[slot_N])
        # A prefill chunk leaves the one draft that its request was admitted with.
        batch.num_held_S[slot_N] = num_held_N
        counts_N4 = torch.stack((emitted_N, num_verified_N, num_held_N, accepted_N), dim=1)
        return Verdict(torch.cat((counts_N4, tokens_NK), dim=1), sampled_ND)

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
        position_D = inputs.positions_R[layout.verify_rows_D] + 1
        tokens_D = self.kernels.sample_tokens(logits_DV, None, rows, position_D, self.mask_token_id)
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

    def _hold(self, inputs: StepInputs, logits_QV: Tensor, verified: Verified, next_computed_N: Tensor) -> Tensor:
        """Write the drafts of the next step; return how many each request now holds."""
        layout, batch = inputs.layout, self.batch
        if layout.max_drafts:
            drafts_N = batch.drafts_SK[inputs.slot_N, 0]
            batch.drafts_SK[inputs.slot_N, 0] = torch.where(inputs.num_drafts_N > 0, verified.last_N, drafts_N)
        width = layout.max_block - 1
        if layout.max_branches == 0 or width == 0:
            return torch.ones_like(next_computed_N)
        # Mask j stands at the position of the token that it drafts, and takes that position's noise.
        number_K = torch.arange(1, width + 1, device=batch.device)
        tokens_Q, probs_Q = self._draw_drafts(
            inputs.needs,
            logits_QV,
            verified.place_NK.flatten(),
            inputs.slot_N.repeat_interleave(width),
            number_K.repeat(len(next_computed_N)),
            (next_computed_N[:, None] + number_K).flatten(),
        )
        batch.drafts_SK[inputs.slot_N, 1 : width + 1] = tokens_Q.view(-1, width)
        batch.draft_probs_SK[inputs.slot_N, 1 : width + 1] = probs_Q.view(-1, width)
        return torch.where(verified.is_hit_N, layout.block_length_N, 1)

    def _draw_drafts(
        self,
        needs: SamplingNeeds,
        logits_RV: Tensor,
        place_Q: Tensor,
        slot_Q: Tensor,
        number_Q: Tensor,
        position_Q: Tensor,
        grammar: GrammarRows | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Drafts of the given numbers (1 is the first guess) and their probabilities, at the draft temperature."""
        temperature = self.settings.draft_temperature
        return self._draw(needs, logits_RV, place_Q, slot_Q, number_Q, position_Q, grammar, temperature)

    def _draw(
        self,
        needs: SamplingNeeds,
        logits_RV: Tensor,
        place_Q: Tensor,
        slot_Q: Tensor,
        number_Q: Tensor,
        position_Q: Tensor,
        grammar: GrammarRows | None = None,
        draft_temperature: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Tokens of masks, and their probabilities.

        Penalties count what has been emitted: the tokens of a block are made at once, so none of them knows the others.
        """
        rows = row_sampling(self.batch, slot_Q, needs, Ahead(number_Q - 1, slot_Q.new_zeros((len(slot_Q), 0))), grammar)
        mask = self.mask_token_id
        return self.kernels.sample_drafts(logits_RV, place_Q, rows, position_Q, mask, draft_temperature)


def _beside(is_first_N: Tensor, first_NK: Tensor, second_ND: Tensor) -> Tensor:
    """Rows of ``first`` or of ``second``, the narrower one padded with zeros."""
    width = max(first_NK.shape[1], second_ND.shape[1])
    first, second = (torch.nn.functional.pad(t, (0, width - t.shape[1])) for t in (first_NK, second_ND))
    return torch.where(is_first_N[:, None], first, second)
