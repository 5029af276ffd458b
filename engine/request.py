"""A request on its way through the scheduler, the only one that writes it.

What changes in every step of a running request is not here but in the columns of ``engine/request_table.py``.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from engine.grammar import CompiledGrammar
from engine.messages import GenerateRequest, SpeculationStats
from engine.step import TokenArray


class RequestStatus(enum.Enum):
    """Where a request is. A preempted request waits again, at the front."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Request:
    """One choice being generated.

    ``policy`` is its number in the planner. ``token_ids`` and ``speculation`` are those of the time when it last began to
    wait: the prompt, and what it had emitted before it was preempted. ``grammar`` is the compiled grammar, walked from its
    start whenever the request is admitted. ``num_prompt_logprobs`` are those that were sent.
    """

    message: GenerateRequest
    policy: int
    stop_token_ids: frozenset[int]
    token_ids: TokenArray
    grammar: CompiledGrammar | None = None
    status: RequestStatus = RequestStatus.WAITING
    slot: int = -1
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
    def owes_prompt_logprobs(self) -> bool:
        """Whether log-probabilities of prompt tokens are still to be computed."""
        return self.message.sampling.prompt_logprobs is not None and self.num_prompt_logprobs < self.num_prompt_tokens - 1

    @property
    def max_length(self) -> int:
        """Tokens that it can ever have."""
        return self.num_prompt_tokens + self.message.sampling.max_tokens
