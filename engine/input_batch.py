"""Device state of the running requests, one row per slot.

The decoder alone writes it, in stream order: admissions and page updates when a plan is admitted, progress when a step is
judged (and ``step_timer``, before there are requests). The host never reads it back, so a step can be launched before the one
before it has been read.

Shape suffixes: S slots, K drafts a request may hold, P pages of the longest request, A admitted requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields

import numpy as np
import torch
from torch import Tensor

from engine.decode.penalties import TokenCounts, TokenTable
from engine.sampling_params import MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS, DecodingMode, SamplingParams
from engine.step import Admission, IntArray, StepPlan
from engine.upload import upload
from kernels.process_logits.metadata import Needs


@dataclass(frozen=True, slots=True)
class SamplingNeeds(Needs):
    """What the parameters of a batch's requests need."""

    @staticmethod
    def of(params: Sequence[SamplingParams]) -> SamplingNeeds:
        """The union over requests. Greedy requests truncate nothing and use no noise."""
        random = [p for p in params if not p.greedy]
        return SamplingNeeds(
            noise=bool(random),
            top_k=any(p.top_k > 0 for p in random),
            top_p=any(p.top_p < 1.0 for p in random),
            min_p=any(p.min_p > 0.0 for p in random),
            penalties=any(p.has_penalties for p in params),
            bias=any(p.logit_bias for p in params),
            min_tokens=any(p.min_tokens for p in params),
        )

    @property
    def level(self) -> int:
        """The least of the levels that steps are captured for which does all of this: 0 is greedy, 3 has every option."""
        if self.penalties or self.bias or self.min_tokens:
            return 3
        if self.top_k or self.top_p or self.min_p:
            return 2
        return int(self.noise)


class HostColumns:
    """What the host has to know of each slot's request to choose the code of a step.

    ``is_diffusion_S``: whether it is decoded by diffusion.
    ``num_logprobs_S``, ``num_prompt_logprobs_S``: alternatives asked for, -1 where none are wanted at all.
    """

    def __init__(self, num_slots: int) -> None:
        self._needs_SF = np.zeros((num_slots, len(fields(SamplingNeeds))), dtype=bool)
        self.is_diffusion_S = np.zeros(num_slots, dtype=bool)
        self.num_logprobs_S = np.full(num_slots, -1)
        self.num_prompt_logprobs_S = np.full(num_slots, -1)

    def admit(self, admission: Admission) -> None:
        """A request takes its slot."""
        slot, sampling = admission.slot, admission.sampling
        self._needs_SF[slot] = astuple(SamplingNeeds.of([sampling]))
        self.is_diffusion_S[slot] = admission.mode is DecodingMode.DIFFUSION
        self.num_logprobs_S[slot] = -1 if sampling.logprobs is None else sampling.logprobs
        self.num_prompt_logprobs_S[slot] = -1 if sampling.prompt_logprobs is None else sampling.prompt_logprobs

    def needs(self, slots: IntArray) -> SamplingNeeds:
        """The union over the requests in these slots."""
        return SamplingNeeds(*np.any(self._needs_SF[slots], axis=0).tolist())

    def has_diffusion(self, slots: IntArray) -> bool:
        """Whether one of these slots' requests is decoded by diffusion."""
        return bool(self.is_diffusion_S[slots].any())


