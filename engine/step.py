"""The plain data that passes between the four lines of the loop: schedule, execute, judge, apply.

Words: ``n`` drafts, ``b`` branches, a block of ``k`` masks, ``L`` computed tokens (1-to-1 with the design of the step in
``docs/architecture.md``). A plan holds upper bounds only. What a step really does with them (how many drafts a request holds,
which branches it runs) is device state, so that a step can be launched before the host has read the one before it.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.grammar import Matcher
from engine.messages import TokenLogprobs
from engine.sampling_params import DecodingMode, SamplingParams


@dataclass(frozen=True, slots=True)
class DraftPlan:
    """Upper bounds of one request's decode rows: drafts, and branches of ``block_length`` masks.

    ``has_anchor``: a branch begins with one more row, a copy of the draft that it bets on, which sees the branch's masks.
    """

    num_drafts: int
    num_branches: int
    block_length: int
    has_anchor: bool = False

    @property
    def branch_rows(self) -> int:
        """Rows of one branch."""
        return self.block_length + self.has_anchor

    @property
    def num_rows(self) -> int:
        """Rows that the plan takes in a step."""
        return self.num_drafts + self.num_branches * self.branch_rows


NO_DRAFTS = DraftPlan(0, 0, 1)
"""The plan of a prefill chunk that does not reach the end of its prompt."""


@dataclass(frozen=True, slots=True)
class Admission:
    """A request takes a slot: everything the device has to know about it.

    ``output_token_ids`` are what it has emitted before it was preempted. ``stop_token_ids`` are what ``min_tokens`` holds back.
    ``matcher`` is the one live object that a plan carries: the compiled grammar, at its start.
    """

    slot: int
    num_computed: int
    prompt_token_ids: tuple[int, ...]
    output_token_ids: tuple[int, ...]
    mode: DecodingMode
    sampling: SamplingParams
    stop_token_ids: tuple[int, ...] = ()
    matcher: Matcher | None = None

    @property
    def last_token_id(self) -> int:
        """The certain draft: the last token that is known."""
        return (self.output_token_ids or self.prompt_token_ids)[-1]

    @property
    def wanted(self) -> int:
        """Tokens that may still be emitted."""
        return self.sampling.max_tokens - len(self.output_token_ids)


@dataclass(frozen=True, slots=True)
class ScheduledRequest:
    """One request's share of a step.

    ``prefill_token_ids`` are computed causally at the positions after its computed tokens; drafts follow. ``max_computed`` is
    an upper bound of its computed tokens when the step starts, exact at loop depth 0 and while the prompt is computed.
    ``prompt_targets``, where prompt log-probabilities are asked for, are the tokens that follow the first prefill tokens.
    """

    request_id: str
    slot: int
    prefill_token_ids: tuple[int, ...]
    draft_plan: DraftPlan
    max_computed: int
    prompt_targets: tuple[int, ...] = ()
    wants_logprobs: bool = False

    @property
    def num_rows(self) -> int:
        """Rows of this request in the step."""
        return len(self.prefill_token_ids) + self.draft_plan.num_rows


@dataclass(frozen=True, slots=True)
class PageUpdate:
    """Entries of one slot's block table, from ``first`` on."""

    slot: int
    first: int
    page_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What the scheduler hands over for one engine step. Admissions and page updates take effect before the forward."""

    step_id: int
    requests: tuple[ScheduledRequest, ...]
    admissions: tuple[Admission, ...]
    page_updates: tuple[PageUpdate, ...]

    @property
    def num_rows(self) -> int:
        """Rows of the whole step."""
        return sum(r.num_rows for r in self.requests)


@dataclass(frozen=True, slots=True)
class RequestResult:
    """What the judge found for one scheduled request, in the order of the plan.

    ``token_ids`` are the ``a`` tokens that the step emits (none for a prefill chunk). ``num_drafts`` is how many drafts were
    really verified. ``num_held`` drafts are ready for the next step: 1 after a miss. ``num_committed`` drafts have their K/V
    in the cache: ``a`` of them in the exact modes. ``error`` ends the request alone.
    """

    token_ids: tuple[int, ...]
    num_drafts: int
    num_held: int
    num_committed: int
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    error: str | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    """The judged step, read back by the host."""

    step_id: int
    requests: tuple[RequestResult, ...]
