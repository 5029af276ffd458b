"""``auto``: the plan with the best measured goodput at the load of the moment."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from engine.decode.acceptance import Acceptance
from engine.decode.costs import CostTable
from engine.decode.goodput import AR, Execution, PlanShape, goodput, plan_shapes
from engine.decode.policy import Autoregressive, Drafting, DraftPolicy
from engine.decode.probes import Probe, Probes
from engine.sampling_params import DecodingMode
from engine.step import BoolArray, IntArray

STEPS_BETWEEN_CHOICES = 16

HYSTERESIS = 1.01
"""Another plan must promise this much more than the one in force, so that noise does not make plans alternate; and every plan
more than ``ar``, so that doubt is not enough to draft once many outcomes are known."""

OPTIMISM = 2.0
"""A plan promises what is expected of it and so many standard errors of its drafts' acceptance more: one of which little is
known is tried until it is known to be worse, since one that bad luck has ruled out would give no more outcomes that show it
(upper confidence bounds: Auer, Cesa-Bianchi and Fischer, 2002). Outcomes fade, so that about 1% of optimism stays."""


class GoodputPolicy:
    """Chooses one plan for all requests of ``auto``, every few steps and whenever the load has changed.

    Until acceptance is measured the configured plan is in force, captured or not. The plan never changes what is emitted, so
    that a choice by the clock is harmless. Drafts that a request holds from a plan with longer blocks are cut to those of the
    new one: a step of several plans is not one of those that are captured.
    """

    mode: ClassVar[DecodingMode] = DecodingMode.TIDAR
    verifies: ClassVar[bool] = True

    def __init__(self, configured: Drafting, costs: CostTable, execution: Execution | None = None) -> None:
        """``execution``: how the engine runs steps, as ``configured`` has its anchor."""
        self._costs = costs
        self._execution = Execution(has_anchor=configured.has_anchor) if execution is None else execution
        first = PlanShape(configured.block_length, configured.num_branches)
        # A drafter whose blocks begin with a copy was trained on whole blocks alone.
        shapes = plan_shapes(configured.block_length, has_short_blocks=not configured.has_anchor)
        self._shapes = tuple(dict.fromkeys((*shapes, first)))
        self._runnable: dict[tuple[int, int], list[PlanShape]] = {}
        self._acceptance = Acceptance(configured.block_length)
        self._outcomes: list[tuple[IntArray, IntArray, IntArray, BoolArray]] = []
        self._probes = Probes(configured.block_length, costs, self._execution)
        self._steps, self._chosen_at, self._load, self._level = 0, -STEPS_BETWEEN_CHOICES, 0, 0
        self.expected_by_name: tuple[tuple[str, float], ...] = ()
        self._follow(first)

    def _follow(self, shape: PlanShape) -> None:
        self.shape = shape
        drafting = Drafting(shape.block_length, shape.num_branches, self._execution.has_anchor)
        self._policy: DraftPolicy = Autoregressive() if shape == AR else drafting

    def begin_step(self, num_requests: int, context: float, level: int = 0) -> None:
        """A step of ``num_requests`` running requests with ``context`` tokens each on average is being planned.

        ``level``: the highest of their sampling (``SamplingNeeds.level``), which a captured step has to do.
        """
        self._steps += 1
        is_other_load = not 0.75 <= num_requests / max(1, self._load) <= 1.33 or level != self._level
        if num_requests and (is_other_load or self._steps - self._chosen_at >= STEPS_BETWEEN_CHOICES):
            self._learn()
            if self._acceptance.is_measured:
                self._choose(num_requests, context, level)
        self._probes.begin_step()

    def _choose(self, num_requests: int, context: float, level: int) -> None:
        self._chosen_at, self._load, self._level = self._steps, num_requests, level
        shapes = self._candidates(num_requests, level)
        expected = {
            shape: goodput(shape, self._acceptance, self._costs, num_requests, context, self._execution) for shape in shapes
        }
        self.expected_by_name = tuple((str(shape), value) for shape, value in expected.items())
        errors = {length: self._acceptance.standard_error(length) for length in {s.block_length for s in shapes}}
        promised = {shape: (1 + OPTIMISM * errors[shape.block_length]) * value for shape, value in expected.items()}
        best = max(promised, key=promised.__getitem__)
        if promised[best] <= HYSTERESIS * promised[AR]:
            self._follow(AR)
        elif promised[best] > HYSTERESIS * promised.get(self.shape, 0.0):
            self._follow(best)
        self._probes.plan(self.shape, expected, num_requests, context)

    def _candidates(self, num_requests: int, level: int) -> list[PlanShape]:
        """The plans to compare: those that so many requests can follow, and ``ar``."""
        key = num_requests, level
        if key not in self._runnable:
            can_run = self._execution.can_run
            self._runnable[key] = [s for s in self._shapes if s == AR or can_run(s, num_requests, level)]
        return self._runnable[key]

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
