"""A request on its way through the scheduler, the only one that writes it."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from engine.decode.policy import DraftPolicy
from engine.grammar import CompiledGrammar
from engine.kv_cache_manager import SequenceCache
from engine.messages import GenerateRequest, SpeculationStats
from engine.step import ScheduledRequest


class RequestStatus(enum.Enum):
    """Where a request is. A preempted request waits again, at the front."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Request:
    """One choice being generated.

    ``token_ids`` are the prompt and everything emitted. ``num_held`` is how many drafts the device holds after the last step
    that the host has read. ``in_flight`` are this request's shares of launched steps that the host has not read, oldest first.
    ``grammar`` is the compiled grammar, walked from its start whenever the request is admitted. ``num_prompt_logprobs`` are
    those that were sent.
    """

    message: GenerateRequest
    policy: DraftPolicy
    stop_token_ids: frozenset[int]
    token_ids: list[int]
    grammar: CompiledGrammar | None = None
    status: RequestStatus = RequestStatus.WAITING
    slot: int = -1
    cache: SequenceCache | None = None
    num_held: int = 1
    in_flight: list[ScheduledRequest] = field(default_factory=list)
    num_cached_tokens: int = 0
    num_prompt_logprobs: int = 0
    num_preemptions: int = 0
    speculation: SpeculationStats = field(default_factory=SpeculationStats)
    scheduled_at: float = 0.0
    first_token_at: float = 0.0

    @property
    def request_id(self) -> str:
        return self.message.request_id

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.message.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - len(self.message.prompt_token_ids)

    @property
    def owes_prompt_logprobs(self) -> bool:
        """Whether log-probabilities of prompt tokens are still to be computed."""
        return self.message.sampling.prompt_logprobs is not None and self.num_prompt_logprobs < self.num_prompt_tokens - 1

    @property
    def max_computed(self) -> int:
        """Positions that can ever be computed: all tokens but the last one, which needs no K/V."""
        return self.num_prompt_tokens + self.message.sampling.max_tokens - 1

    @property
    def num_rows_in_flight(self) -> int:
        """Clean rows of launched steps that the host has not read: at most so many positions more are being computed."""
        return sum(len(s.prefill_token_ids) + s.draft_plan.num_drafts for s in self.in_flight)

    @property
    def wanted(self) -> int:
        """Tokens that may still be emitted, as far as the host has read."""
        return self.message.sampling.max_tokens - self.num_output_tokens
