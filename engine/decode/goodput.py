"""The draft plan with the most expected tokens per second: pure arithmetic on what was measured.

Acceptance hardly changes with the load, but what a row costs does: next to nothing while the weights have to be streamed
anyway, and its full price once the machine computes without pause. So plans are compared by goodput, expected tokens of a
step over its seconds, at the load of the moment.

A drafting request is in one of two states. It *holds* a block: the step verifies ``n`` drafts beside ``b`` branches, emits as
many tokens as it accepts, and keeps holding if one of those branches was hit. Or it holds nothing: the redraft emits one token
with one branch, which is always hit. With the chance ``h`` of a hit, ``1 / (2 - h)`` of its steps are of the first kind.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.step import BoolArray, DraftPlan, IntArray

PRIOR_ACCEPTANCE, PRIOR_WEIGHT = 0.7, 32.0
"""What is expected of the first guess before anything was measured, and how many outcomes an expectation is worth. That of a
later guess is what the one before it has given."""

MAX_OUTCOMES = 8000.0
"""From here on old outcomes fade."""

ENOUGH_OUTCOMES = 32.0
"""First guesses that must have been tried before plans are compared; until then the configured plan is in force."""


@dataclass(frozen=True, slots=True)
class PlanShape:
    """One plan that may be taken: ``block_length`` drafts beside ``num_branches`` branches; a length of 1 is ``ar``."""

    block_length: int
    num_branches: int

    def plan(self, has_anchor: bool) -> DraftPlan:
        """Of a request that holds a whole block."""
        return DraftPlan(self.block_length, self.num_branches, self.block_length, has_anchor)

    def __str__(self) -> str:
        if self.block_length == 1:
            return "ar"
        name = f"tidar-{self.num_branches}" if self.num_branches else "linear"
        return f"{name} of {self.block_length}"


AR = PlanShape(1, 0)


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
class CostTable:
    """Seconds of a step, measured: ``seconds[i][j]`` at ``num_requests[i]`` requests with ``rows[i][j]`` rows in all.

    Both ascend. Between measured points the cost is linear. Behind the last one a row is taken to cost what it costs there on
    average, which is its full price: what was not measured should not look cheap.
    ``uncaptured`` is the least that a step takes which is launched operation by operation, where others are replayed; else 0.
    ``per_kv_token`` is added for each token in the cache of a request, ``per_row_token`` for each row and token that it sees.
    """

    num_requests: tuple[int, ...]
    rows: tuple[tuple[int, ...], ...]
    seconds: tuple[tuple[float, ...], ...]
    per_kv_token: float = 0.0
    per_row_token: float = 0.0
    uncaptured: float = 0.0

    @staticmethod
    def of_plain(values: Mapping[str, Any]) -> CostTable:
        """From what ``asdict`` gives, lists for tuples. Raises TypeError for other fields."""
        return CostTable(**{name: _as_tuples(value) for name, value in values.items()})

    def cost(self, num_requests: int, rows: float, context: float = 0.0) -> float:
        """Seconds of a step of ``num_requests`` requests with ``rows`` rows in all and ``context`` cached tokens each."""
        base = self._base(num_requests, rows / num_requests)
        return base + context * (num_requests * self.per_kv_token + rows * self.per_row_token)

    def cost_in_places(self, num_requests: int, places: int, rows_each: float, context: float) -> float:
        """Seconds of a step with ``places`` for requests, each of ``rows_each`` rows, some of which nobody has: a place that is
        nobody's costs rows, but has no tokens in the cache.
        """
        return self.cost(places, places * rows_each, context * num_requests / places)

    def _base(self, num_requests: int, rows_each: float) -> float:
        at_each = [
            _interpolate(rows, seconds, rows_each * n)
            for n, rows, seconds in zip(self.num_requests, self.rows, self.seconds, strict=True)
        ]
        return _interpolate(self.num_requests, at_each, num_requests)


def _as_tuples(value: Any) -> Any:
    return tuple(_as_tuples(v) for v in value) if isinstance(value, list) else value


def _interpolate(xs: Sequence[float], ys: Sequence[float], x: float) -> float:
    """Piecewise linear through ascending ``xs``; constant in front of the first, proportional behind the last."""
    if x <= xs[0]:
        return ys[0]
    if x > xs[-1]:
        return ys[-1] * x / xs[-1]
    i = bisect.bisect_left(xs, x)
    return ys[i - 1] + (ys[i] - ys[i - 1]) * (x - xs[i - 1]) / (xs[i] - xs[i - 1])


class Acceptance:
    """How often draft ``i`` is accepted when all before it are, kept from outcomes that fade."""

    def __init__(self, block_length: int) -> None:
        self._tried = [0.0] * block_length
        self._accepted = [0.0] * block_length
        self._misses, self._blind_misses = 0.0, 0.0

    @staticmethod
    def known(rates: Sequence[float]) -> Acceptance:
        """After very many outcomes of guesses that are accepted at these rates, the first guess's first; for simulations."""
        acceptance = Acceptance(len(rates) + 1)
        for i, rate in enumerate(rates, start=1):
            acceptance._tried[i], acceptance._accepted[i] = 1e9, 1e9 * rate
        return acceptance

    @property
    def is_measured(self) -> bool:
        """Whether enough is known to compare plans."""
        return len(self._tried) > 1 and self._tried[1] >= ENOUGH_OUTCOMES

    def observe(self, num_drafts_N: IntArray, num_accepted_N: IntArray) -> None:
        """Requests verified ``num_drafts`` drafts, the certain one included, and accepted ``num_accepted``."""
        length = len(self._tried)
        tried_up_to = np.bincount(np.minimum(num_accepted_N, num_drafts_N - 1).clip(min=0), minlength=length)
        accepted = np.bincount(num_accepted_N, minlength=length + 1)
        tried_at, accepted_at = _or_more(tried_up_to), _or_more(accepted)
        for i in range(1, length):
            self._tried[i] += tried_at[i]
            self._accepted[i] += accepted_at[i + 1]
            if self._tried[i] > MAX_OUTCOMES:
                self._tried[i] /= 2
                self._accepted[i] /= 2

    def observe_hits(self, is_hit_N: BoolArray, num_drafts_N: IntArray, num_branches_N: IntArray) -> None:
        """Where one of ``num_branches`` branches behind ``num_drafts`` drafts was hit, fewer branches than drafts."""
        self._misses += float(len(is_hit_N) - np.count_nonzero(is_hit_N))
        width = len(self._tried) + 1
        kinds = np.bincount(num_drafts_N * width + num_branches_N)
        for kind in np.flatnonzero(kinds).tolist():
            num_drafts, num_branches = divmod(kind, width)
            blind_miss = 1.0 - blind_chance(self.counts(num_drafts), num_branches)
            self._blind_misses += float(kinds[kind]) * blind_miss
        if self._blind_misses > MAX_OUTCOMES:
            self._misses /= 2
            self._blind_misses /= 2

    def counts(self, num_drafts: int) -> list[float]:
        """Chances that exactly ``1 .. num_drafts`` drafts are accepted; a position that was never tried is like the last."""
        chances, survival, rate = [], 1.0, PRIOR_ACCEPTANCE
        for i in range(1, num_drafts):
            tried, accepted = self._tried[i], self._accepted[i]
            rate = (accepted + PRIOR_WEIGHT * rate) / (tried + PRIOR_WEIGHT)
            chances.append(survival * (1 - rate))
            survival *= rate
        return [*chances, survival]

    def chance_of_hit(self, counts: Sequence[float], num_branches: int) -> float:
        """That one of ``num_branches`` branches is hit.

        Branches are ranked for each request by its own drafts, which misses less often than ranking by ``counts``; by which
        factor is measured, and taken for all numbers of branches alike.
        """
        blind_miss = 1.0 - blind_chance(counts, num_branches)
        better = (self._misses + ENOUGH_OUTCOMES) / (self._blind_misses + ENOUGH_OUTCOMES)
        return 1.0 - blind_miss * min(1.0, better)


