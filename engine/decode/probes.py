"""Trying whole blocks while the plan in force drafts nothing, or short ones: else nothing more would be learnt about the rest.

A probe is a redraft with a whole block, and the step that verifies it. Either *one* request does so beside the others, which
takes a step of two plans, or *all* do, for a few steps of ``linear``. One is cheaper where steps run as they come; a step of
two plans is not captured, though, and where steps are short launching it operation by operation may cost many of them.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping

import numpy as np

from engine.decode.costs import CostTable
from engine.decode.goodput import AR, Execution, PlanShape
from engine.decode.policy import Drafting, draft_plans
from engine.step import IntArray

SHARE_OF_TIME = 0.002
"""What probes may cost, of the tokens that the plan in force gives. They are for acceptance that has changed: a plan of which
too little is known is tried anyway (``engine.decode.auto.OPTIMISM``)."""

LEAST_STEPS_BETWEEN = 64


class Probe(enum.Enum):
    """Who drafts whole blocks in this step."""

    NOBODY = enum.auto()
    ONE = enum.auto()
    ALL = enum.auto()


class Probes:
    """When to probe, and how. ``now`` is for the step that is being planned."""

    def __init__(self, block_length: int, costs: CostTable, execution: Execution) -> None:
        self._costs, self._execution, self._block_length = costs, execution, block_length
        self.policy = Drafting(block_length, 0, execution.has_anchor)
        """That of everybody while all probe."""
        self.now = Probe.NOBODY
        self._next, self._interval, self._steps_since = Probe.NOBODY, math.inf, 0
        self._steps_left, self._steps_of_all, self._has_drafted, self._turn = 0, 0, False, 0

    def plan(self, shape: PlanShape, goodputs: Mapping[PlanShape, float], num_requests: int, context: float) -> None:
        """Choose the cheaper way for this plan and load, and how often it can be afforded.

        ``goodputs``: tokens per second that are expected of each plan that can be run.
        """
        self._next, self._interval = Probe.NOBODY, math.inf
        if shape.block_length == self._block_length:
            self.now = Probe.NOBODY
            return
        self._steps_of_all = 2 if shape == AR else 3  # whoever holds drafts verifies them first
        costs = {Probe.ONE: self._cost_of_one(shape, num_requests, context)}
        whole = PlanShape(self._block_length, 0)
        if whole in goodputs:
            lost = 1.0 - goodputs[whole] / goodputs[shape]
            seconds = self._seconds(num_requests, self._block_length + 1, context)
            costs[Probe.ALL] = max(0.0, lost) * seconds * self._steps_of_all
        self._next = min(costs, key=costs.__getitem__)
        step = self._seconds(num_requests, shape.block_length, context)
        self._interval = max(LEAST_STEPS_BETWEEN, costs[self._next] / (SHARE_OF_TIME * step))

    def begin_step(self) -> None:
        """Another step is being planned."""
        self._steps_since += 1
        if self.now is Probe.ALL or self._has_drafted:
            self._steps_left -= 1
            if self._steps_left == 0:
                self.now, self._has_drafted = Probe.NOBODY, False
        if self.now is Probe.NOBODY and self._steps_since >= self._interval:
            self.now, self._steps_since = self._next, 0
            self._steps_left = self._steps_of_all if self.now is Probe.ALL else 2

    def have_one(self, plans_N4: IntArray, held_N: IntArray, wanted_N: IntArray, block_length: int, may_draft: bool) -> None:
        """Have one request that can draft a whole block do so, in the first step that may; verify it in the next one.

        A request can that holds no block. Where all hold one, one runs no branch, which leaves it without. They take turns:
        requests differ in how often they are accepted.
        """
        if self._has_drafted:
            rows = np.flatnonzero(held_N > block_length)
            whole = draft_plans(np.minimum(held_N, wanted_N)[rows], 0, self._block_length, self._execution.has_anchor)
            plans_N4[rows] = whole
        elif may_draft and len(rows := np.flatnonzero((held_N == 1) & (wanted_N > 2))):
            plans_N4[rows[self._turn % len(rows)]] = (1, 1, self._block_length, self._execution.has_anchor)
            self._has_drafted, self._turn = True, self._turn + 1
        elif may_draft and len(rows := np.flatnonzero(wanted_N > 2 + block_length)):
            plans_N4[rows[self._turn % len(rows)], 1] = 0

    def _cost_of_one(self, shape: PlanShape, num_requests: int, context: float) -> float:
        """Seconds that the rows of one request's block take, and the steps' launching; where it drafts, its own tokens."""
        step = self._seconds(num_requests, shape.block_length, context)
        rows = num_requests * shape.block_length + self._block_length
        with_block = max(self._costs.uncaptured, self._costs.cost(num_requests, rows, context))
        return 2 * max(0.0, with_block - step) + (0.0 if shape == AR else 2 * step / num_requests)

    def _seconds(self, num_requests: int, rows_each: int, context: float) -> float:
        """Of a step whose requests all have so many rows, in its captured size."""
        return self._costs.cost_in_places(num_requests, self._execution.num_places(num_requests), rows_each, context)
