"""``auto`` in a real engine: what becomes of its steps reaches the policy, which then follows what pays, and says so."""

from __future__ import annotations

from collections import Counter

import pytest

from engine.core import EngineCore
from engine.decode.auto import GoodputPolicy
from engine.messages import EngineStats, GenerateRequest
from engine.sampling_params import DecodingMode, SamplingParams
from engine.step import StepPlan
from tests.engine.priced_steps import PricedSteps
from tests.engine.tiny import BLOCK_LENGTH, tiny_engine, tiny_model

RARELY, OFTEN, MOSTLY = 0.0, 1.0, 3.0
"""How often a model accepts drafts (``tests.engine.tiny``)."""

NUM_SLOTS, NUM_REQUESTS = 8, 48


def priced_engine(shared: float, step: float, row: float, depth: int, monkeypatch: pytest.MonkeyPatch) -> EngineCore:
    PricedSteps(step, row).replace_the_clock(monkeypatch)
    model = tiny_model("qwen3", 0, shared)
    core = tiny_engine(model, mode=DecodingMode.AUTO, depth=depth, max_num_seqs=NUM_SLOTS, budget=512)
    assert core.scheduler.stats().plan == f"tidar-1 of {BLOCK_LENGTH}", "the plan before anything is known"
    return core


def serve(core: EngineCore) -> tuple[EngineStats, Counter[tuple[int, int]]]:
    """Serve requests that never stop by themselves.

    Returns what the engine said while all slots were last taken, and the drafts and branches of requests under that plan.
    """
    sampling = SamplingParams(40, temperature=1.0, ignore_eos=True)
    for i in range(NUM_REQUESTS):
        core.add(GenerateRequest(str(i), (5 + i % 9, 6, 7 + i % 5), sampling, DecodingMode.AUTO))
    told, plans = core.scheduler.stats(), Counter[tuple[int, int]]()
    schedule = core.scheduler.schedule

    def watched() -> StepPlan | None:
        plan = schedule()
        if plan is not None:
            plans.update((drafts, branches) for _, drafts, branches, *_ in plan.shapes.tolist())
        return plan

    core.scheduler.schedule = watched  # type: ignore[method-assign]
    while core.has_work:
        stats = core.step().stats
        if stats.num_running == NUM_SLOTS:
            if stats.plan != told.plan:
                plans.clear()
            told, last = stats, plans.copy()
    return told, last


def auto_of(core: EngineCore) -> GoodputPolicy:
    policy = core.scheduler.planner.policy_of(DecodingMode.AUTO)
    assert isinstance(policy, GoodputPolicy)
    return policy


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize(
    ("shared", "step", "row", "expected", "mostly"),
    [
        (OFTEN, 1.0, 0.0, "tidar-6 of 6", {(6, 6)}),
        (OFTEN, 0.0, 1.0, "ar", {(1, 0)}),
        (RARELY, 1.0, 0.02, "ar", {(1, 0)}),
        (MOSTLY, 1.0, 0.02, "linear of 6", {(6, 0), (1, 1)}),
    ],
    ids=["free rows", "rows at their full price", "cheap rows, bad drafts", "cheap rows, good drafts"],
)
def test_the_plan_is_the_one_that_pays_with_what_was_seen(
    shared: float,
    step: float,
    row: float,
    expected: str,
    mostly: set[tuple[int, int]],
    depth: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stats, plans = serve(priced_engine(shared, step, row, depth, monkeypatch))
    goodput = dict(stats.plan_goodput)
    assert stats.plan == expected, goodput
    assert goodput[expected] == max(goodput.values())
    of_ar = [pytest.approx(n / (step + row * n)) for n in range(1, NUM_SLOTS + 1)]
    assert goodput["ar"] in of_ar, "a token of each request at the price of a row, with as many as ran at the choice"
    assert plans.most_common(1)[0][0] in mostly, "what is said to be in force is what most requests do"


@pytest.mark.parametrize("depth", [0, 1])
def test_the_policy_knows_every_outcome_that_the_engine_counts(depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    core = priced_engine(OFTEN, 1.0, 0.0, depth, monkeypatch)
    serve(core)
    stats, policy = core.scheduler.stats(), auto_of(core)
    policy._learn()  # the outcomes since plans were last compared
    assert policy._acceptance._tried[1] == stats.num_drafts > 100
    assert tuple(policy._acceptance._accepted[1:]) == stats.accepted_per_position