class InputBatch:
    """What a slot's request has computed, holds and wants, its pages and its sampling parameters.

    ``num_eos_tokens``: how many tokens ``min_tokens`` may have to hold back beside a request's own stops.
    """

    def __init__(
        self,
        num_slots: int,
        max_drafts: int,
        max_pages: int,
        vocab_size: int,
        device: torch.device,
        num_eos_tokens: int = 0,
    ) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.device, self.vocab_size, self.num_slots = device, vocab_size, num_slots
        # The null slot, behind the others, wants nothing: it fills the places of a captured step that nobody takes.
        self.null_slot = num_slots
        num_slots += 1
        self.host = HostColumns(num_slots)
        self.block_table_SP = zeros(num_slots, max_pages)
        self.drafts_SK = zeros(num_slots, max_drafts)
        self.draft_probs_SK = zeros(num_slots, max_drafts, dtype=torch.float32)
        # A diffusion request's block under way: which of its masks are decided.
        self.is_decided_SK = zeros(num_slots, max_drafts, dtype=torch.bool)
        self.block_SK = zeros(num_slots, max_drafts)
        # One tensor for all columns of a type, since an admission writes every one of them: see ``_integers`` and so on.
        self._integers_FS, self._flags_FS = zeros(6, num_slots), zeros(2, num_slots, dtype=torch.bool)
        self.num_computed_S, self.num_held_S, self.wanted_S, self.seed_S, self.top_k_S, self.stop_at_S = self._integers_FS
        self.is_tidar_S, self.is_diffusion_S = self._flags_FS
        # Client numbers stay in float64, so that 0.9 means the same for every model dtype.
        self._numbers_FS = zeros(6, num_slots, dtype=torch.float64)
        self.temperature_S, self.top_p_S, self.min_p_S, *penalties = self._numbers_FS
        self.repetition_S, self.frequency_S, self.presence_S = penalties
        self.counts: TokenCounts | None = None
        self.biases = TokenTable(num_slots, MAX_LOGIT_BIAS, device)
        self.stops = TokenTable(num_slots, MAX_STOP_TOKEN_IDS + num_eos_tokens, device)

    def update(self, plan: StepPlan) -> None:
        """Put newly admitted requests in their slots and extend block tables."""
        if plan.admissions:
            self._admit(plan.admissions)
        if len(plan.page_updates):
            slots, numbers, pages = upload(plan.page_updates, self.device).unbind(1)
            self.block_table_SP[slots, numbers] = pages

    def make_counts(self) -> TokenCounts:
        """Make the table that takes room for every slot and token, before a request with penalties asks for it."""
        if self.counts is None:
            self.counts = TokenCounts(self.num_slots + 1, self.vocab_size, self.device)
        return self.counts

    def _admit(self, admissions: Sequence[Admission]) -> None:
        """Write all requests of a step at once: number by number, the host would wait for the device each time."""
        for admission in admissions:
            self.host.admit(admission)
        slots = [a.slot for a in admissions]
        integers = np.array([(a.slot, a.last_token_id, *_flags(a), *_integers(a)) for a in admissions], dtype=np.int64)
        numbers = np.array([_numbers(a.sampling) for a in admissions], dtype=np.float64)
        columns_FA = upload(np.concatenate((integers, numbers.view(np.int64)), axis=1).T, self.device)
        slot_A, last_token_A = columns_FA[:2]
        flags_FA, integers_FA, numbers_FA = columns_FA[2:].split((2, 6, 6))
        self.drafts_SK[slot_A, 0] = last_token_A
        self.is_decided_SK.index_fill_(0, slot_A, False)
        self._flags_FS.index_copy_(1, slot_A, flags_FA.bool())
        self._integers_FS.index_copy_(1, slot_A, integers_FA)
        self._numbers_FS.index_copy_(1, slot_A, numbers_FA.view(torch.float64))
        self.biases.admit(slot_A, slots, [a.sampling.logit_bias for a in admissions])
        banned = [a.stop_token_ids if a.sampling.min_tokens else () for a in admissions]
        self.stops.admit(slot_A, slots, [[(token, float("-inf")) for token in tokens] for tokens in banned])
        penalised = [a for a in admissions if a.sampling.has_penalties]
        if penalised:
            self.make_counts().admit(
                [a.slot for a in penalised],
                [a.prompt_token_ids for a in penalised],
                [a.output_token_ids for a in penalised],
            )


def _integers(admission: Admission) -> tuple[int, ...]:
    """Computed, held and wanted tokens, seed, top-k and where stops become free."""
    sampling = admission.sampling
    seed = sampling.seed - 2**64 if sampling.seed >= 2**63 else sampling.seed
    # Stops are free once at most this many tokens are wanted; without min_tokens, from the start.
    stop_at = sampling.max_tokens - sampling.min_tokens
    return admission.num_computed, 1, admission.wanted, seed, sampling.top_k, stop_at


def _flags(admission: Admission) -> tuple[bool, bool]:
    """Whether it is decoded by ``tidar``, and by ``diffusion``."""
    return admission.mode is DecodingMode.TIDAR, admission.mode is DecodingMode.DIFFUSION


def _numbers(sampling: SamplingParams) -> tuple[float, ...]:
    """Temperature, top-p, min-p, and the penalties."""
    penalties = sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty
    return sampling.temperature, sampling.top_p, sampling.min_p, *penalties
