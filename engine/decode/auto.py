"""``auto``: the plan with the best measured goodput at the load of the moment."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import numpy as np

from engine.decode.goodput import AR, Acceptance, CostTable, PlanShape, goodput, plan_shapes
from engine.decode.policy import Autoregressive, Drafting, DraftPolicy
from engine.decode.probes import Probe, Probes
from engine.sampling_params import DecodingMode
from engine.step import BoolArray, IntArray
from engine.step_sizes import StepSizes

STEPS_BETWEEN_CHOICES = 16

HYSTERESIS = 1.01
"""Another plan must promise this much more than the one in force, so that noise does not make plans alternate; and every plan
more than ``ar``, or a small error in what was measured would make it slower than plain decoding."""


class GoodputPolicy:
    """Chooses one plan for all requests of ``auto``, every few steps and whenever the load has changed.

    Until acceptance is measured the configured plan is in force. The plan never changes what is emitted, so that a choice by
    the clock is harmless. Drafts that a request holds from a plan with longer blocks are cut to those of the new one: a step
    of several plans is not one of those that are captured.
    """

    mode: ClassVar[DecodingMode] = DecodingMode.TIDAR
    verifies: ClassVar[bool] = True

    def __init__(self, configured: Drafting, costs: CostTable, captured: StepSizes | None = None) -> None:
        """``captured``: the sizes of captured steps; None where steps are not captured."""
        self._costs, self._captured, self._has_anchor = costs, captured, configured.has_anchor
        # A drafter whose blocks begin with a copy was trained on whole blocks alone.
        self._shapes = plan_shapes(configured.block_length, has_short_blocks=not configured.has_anchor)
        self._acceptance = Acceptance(configured.block_length)
        self._outcomes: list[tuple[IntArray, IntArray, IntArray, BoolArray]] = []
        self._probes = Probes(configured.block_length, configured.has_anchor, costs, captured)
        self._steps, self._chosen_at, self._load = 0, -STEPS_BETWEEN_CHOICES, 0
        self.expected_by_name: tuple[tuple[str, float], ...] = ()
        self._follow(PlanShape(configured.block_length, configured.num_branches))

    def _follow(self, shape: PlanShape) -> None:
        self.shape = shape
        drafting = Drafting(shape.block_length, shape.num_branches, self._has_anchor)
        self._policy: DraftPolicy = Autoregressive() if shape == AR else drafting

    def begin_step(self, num_requests: int, context: float) -> None:
        """A step of ``num_requests`` running requests with ``context`` tokens each on average is being planned."""
        self._steps += 1
        is_due = self._steps - self._chosen_at >= STEPS_BETWEEN_CHOICES or not 0.75 <= num_requests / max(1, self._load) <= 1.33
        if num_requests and is_due:
            self._learn()
            if self._acceptance.is_measured:
                self._choose(num_requests, context)
        self._probes.begin_step()

    def _choose(self, num_requests: int, context: float) -> None:
        self._chosen_at, self._load = self._steps, num_requests
        places = None if self._captured is None else self._captured.num_places(num_requests)
        expected = {
            shape: goodput(shape, self._acceptance, self._costs, num_requests, context, int(self._has_anchor), places)
            for shape in self._candidates(num_requests)
        }
        self.expected_by_name = tuple((str(shape), value) for shape, value in expected.items())
        best = max(expected, key=expected.__getitem__)
        if expected[best] <= HYSTERESIS * expected[AR]:
            self._follow(AR)
        elif expected[best] > HYSTERESIS * expected.get(self.shape, 0.0):
            self._follow(best)
        self._probes.plan(self.shape, expected, num_requests, context)

    def _candidates(self, num_requests: int) -> Iterable[PlanShape]:
        """The plans to compare: where steps are captured, only what was captured for so many requests, and ``ar``."""
        shapes = dict.fromkeys((*self._shapes, self.shape))
        if self._captured is None:
            return shapes
        return [s for s in shapes if s == AR or self._captured.covers(num_requests, s.plan(self._has_anchor))]

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
        if self._probes.now is Probe.ALL:
            return self._probes.policy.plans(held_N, wanted_N, is_verifying)
        plans = self._policy.plans(held_N, wanted_N, is_verifying)
        if self._probes.now is Probe.ONE:
            # Requests of ``linear`` redraft together.
            may_draft = not (isinstance(self._policy, Drafting) and self._policy.num_branches == 0 and is_verifying)
            self._probes.have_one(plans, held_N, wanted_N, self.shape.block_length, may_draft)
        return plans

    def __str__(self) -> str:
        return f"the plan with the best measured goodput, first {self.shape}"
