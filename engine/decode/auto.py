"""``auto``: the plan with the best measured goodput at the load of the moment."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import ClassVar

from engine.decode.goodput import AR, Acceptance, CostTable, PlanShape, goodput, plan_shapes
from engine.decode.policy import Drafting, num_useful_branches
from engine.sampling_params import DecodingMode
from engine.step import DraftPlan

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
    min_emitted: ClassVar[int] = 1

    def __init__(
        self, configured: Drafting, costs: CostTable, is_captured: Callable[[int, DraftPlan], bool] | None = None
    ) -> None:
        """``is_captured``: whether a step of so many requests with this plan is replayed; None where no step is captured."""
        self._costs, self._anchor_rows, self._is_captured = costs, int(configured.has_anchor), is_captured
        self._has_anchor, self._max_length = configured.has_anchor, configured.block_length
        # A drafter whose blocks begin with a copy was trained on whole blocks alone.
        self._shapes = plan_shapes(configured.block_length, has_short_blocks=not configured.has_anchor)
        self._acceptance = Acceptance(configured.block_length)
        self._steps, self._chosen_at, self._load = 0, -STEPS_BETWEEN_CHOICES, 0
        self._probes = False
        self.shape = PlanShape(configured.block_length, configured.num_branches)
        self.expected_by_name: tuple[tuple[str, float], ...] = ()

    def begin_step(self, num_requests: int, context: float) -> None:
        """A step of ``num_requests`` running requests with ``context`` tokens each on average is being planned."""
        self._steps += 1
        is_short = self.shape.block_length < self._max_length
        self._probes = is_short and self._steps % STEPS_BETWEEN_PROBES == 0
        is_due = self._steps - self._chosen_at >= STEPS_BETWEEN_CHOICES or not 0.75 <= num_requests / max(1, self._load) <= 1.33
        if num_requests and is_due and self._acceptance.is_measured:
            self._choose(num_requests, context)

    def _choose(self, num_requests: int, context: float) -> None:
        self._chosen_at, self._load = self._steps, num_requests
        is_uniform = self._is_captured is not None
        expected = {
            shape: goodput(shape, self._acceptance, self._costs, num_requests, context, self._anchor_rows, is_uniform)
            for shape in self._candidates(num_requests)
        }
        self.expected_by_name = tuple((str(shape), value) for shape, value in expected.items())
        best = max(expected, key=expected.__getitem__)
        if expected[best] > HYSTERESIS * expected.get(self.shape, 0.0):
            self.shape = best

    def _candidates(self, num_requests: int) -> Iterable[PlanShape]:
        """The plans to compare: where steps are captured, only what was captured for so many requests, and ``ar``."""
        shapes = dict.fromkeys((*self._shapes, self.shape))
        if self._is_captured is None:
            return shapes
        plans = {s: DraftPlan(s.block_length, s.num_branches, s.block_length, self._has_anchor) for s in shapes}
        return [s for s in shapes if s == AR or self._is_captured(num_requests, plans[s])]

    def observe(self, plan: DraftPlan, num_drafts: int, num_accepted: int, is_hit: bool) -> None:
        """What became of one request's decode step."""
        if num_drafts < 2:
            return
        self._acceptance.observe(num_drafts, num_accepted)
        if 0 < plan.num_branches < num_drafts:
            self._acceptance.observe_hit(is_hit, num_drafts, plan.num_branches)

    def num_emitted(self, held: int) -> int:
        return 1

    def plan(self, held: int, wanted: int) -> DraftPlan:
        length, num_branches = self.shape.block_length, self.shape.num_branches
        if held == 1 and self._probes:
            self._probes, length = False, self._max_length
            return DraftPlan(1, min(1, num_useful_branches(1, wanted)), length, self._has_anchor)
        if held > length:  # a probe's drafts, or those of the plan before
            return DraftPlan(min(held, wanted), 0, self._max_length, self._has_anchor)
        if self.shape == AR:
            return DraftPlan(1, 0, 1)
        num_drafts = min(held, wanted)
        allowed = num_branches if held > 1 else 1
        return DraftPlan(num_drafts, min(allowed, num_useful_branches(num_drafts, wanted)), length, self._has_anchor)

    def __str__(self) -> str:
        return f"the plan with the best measured goodput, first {self.shape}"
