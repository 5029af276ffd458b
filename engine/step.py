"""The plain data that passes between the four lines of the loop: schedule, execute, judge, apply.

Words: ``n`` drafts, ``b`` branches, a block of ``k`` masks, ``L`` computed tokens (1-to-1 with the design of the step in
``docs/architecture.md``). A plan holds upper bounds only. What a step really does with them (how many drafts a request holds,
which branches it runs) is device state, so that a step can be launched before the host has read the one before it.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class DraftPlan:
    """Upper bounds of one request's decode rows: ``num_drafts + num_branches * block_length``."""

    num_drafts: int
    num_branches: int
    block_length: int

    @property
    def num_rows(self) -> int:
        """Rows that the plan takes in a step."""
        return self.num_drafts + self.num_branches * self.block_length


NO_DRAFTS = DraftPlan(0, 0, 1)
"""The plan of a prefill chunk that does not reach the end of its prompt."""


@dataclass(frozen=True, slots=True)
class Admission:
    """A request takes a slot: everything the device has to know about it."""

    slot: int
    num_computed: int
    last_token_id: int
    wanted: int
    sampling: SamplingParams


@dataclass(frozen=True, slots=True)
class ScheduledRequest:
    """One request's share of a step.

    ``prefill_token_ids`` are computed causally at the positions after its computed tokens; drafts follow. ``max_computed`` is
    an upper bound of its computed tokens when the step starts, exact at loop depth 0.
    """

    request_id: str
    slot: int
    prefill_token_ids: tuple[int, ...]
    draft_plan: DraftPlan
    max_computed: int

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
    really verified. ``num_held`` drafts are ready for the next step: 1 after a miss.
    """

    token_ids: tuple[int, ...]
    num_drafts: int
    num_held: int


@dataclass(frozen=True, slots=True)
class StepResult:
    """The judged step, read back by the host."""

    step_id: int
    requests: tuple[RequestResult, ...]
