"""What ``auto`` is worth against every fixed plan, step by step, on a table of costs: no model and no GPU.

Requests that never end accept each draft by the toss of one coin, and follow the very policy that the engine runs. A step
costs what the table says of its rows: those that its requests need, or, where steps are captured, those of the captured step
in which they are replayed. Where steps are planned ahead, the policy is told an outcome one step later. So probes, redrafts,
padding, changes of plan and errors of the estimates all have their price.

Prints for each table the worst case of ``auto`` over the best fixed plan (of those that arithmetic expects most of) and over
``ar``, and, apart, what the start costs: the tokens of the first steps, in which acceptance is not known yet, over those of as
long a time at the final plan. Ends with a line of JSON. Tables that are called modelled follow from the bandwidth and
arithmetic assumed of an H200; no GPU has confirmed them.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.report import finish, table
from engine.cuda_graphs import ALL_NEEDS
from engine.decode.acceptance import Acceptance
from engine.decode.auto import GoodputPolicy
from engine.decode.costs import CostTable
from engine.decode.goodput import AR, Execution, PlanShape, goodput, plan_shapes
from engine.decode.measure import REPEATS, measure_costs
from engine.decode.policy import Autoregressive, Drafting, DraftPolicy
from engine.step import DraftPlan, IntArray
from engine.step_sizes import REQUEST_BUCKETS, StepSizes
from engine.warm_up import plans_of

FloatArray = NDArray[np.float64]

BATCHES = (1, 2, 3, 5, 8, 12, 17, 32, 33, 64, 96, 129, 200, 256)
CHANCES = (0.3, 0.45, 0.6, 0.7, 0.8, 0.902, 0.95)

NUM_LIKELY = 4
"""Fixed plans that are run, those of which the arithmetic expects most."""

START_STEPS, SETTLING_STEPS, LEAST_STEPS = 64, 1500, 2000
"""Steps that are reported as the start; after which nothing is left of it; and that the steady state is measured in."""

UNCAPTURED_SECONDS = 6e-3
"""Least time of a step that is launched operation by operation where others are replayed (a guess for 36 layers)."""

NOISE = 0.02
"""Standard deviation of a timed step, of its time."""

ADMISSION_SECONDS = 20e-6
"""Of a request, while costs are measured (a guess)."""

PROMISED = 0.03
"""In the steady state ``auto`` is to be no further below the best fixed plan."""

MAX_ROWS = 8192
"""Of a step."""

COPY_BANDWIDTH, ARITHMETIC = 4.3e12, 790e12
"""Assumed of an H200: bytes copied and floating-point operations in a second."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """A table of costs and how the engine that it belongs to runs its steps.

    ``known``: what the policy takes the costs to be, where that is not ``costs``. ``decay``: acceptance of a draft over that
    of the one before; ``spread``: by which share every other request's acceptance is higher, and that of the rest lower.
    """

    name: str
    costs: CostTable
    block_length: int
    contexts: tuple[float, ...]
    execution: Execution
    known: CostTable | None = None
    decay: float = 1.0
    spread: float = 0.0

    def acceptance(self, chance: float, num_requests: int) -> FloatArray:
        """Of each request and draft, where ``chance`` is that of the first guess, [N, K - 1]."""
        sides = 1 + self.spread * np.where(np.arange(num_requests) % 2, 1.0, -1.0) * (num_requests > 1)
        by_position = chance * self.decay ** np.arange(self.block_length - 1)
        return np.minimum(sides[:, None] * by_position, 0.98)

    @property
    def batches(self) -> list[int]:
        """Numbers of requests that the table has an idea of, and that the engine runs at once."""
        captured = self.execution.captured
        most = min(self.costs.num_requests[-1], BATCHES[-1] if captured is None else captured.buckets[-1])
        return [n for n in BATCHES if n <= most]

    def shapes(self, num_requests: int) -> list[PlanShape]:
        """The fixed plans that so many requests can follow."""
        return [s for s in plan_shapes(self.block_length) if s == AR or self.execution.can_run(s, num_requests)]

    def seconds(self, plans_N4: IntArray, context: float) -> float:
        """What a step of requests with these plans costs."""
        num_requests = len(plans_N4)
        num_rows = int((plans_N4[:, 0] + plans_N4[:, 1] * (plans_N4[:, 2] + plans_N4[:, 3])).sum())
        if self.execution.captured is None:
            return self.costs.cost(num_requests, num_rows, context)
        size = self.execution.captured.find(plans_N4)
        if size is None:
            return max(self.costs.uncaptured, self.costs.cost(num_requests, num_rows, context))
        return self.costs.cost(size.num_requests, size.num_rows, context * num_requests / size.num_requests)


class Crowd:
    """``num_requests`` requests that never end, and follow a policy. Branches are the likeliest under all their coins."""

    def __init__(
        self, scenario: Scenario, policy: DraftPolicy, chance: float, num_requests: int, context: float, seed: int = 1
    ) -> None:
        self._scenario, self._policy, self._context = scenario, policy, context
        self._rng = np.random.default_rng(seed)
        self.held: IntArray = np.ones(num_requests, dtype=np.int64)
        self._most_held = self.held
        self._unread = deque[tuple[IntArray, IntArray, IntArray, NDArray[np.bool_]]]()
        self._chances_NK = scenario.acceptance(chance, num_requests)
        known = certain(self._chances_NK)
        # The place of each number of accepted drafts among the likeliest ones, by the number of drafts.
        self._rank = np.zeros((scenario.block_length + 1, scenario.block_length + 1), dtype=np.int64)
        for n in range(1, scenario.block_length + 1):
            self._rank[n, np.argsort(-np.array(known.counts(n)), kind="stable") + 1] = np.arange(n)

    def run(self, num_steps: int) -> tuple[int, float]:
        """Take so many steps; returns tokens and seconds."""
        tokens, seconds = 0, 0.0
        for _ in range(num_steps):
            more, took = self.step()
            tokens, seconds = tokens + more, seconds + took
        return tokens, seconds

    def step(self) -> tuple[int, float]:
        """Tokens and seconds of one step."""
        if isinstance(self._policy, GoodputPolicy):
            self._policy.begin_step(len(self.held), self._context)
        most_held = self._most_held if self._scenario.execution.is_ahead else self.held
        plans = self._policy.plans(most_held, np.full_like(self.held, 10_000), bool(most_held.max() > 1))
        num_drafts, num_branches = np.minimum(plans[:, 0], self.held), plans[:, 1]
        runs = (self._rng.random(self._chances_NK.shape) < self._chances_NK).cumprod(axis=1).sum(axis=1)
        accepted: IntArray = np.minimum(1 + runs, num_drafts)
        is_hit = self._rank[num_drafts, accepted] < num_branches
        self.held, self._most_held = (np.where(has, plans[:, 2], 1) for has in (is_hit, num_branches > 0))
        if isinstance(self._policy, GoodputPolicy):
            self._unread.append((plans, num_drafts, accepted, is_hit))
            if len(self._unread) > self._scenario.execution.is_ahead:
                self._policy.observe(*self._unread.popleft())
        return int(accepted.sum()), self._scenario.seconds(plans, self._context)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Tokens per second, in the steady state, of ``auto``, ``ar`` and the best fixed plan; ``start`` of ``auto`` at first."""

    chance: float
    num_requests: int
    context: float
    plan: PlanShape
    best: PlanShape
    auto: float
    ar: float
    fixed: float
    start: float


