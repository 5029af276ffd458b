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
from engine.decode.inputs import RowBuilder, StepInputs, decode_state
from engine.decode.logprobs import prompt_logprobs, verified_logprobs
from engine.decode.pending import PendingResult
from engine.decode.sampling import Ahead, row_sampling
from engine.input_batch import InputBatch, SamplingNeeds
from engine.step import StepPlan
from kernels.backend import REFERENCE, Kernels
from kernels.process_logits.metadata import GrammarRows
from kernels.verify.metadata import Verified


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
        self.state = decode_state(batch, self.survival)
        self.rows = RowBuilder(batch, self.state, page_size, mask_token_id, kernels)
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
        layout, batch, chance = inputs.layout, self.batch, self.settings.synthetic_acceptance
        blocks = None
        if inputs.has_diffusion:
            blocks = denoise(batch, inputs, logits_QV, self._draw, self.settings.diffusion_threshold)
        tokens_D = self._sample_verified(inputs, logits_QV, grammar)
        observes = layout.max_drafts > 1 and not inputs.has_diffusion
        verified = self.kernels.verify(self.state, layout, inputs.requests, tokens_D, chance, observes)
        packed, sampled_ND = verified.packed, verified.packed[:, 4:]
        if blocks is not None:
            packed = blocks.replace(batch, inputs, packed)
        if inputs.needs.penalties:
            assert batch.counts is not None
            batch.counts.add(inputs.slot_N, packed[:, 4:], packed[:, 0])
        self._hold(inputs, logits_QV, verified)
        if blocks is not None:
            blocks.write(batch, inputs)
        return Verdict(packed, sampled_ND)

    def _sample_verified(self, inputs: StepInputs, logits_QV: Tensor, grammar: GrammarRows | None) -> Tensor:
        """The tokens that the verifying rows take, [D]."""
        layout, slot_D = inputs.layout, inputs.verify_slot_D
        if layout.max_drafts == 0:
            return slot_D
        # Row i is processed as if drafts 1..i had been emitted; draft 0 has been.
        ahead = Ahead(layout.verify_index_D, self.batch.drafts_SK[:, 1 : layout.max_drafts])
        rows = row_sampling(self.batch, slot_D, inputs.needs, ahead, grammar, self.kernels.gather)
        logits_DV = logits_QV[: len(layout.verify_rows_D)]
        if self.settings.trust_ar < 1.0 and layout.max_branches:
            logits_DV = self._mix(inputs, logits_QV, logits_DV)
        return self.kernels.sample_tokens(logits_DV, None, rows, inputs.verify_position_D, self.mask_token_id)

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

    def _hold(self, inputs: StepInputs, logits_QV: Tensor, verified: Verified) -> None:
        """Draw the guesses of the next step's drafts, each with the noise of its position."""
        layout, batch, width = inputs.layout, self.batch, inputs.layout.num_guesses
        if width == 0:
            return
        place_Q, slot_Q, position_Q = verified.place_Q, verified.slot_Q, verified.position_Q
        tokens_Q, probs_Q = self._draw_drafts(inputs.needs, logits_QV, place_Q, slot_Q, layout.guess_Q, position_Q)
        batch.drafts_SK[inputs.slot_N, 1 : width + 1] = tokens_Q.view(-1, width)
        batch.draft_probs_SK[inputs.slot_N, 1 : width + 1] = probs_Q.view(-1, width)

    def _draw_drafts(
        self,
        needs: SamplingNeeds,
        logits_RV: Tensor,
        place_Q: Tensor,
        slot_Q: Tensor,
        guess_Q: Tensor,
        position_Q: Tensor,
        grammar: GrammarRows | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The given guesses (0 is the first) and their probabilities, at the draft temperature."""
        temperature = self.settings.draft_temperature
        return self._draw(needs, logits_RV, place_Q, slot_Q, guess_Q, position_Q, grammar, temperature)

    def _draw(
        self,
        needs: SamplingNeeds,
        logits_RV: Tensor,
        place_Q: Tensor,
        slot_Q: Tensor,
        guess_Q: Tensor,
        position_Q: Tensor,
        grammar: GrammarRows | None = None,
        draft_temperature: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Tokens of masks, and their probabilities.

        Penalties count what has been emitted: the tokens of a block are made at once, so none of them knows the others.
        """
        rows = row_sampling(self.batch, slot_Q, needs, Ahead(guess_Q, None), grammar, self.kernels.gather)
        mask = self.mask_token_id
        return self.kernels.sample_drafts(logits_RV, place_Q, rows, position_Q, mask, draft_temperature)