def _or_more(counts: IntArray) -> list[int]:
    """How many are at least ``i``, for every ``i``, from how many are exactly ``i``."""
    at_least: list[int] = counts[::-1].cumsum()[::-1].tolist()
    return at_least


def blind_chance(counts: Sequence[float], num_branches: int) -> float:
    """The chance of a hit when the same branches, the likeliest by ``counts``, are run for everybody."""
    return min(1.0, sum(sorted(counts, reverse=True)[:num_branches]))


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


def expect(shape: PlanShape, acceptance: Acceptance, anchor_rows: int = 0) -> Expected:
    """Tokens and rows of a step in the steady state; ``anchor_rows`` is 1 where a branch copies its draft."""
    if shape.block_length == 1:
        return Expected(1.0, 1.0, 1, 1)
    length, branch_rows = shape.block_length, shape.block_length + anchor_rows
    counts = acceptance.counts(length)
    hit = 1.0 if shape.num_branches >= length else acceptance.chance_of_hit(counts, shape.num_branches)
    holding = 1.0 / (2.0 - hit) if shape.num_branches else 0.5
    tokens = sum(count * chance for count, chance in enumerate(counts, start=1))
    return Expected(holding * tokens + (1 - holding), holding, length + shape.num_branches * branch_rows, 1 + branch_rows)


def kinds_of_steps(expected: Expected, shape: PlanShape, num_requests: int, is_uniform: bool) -> list[tuple[float, float]]:
    """Of steps of ``num_requests`` requests: kinds that cost differently, their shares and the rows of a request.

    In ``linear`` all requests are in one phase. ``is_uniform``: all get the rows of the largest one, as in a captured step, so
    that a redraft is free unless all redraft. Otherwise requests hold or redraft independently: two kinds with the mean and the
    spread that the rows of so many have, which for one request are just its own.
    """
    holding, held, redraft = expected.holding, float(expected.held_rows), float(expected.redraft_rows)
    if is_uniform and shape.num_branches:
        all_redraft = (1 - holding) ** num_requests
        return [(1 - all_redraft, held), (all_redraft, redraft)]
    if shape.num_branches:
        mean, narrowing = expected.rows_per_step, num_requests**-0.5
        held, redraft = (mean + (rows - mean) * narrowing for rows in (held, redraft))
    return [(holding, held), (1 - holding, redraft)]


def goodput(
    shape: PlanShape,
    acceptance: Acceptance,
    costs: CostTable,
    num_requests: int,
    context: float,
    anchor_rows: int = 0,
    num_places: int | None = None,
) -> float:
    """Expected tokens per second of ``num_requests`` requests that all follow one plan.

    ``num_places``: requests that a captured step of so many has room for, each with the same rows; None where a step has just
    the rows that it needs.
    """
    expected = expect(shape, acceptance, anchor_rows)
    places = num_requests if num_places is None else num_places
    kinds = kinds_of_steps(expected, shape, num_requests, num_places is not None)
    seconds = sum(share * costs.cost_in_places(num_requests, places, rows, context) for share, rows in kinds)
    return num_requests * expected.tokens_per_step / seconds