def outcome(scenario: Scenario, chance: float, num_requests: int, context: float, num_outcomes: int = 16_000) -> Outcome:
    """Run ``auto``, and the fixed plans that promise most, until their requests have taken so many steps together."""
    num_steps = max(LEAST_STEPS, num_outcomes // num_requests)

    def fixed(shape: PlanShape) -> float:
        policy = Autoregressive() if shape == AR else Drafting(shape.block_length, shape.num_branches)
        crowd = Crowd(scenario, policy, chance, num_requests, context)
        crowd.run(num_steps // 5)
        tokens, seconds = crowd.run(num_steps)
        return tokens / seconds

    policy = GoodputPolicy(Drafting(scenario.block_length, 1), scenario.known or scenario.costs, scenario.execution)
    crowd = Crowd(scenario, policy, chance, num_requests, context)
    tokens, seconds = crowd.run(START_STEPS)
    crowd.run(SETTLING_STEPS)
    steady_tokens, steady_seconds = crowd.run(num_steps)
    known = certain(scenario.acceptance(chance, num_requests))
    promised = {
        shape: goodput(shape, known, scenario.costs, num_requests, context, scenario.execution)
        for shape in scenario.shapes(num_requests)
    }
    likely = sorted(promised, key=lambda shape: -promised[shape])[:NUM_LIKELY]
    goodputs = {shape: fixed(shape) for shape in {AR, policy.shape, *likely}}
    best = max(goodputs, key=goodputs.__getitem__)
    steady = steady_tokens / steady_seconds
    return Outcome(chance, num_requests, context, policy.shape, best, steady, goodputs[AR], goodputs[best], tokens / seconds)


def certain(chances_NK: FloatArray) -> Acceptance:
    """What a policy knows of such requests after very many outcomes."""
    survival = chances_NK.cumprod(axis=1).mean(axis=0).tolist()
    return Acceptance.known([now / before for now, before in zip(survival, [1.0, *survival], strict=False)])


def modelled(
    weight_bytes: float, kv_bytes: int, row_flops: float, width: int, layers: int, counts: Iterable[int], uncaptured: float
) -> CostTable:
    """Weights and cached tokens streamed, or the rows' arithmetic if that takes longer; attention per row and token."""
    counts = tuple(counts)
    rows = tuple(tuple(n * each for each in (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 272)) for n in counts)
    seconds = tuple(tuple(max(weight_bytes / COPY_BANDWIDTH, r * row_flops / ARITHMETIC) for r in row) for row in rows)
    return CostTable(counts, rows, seconds, kv_bytes / COPY_BANDWIDTH, 4 * width * layers / ARITHMETIC, uncaptured)


def modelled_8b(counts: Iterable[int], uncaptured: float = 0.0) -> CostTable:
    """Qwen3-8B."""
    return modelled(15.137e9, 147_456, 15.14e9, 4096, 36, counts, uncaptured)


def modelled_1b5(counts: Iterable[int], uncaptured: float = 0.0) -> CostTable:
    """Qwen2.5-1.5B."""
    return modelled(3.087e9, 28_672, 3.09e9, 1536, 28, counts, uncaptured)


def all_captured(block_length: int, most: int, max_rows: int = MAX_ROWS) -> StepSizes:
    """What a start captures that has time for everything."""
    sizes = StepSizes(most)
    for num_requests in sizes.buckets:
        for plan in plans_of([Drafting(block_length, 1)], is_auto=True):
            if num_requests * plan.num_rows <= max_rows:
                sizes.add(sizes.size_of(num_requests, plan), ALL_NEEDS.level)
    return sizes


def noisily_measured(costs: CostTable, captured: StepSizes, block_length: int, noise: float, seed: int) -> CostTable:
    """What a start finds out about these costs in its time, when each measurement is off by a share of itself."""
    rng, now = np.random.default_rng(seed), 0.0

    def timer(num_requests: int, plan: DraftPlan, context: int) -> float:
        nonlocal now
        truth = costs.cost(num_requests, num_requests * plan.num_rows, context)
        now += (REPEATS + 2) * truth + ADMISSION_SECONDS * num_requests
        return truth * float(np.median(1 + noise * rng.standard_normal(REPEATS)))

    table = measure_costs(timer, block_length, captured.buckets, MAX_ROWS, 4096, 500_000, captured=captured, clock=lambda: now)
    return replace(table, uncaptured=costs.uncaptured)


def measured_bundled() -> CostTable:
    """The bundled model on two CPU cores."""
    kept = json.loads((Path(__file__).parent / "data" / "costs-bundled-2-cores.json").read_text())
    return CostTable.of_plain(kept["costs"])


def scenarios() -> list[Scenario]:
    """All tables."""
    counts = [n for n in REQUEST_BUCKETS if n <= 256]
    contexts = (1024.0, 8192.0)
    sizes = all_captured(16, 256)
    replayed = Execution(sizes, is_ahead=True, max_rows=MAX_ROWS)
    few = Execution(all_captured(16, 64, 1024), is_ahead=True, max_rows=1024)
    large, small = modelled_8b(counts, UNCAPTURED_SECONDS), modelled_1b5(counts, UNCAPTURED_SECONDS)
    known = noisily_measured(large, sizes, 16, NOISE, 1)
    of_8b, of_1b5 = "8B, k 16, modelled H200", "1.5B, k 16, modelled H200, captured"
    on_a_cpu = "bundled, k 8, measured on 2 CPU cores"
    return [
        Scenario(on_a_cpu, measured_bundled(), 8, (100.0,), Execution()),
        Scenario(f"{on_a_cpu}, planned ahead", measured_bundled(), 8, (100.0,), Execution(is_ahead=True)),
        Scenario(of_8b, modelled_8b(counts), 16, contexts, Execution(is_ahead=True)),
        Scenario(f"{of_8b}, captured", large, 16, contexts, replayed),
        Scenario(f"{of_8b}, captured, costs timed with {NOISE:.0%} noise", large, 16, contexts, replayed, known),
        Scenario(f"{of_8b}, captured, each draft 3% worse than the one before", large, 16, contexts, replayed, decay=0.97),
        Scenario(f"{of_8b}, captured, requests 10% better and worse", large, 16, contexts, replayed, spread=0.1),
        Scenario(of_1b5, small, 16, contexts, replayed),
        Scenario(f"{of_1b5}, at most 64 requests and 1,024 rows", small, 16, contexts, few),
    ]


def worst(outcomes: Sequence[Outcome], ratio: Callable[[Outcome], float]) -> tuple[float, str]:
    """The least ratio, and where."""
    least = min(outcomes, key=ratio)
    where = f"{least.num_requests} at {least.chance:g}: {least.plan}, best {least.best}"
    return ratio(least), where


def summary(scenario: Scenario, context: float, outcomes: Sequence[Outcome]) -> list[tuple[str, ...]]:
    """Rows of the printed table."""
    ratios: dict[str, Callable[[Outcome], float]] = {
        "the best fixed plan": lambda o: o.auto / o.fixed,
        "ar": lambda o: o.auto / o.ar,
        "itself, in the first steps": lambda o: o.start / o.auto,
    }
    name = f"{scenario.name}, {context:.0f} tokens"
    return [(name, over, f"{least:.3f}", where) for over, r in ratios.items() for least, where in (worst(outcomes, r),)]


def cell(of: Outcome) -> dict[str, Any]:
    """What is written down of an outcome."""
    ratios = {"over_best": of.auto / of.fixed, "over_ar": of.auto / of.ar, "start_over_steady": of.start / of.auto}
    names = {"plan": str(of.plan), "best": str(of.best)}
    load = {"requests": of.num_requests, "acceptance": of.chance}
    return {**load, **names, **{name: round(ratio, 4) for name, ratio in ratios.items()}}


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="every third batch and chance only")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    every = 3 if arguments.quick else 1
    rows, results, everything = [], [], []
    with ProcessPoolExecutor() as processes:
        for scenario in scenarios():
            for context in scenario.contexts:
                loads = itertools.product((scenario,), CHANCES[::every], scenario.batches[::every], (context,))
                outcomes = list(processes.map(outcome, *zip(*loads, strict=True)))
                rows += summary(scenario, context, outcomes)
                results.append({"scenario": scenario.name, "context": context, "cells": [cell(o) for o in outcomes]})
                everything += outcomes
    print(table(("table", "auto over", "worst", "requests at acceptance"), rows))
    num_below = sum(o.auto < (1 - PROMISED) * o.fixed for o in everything)
    print(f"{num_below} of {len(everything)} loads are more than {PROMISED:.0%} below the best fixed plan")
    finish("plan_policy", results, arguments.out)


if __name__ == "__main__":
    main()
