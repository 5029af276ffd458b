"""The draft plan with the most expected tokens per second: pure arithmetic on what was measured.

Acceptance hardly changes with the load, but what a row costs does: next to nothing while the weights have to be streamed
anyway, and its full price once the machine computes without pause. So plans are compared by goodput, expected tokens of a
step over its seconds, at the load of the moment.

A drafting request is in one of two states. It *holds* a block: the step verifies ``n`` drafts beside ``b`` branches, emits as
many tokens as it accepts, and keeps holding if one of those branches was hit. Or it holds nothing: the redraft emits one token
with one branch, which is always hit. With the chance ``h`` of a hit, ``1 / (2 - h)`` of its steps are of the first kind.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.decode.acceptance import Acceptance
from engine.decode.costs import CostTable
from engine.step import DraftPlan
from engine.step_sizes import StepSizes


@dataclass(frozen=True, slots=True)
class PlanShape:
    """One plan that may be taken: ``block_length`` drafts beside ``num_branches`` branches; a length of 1 is ``ar``."""

    block_length: int
    num_branches: int

    def plan(self, has_anchor: bool) -> DraftPlan:
        """Of a request that holds a whole block."""
        return DraftPlan(self.block_length, self.num_branches, self.block_length, has_anchor)

    def steps(self, has_anchor: bool) -> list[DraftPlan]:
        """Of steps whose requests are all alike: all hold a block, or all redraft."""
        return [PLAIN] if self == AR else [self.plan(has_anchor), DraftPlan(1, 1, self.block_length, has_anchor)]

    def __str__(self) -> str:
        if self.block_length == 1:
            return "ar"
        name = f"tidar-{self.num_branches}" if self.num_branches else "linear"
        return f"{name} of {self.block_length}"


AR, PLAIN = PlanShape(1, 0), DraftPlan(1, 0, 1)
"""Plain decoding, and the plan of a request that decodes so."""


def plan_shapes(block_length: int, has_short_blocks: bool = True) -> tuple[PlanShape, ...]:
    """All plans that are compared, ``ar`` first. Blocks may be shorter than the trained ones."""
    lengths = {block_length, block_length // 2, block_length // 4} if has_short_blocks else {block_length}
    shapes = [
        PlanShape(length, branches)
        for length in sorted(length for length in lengths if length >= 4 or length == block_length)
        for branches in sorted({0, 1, 2, 3, 5, 7, length})
        if branches <= length
    ]
    return (AR, *shapes)


@dataclass(frozen=True, slots=True)
class Execution:
    """How an engine runs the steps of its plans.

    ``is_ahead``: a step is planned before the one before it was read, so that who has run a branch gets the rows of a whole
    block, hit or not. ``captured``: the sizes of captured steps, None where none are. ``max_rows``: of a step; None: any.
    ``has_anchor``: a branch begins with a copy of its draft.
    """

    captured: StepSizes | None = None
    is_ahead: bool = False
    max_rows: int | None = None
    has_anchor: bool = False

    def num_places(self, num_requests: int) -> int:
        """Requests that a step of so many has room for."""
        return num_requests if self.captured is None else self.captured.num_places(num_requests)

    def can_run(self, shape: PlanShape, num_requests: int, level: int = 0) -> bool:
        """Whether so many requests can follow a plan in whole steps; where some are captured, in captured ones of ``level``."""
        plans = shape.steps(self.has_anchor)
        if self.max_rows is not None and any(num_requests * plan.num_rows > self.max_rows for plan in plans):
            return False
        return self.captured is None or all(self.captured.covers(num_requests, plan, level) for plan in plans)


@dataclass(frozen=True, slots=True)
class Expected:
    """Of one request under a plan, in the steady state: tokens of a step on average, and its two kinds of steps.

    ``holding`` is the share of steps that hold a block and have ``held_rows``; the others are redrafts with ``redraft_rows``.
    """

    tokens_per_step: float
    holding: float
    held_rows: int
    redraft_rows: int

    @property
    def rows_per_step(self) -> float:
        """On average."""
        return self.holding * self.held_rows + (1 - self.holding) * self.redraft_rows


def expect(shape: PlanShape, acceptance: Acceptance, has_anchor: bool = False) -> Expected:
    """Tokens and rows of a step in the steady state."""
    if shape == AR:
        return Expected(1.0, 1.0, 1, 1)
    counts = acceptance.counts(shape.block_length)
    hit = 1.0 if shape.num_branches >= shape.block_length else acceptance.chance_of_hit(counts, shape.num_branches)
    holding = 1.0 / (2.0 - hit) if shape.num_branches else 0.5
    tokens = sum(count * chance for count, chance in enumerate(counts, start=1))
    held, redraft = shape.steps(has_anchor)
    return Expected(holding * tokens + (1 - holding), holding, held.num_rows, redraft.num_rows)


def kinds_of_steps(expected: Expected, shape: PlanShape, num_requests: int, execution: Execution) -> list[tuple[float, float]]:
    """Of steps of ``num_requests`` requests: kinds that cost differently, their shares and the rows of a request.

    In ``linear`` all requests are in one phase, and nobody can hit. With branches, a step planned ahead has the rows of whole
    blocks for everybody; a captured one those of the largest request, so that a redraft is free unless all redraft. Otherwise
    requests hold or redraft independently: two kinds with the mean and the spread that the rows of so many have, which for one
    request are just its own.
    """
    holding, held, redraft = expected.holding, float(expected.held_rows), float(expected.redraft_rows)
    if not shape.num_branches:
        return [(holding, held), (1 - holding, redraft)]
    if execution.is_ahead:
        return [(1.0, held)]
    if execution.captured is not None:
        all_redraft = (1 - holding) ** num_requests
        return [(1 - all_redraft, held), (all_redraft, redraft)]
    mean, narrowing = expected.rows_per_step, num_requests**-0.5
    return [(share, mean + (rows - mean) * narrowing) for share, rows in ((holding, held), (1 - holding, redraft))]


def goodput(
    shape: PlanShape, acceptance: Acceptance, costs: CostTable, num_requests: int, context: float, execution: Execution
) -> float:
    """Expected tokens per second of ``num_requests`` requests with ``context`` cached tokens each that all follow one plan."""
    expected = expect(shape, acceptance, execution.has_anchor)
    places = execution.num_places(num_requests)
    kinds = kinds_of_steps(expected, shape, num_requests, execution)
    seconds = sum(share * costs.cost_in_places(num_requests, places, rows, context) for share, rows in kinds)
    return num_requests * expected.tokens_per_step / seconds
