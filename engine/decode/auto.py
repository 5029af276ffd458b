"""``auto``: the plan with the best measured goodput at the load of the moment."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import numpy as np

from engine.decode.goodput import AR, Acceptance, CostTable, PlanShape, goodput, plan_shapes
from engine.decode.policy import Drafting, allowed_branches, draft_plans, num_useful_branches
from engine.sampling_params import DecodingMode
from engine.step import BoolArray, DraftPlan, IntArray
from engine.step_sizes import StepSizes

STEPS_BETWEEN_CHOICES = 16

HYSTERESIS = 1.01
"""Another plan must promise this much more than the one in force, so that noise does not make plans alternate."""

STEPS_BETWEEN_PROBES = 64
"""While the plan drafts nothing, or short blocks, one request drafts a whole block every so often: else nothing more would be
learnt about the acceptance of what is not drafted."""


class GoodputPolicy:
    """Chooses one plan for all requests of ``auto``, every few steps and whenever the load has changed.

    Until acceptance is measured the configured plan is in force. The plan never changes what is emitted, so that a choice by
    the clock is harmless.
    """

    mode: ClassVar[DecodingMode] = DecodingMode.TIDAR
    verifies: ClassVar[bool] = True

    def __init__(self, configured: Drafting, costs: CostTable, captured: StepSizes | None = None) -> None:
        """``captured``: the sizes of captured steps; None where steps are not captured."""
        self._costs, self._captured = costs, captured
        self._has_anchor, self._max_length = configured.has_anchor, configured.block_length
        # A drafter whose blocks begin with a copy was trained on whole blocks alone.
        self._shapes = plan_shapes(configured.block_length, has_short_blocks=not configured.has_anchor)
        self._acceptance = Acceptance(configured.block_length)
        self._outcomes: list[tuple[IntArray, IntArray, IntArray, BoolArray]] = []
        self._steps, self._chosen_at, self._load = 0, -STEPS_BETWEEN_CHOICES, 0
        self._probes = False
        self.shape = PlanShape(configured.block_length, configured.num_branches)
        self.expected_by_name: tuple[tuple[str, float], ...] = ()

    def begin_step(self, num_requests: int, context: float) -> None:
        """A step of ``num_requests`` running requests with ``context`` tokens each on average is being planned."""
        self._steps += 1
        is_short = self.shape.block_length < self._max_length
        # A probe that is due waits for a step that has room for it.
        self._probes = is_short and (self._probes or self._steps % STEPS_BETWEEN_PROBES == 0)
        is_due = self._steps - self._chosen_at >= STEPS_BETWEEN_CHOICES or not 0.75 <= num_requests / max(1, self._load) <= 1.33
        if num_requests and is_due:
            self._learn()
            if self._acceptance.is_measured:
                self._choose(num_requests, context)

    def _choose(self, num_requests: int, context: float) -> None:
        self._chosen_at, self._load = self._steps, num_requests
        places = None if self._captured is None else self._captured.num_places(num_requests)
        expected = {
            shape: goodput(shape, self._acceptance, self._costs, num_requests, context, int(self._has_anchor), places)
            for shape in self._candidates(num_requests)
        }
        self.expected_by_name = tuple((str(shape), value) for shape, value in expected.items())
        best = max(expected, key=expected.__getitem__)
        if expected[best] > HYSTERESIS * expected.get(self.shape, 0.0):
            self.shape = best

    def _candidates(self, num_requests: int) -> Iterable[PlanShape]:
        """The plans to compare: where steps are captured, only what was captured for so many requests, and ``ar``."""
        shapes = dict.fromkeys((*self._shapes, self.shape))
        if self._captured is None:
            return shapes
        plans = {s: DraftPlan(s.block_length, s.num_branches, s.block_length, self._has_anchor) for s in shapes}
        return [s for s in shapes if s == AR or self._captured.covers(num_requests, plans[s])]

    def observe(self, plans_N4: IntArray, num_drafts_N: IntArray, num_accepted_N: IntArray, is_hit_N: BoolArray) -> None:
        """What became of requests' decode steps: drafts verified and accepted, and whether a branch was hit.

        The arrays are kept until plans are compared again: a few hundred outcomes or some thousand take as long to learn from.
        """
        self._outcomes.append((plans_N4[:, 1], num_drafts_N, num_accepted_N, is_hit_N))

    def _learn(self) -> None:
        """Take the outcomes since the last time into account."""
        if not self._outcomes:
            return
        num_branches_N, num_drafts_N, num_accepted_N, is_hit_N = map(np.concatenate, zip(*self._outcomes, strict=True))
        self._outcomes.clear()
        self._acceptance.observe(num_drafts_N, num_accepted_N)
        is_partial_N = (num_branches_N > 0) & (num_branches_N < num_drafts_N)
        self._acceptance.observe_hits(is_hit_N[is_partial_N], num_drafts_N[is_partial_N], num_branches_N[is_partial_N])

    def plans(self, held_N: IntArray, wanted_N: IntArray, is_verifying: bool) -> IntArray:
        length, num_branches = self.shape.block_length, self.shape.num_branches
        if self.shape == AR:
            plans = draft_plans(np.ones_like(held_N), 0, 1, False)
        else:
            num_drafts_N = np.minimum(held_N, wanted_N)
            useful_N = num_useful_branches(num_drafts_N, wanted_N)
            allowed = allowed_branches(num_branches, held_N, is_verifying)
            plans = draft_plans(num_drafts_N, np.minimum(useful_N, allowed), length, self._has_anchor)
        is_longer_N = held_N > length  # a probe's drafts, or those of the plan before
        if is_longer_N.any():
            num_drafts_N = np.minimum(held_N, wanted_N)[is_longer_N]
            plans[is_longer_N] = draft_plans(num_drafts_N, 0, self._max_length, self._has_anchor)
        if self._probes and not (self.shape != AR and num_branches == 0 and is_verifying):
            self._probe(plans, held_N, wanted_N)
        return plans

    def _probe(self, plans_N4: IntArray, held_N: IntArray, wanted_N: IntArray) -> None:
        """Have the first request that can draft a whole block do so."""
        rows = np.flatnonzero((held_N == 1) & (wanted_N > 2))
        if len(rows):
            self._probes = False
            plans_N4[rows[0]] = (1, 1, self._max_length, self._has_anchor)

    def __str__(self) -> str:
        return f"the plan with the best measured goodput, first {self.shape}"
