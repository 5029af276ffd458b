"""Device state of the running requests, one row per slot.

The decoder alone writes it, in stream order: admissions and page updates when a plan is laid out, progress when a step is
judged. The host never reads it back, so a step can be launched before the one before it has been read.

Shape suffixes: S slots, K drafts a request may hold, P pages of the longest request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields

import numpy as np
import torch
from torch import Tensor

from engine.decode.penalties import TokenCounts, TokenTable
from engine.sampling_params import DecodingMode, SamplingParams
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


ROOM_IN_TABLES = 64
"""Entries of a list that the tables of a captured step have room for; a longer list moves the table."""


class HostColumns:
    """What the host has to know of each slot's request to choose the code of a step.

    ``num_logprobs_S``, ``num_prompt_logprobs_S``: alternatives asked for, -1 where none are wanted at all.
    """

    def __init__(self, num_slots: int) -> None:
        self._needs_SF = np.zeros((num_slots, len(fields(SamplingNeeds))), dtype=bool)
        self._is_diffusion_S = np.zeros(num_slots, dtype=bool)
        self.num_logprobs_S = np.full(num_slots, -1)
        self.num_prompt_logprobs_S = np.full(num_slots, -1)

    def admit(self, admission: Admission) -> None:
        """A request takes its slot."""
        slot, sampling = admission.slot, admission.sampling
        self._needs_SF[slot] = astuple(SamplingNeeds.of([sampling]))
        self._is_diffusion_S[slot] = admission.mode is DecodingMode.DIFFUSION
        self.num_logprobs_S[slot] = -1 if sampling.logprobs is None else sampling.logprobs
        self.num_prompt_logprobs_S[slot] = -1 if sampling.prompt_logprobs is None else sampling.prompt_logprobs

    def needs(self, slots: IntArray) -> SamplingNeeds:
        """The union over the requests in these slots."""
        return SamplingNeeds(*np.any(self._needs_SF[slots], axis=0).tolist())

    def has_diffusion(self, slots: IntArray) -> bool:
        """Whether one of these slots' requests is decoded by diffusion."""
        return bool(self._is_diffusion_S[slots].any())


class InputBatch:
    """What a slot's request has computed, holds and wants, its pages and its sampling parameters."""

    def __init__(self, num_slots: int, max_drafts: int, max_pages: int, vocab_size: int, device: torch.device) -> None:
        def integers(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.long, device=device)

        def floats(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=device)

        self.device, self.vocab_size, self.num_slots = device, vocab_size, num_slots
        # The null slot, behind the others, wants nothing: it fills the places of a captured step that nobody takes.
        self.null_slot = num_slots
        num_slots += 1
        self.host = HostColumns(num_slots)
        self.block_table_SP = integers(num_slots, max_pages)
        self.num_computed_S = integers(num_slots)
        self.num_held_S = integers(num_slots)
        self.wanted_S = integers(num_slots)
        self.drafts_SK = integers(num_slots, max_drafts)
        self.draft_probs_SK = floats(num_slots, max_drafts)
        # A diffusion request's block under way: which of its masks are decided.
        self.is_diffusion_S = torch.zeros(num_slots, dtype=torch.bool, device=device)
        self.is_decided_SK = torch.zeros((num_slots, max_drafts), dtype=torch.bool, device=device)
        self.block_SK = integers(num_slots, max_drafts)
        self.is_tidar_S = torch.zeros(num_slots, dtype=torch.bool, device=device)
        self.seed_S = integers(num_slots)
        self.top_k_S = integers(num_slots)
        # Client numbers stay in float64, so that 0.9 means the same for every model dtype.
        self.temperature_S, self.top_p_S, self.min_p_S = (floats(num_slots).double() for _ in range(3))
        self.repetition_S, self.frequency_S, self.presence_S = (floats(num_slots).double() for _ in range(3))
        self.stop_at_S = integers(num_slots)
        self.counts: TokenCounts | None = None
        self.biases, self.stops = TokenTable(num_slots, device), TokenTable(num_slots, device)

    def update(self, plan: StepPlan) -> None:
        """Put newly admitted requests in their slots and extend block tables."""
        for admission in plan.admissions:
            self._admit(admission)
        if len(plan.page_updates):
            slots, numbers, pages = upload(plan.page_updates, self.device).unbind(1)
            self.block_table_SP[slots, numbers] = pages

    @property
    def tables_version(self) -> int:
        """Changes whenever one of the tables of ``penalties.py`` is made or moves, which a captured step cannot follow."""
        return (self.counts is not None) + self.biases.num_moves + self.stops.num_moves

    def make_tables(self) -> None:
        """Make all tables before a request asks for them, with room for ordinary lists of biases and stops."""
        self._make_counts()
        self.biases.widen(ROOM_IN_TABLES)
        self.stops.widen(ROOM_IN_TABLES)

    def _make_counts(self) -> TokenCounts:
        if self.counts is None:
            self.counts = TokenCounts(self.num_slots + 1, self.vocab_size, self.device)
        return self.counts

    def _admit(self, admission: Admission) -> None:
        slot, sampling = admission.slot, admission.sampling
        self.host.admit(admission)
        self.num_computed_S[slot] = admission.num_computed
        self.num_held_S[slot] = 1
        self.wanted_S[slot] = admission.wanted
        self.drafts_SK[slot, 0] = admission.last_token_id
        self.is_tidar_S[slot] = admission.mode is DecodingMode.TIDAR
        self.is_diffusion_S[slot] = admission.mode is DecodingMode.DIFFUSION
        self.is_decided_SK[slot] = False
        self.seed_S[slot] = sampling.seed - 2**64 if sampling.seed >= 2**63 else sampling.seed
        self.temperature_S[slot] = sampling.temperature
        self.top_k_S[slot] = sampling.top_k
        self.top_p_S[slot] = sampling.top_p
        self.min_p_S[slot] = sampling.min_p
        self._admit_history(admission)

    def _admit_history(self, admission: Admission) -> None:
        """What penalties, biases and bans need; of a request without them, only what undoes its predecessor's."""
        slot, sampling = admission.slot, admission.sampling
        self.repetition_S[slot] = sampling.repetition_penalty
        self.frequency_S[slot] = sampling.frequency_penalty
        self.presence_S[slot] = sampling.presence_penalty
        if sampling.has_penalties:
            self._make_counts().reset(slot, admission.prompt_token_ids, admission.output_token_ids)
        self.biases.set(slot, sampling.logit_bias)
        # Stops are free once at most this many tokens are wanted; without min_tokens, from the start.
        self.stop_at_S[slot] = sampling.max_tokens - sampling.min_tokens
        banned = admission.stop_token_ids if sampling.min_tokens else ()
        self.stops.set(slot, [(token, float("-inf")) for token in banned])
