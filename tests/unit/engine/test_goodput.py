"""The plan of ``auto``: arithmetic by hand, and in the steady state against every fixed plan.

The simulation's device accepts each draft with one chance, and runs the branches that are likeliest under it. One cost table
was measured on two CPU cores with the bundled model; the other is *modelled*: an 8B model on an H200 at 1k context, from its
memory bandwidth and arithmetic, which no GPU has confirmed yet.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from engine.decode.auto import HYSTERESIS, STEPS_BETWEEN_CHOICES, STEPS_BETWEEN_PROBES, GoodputPolicy
from engine.decode.cost_cache import costs_from
from engine.decode.goodput import (
    AR,
    MAX_OUTCOMES,
    Acceptance,
    CostTable,
    PlanShape,
    blind_chance,
    expect,
    goodput,
    plan_shapes,
)
from engine.decode.measure import measure_costs, powers_of_two
from engine.decode.policy import Drafting
from engine.step import DraftPlan
from tests.unit.engine.test_policy import plan

BATCHES = (1, 2, 3, 4, 8, 16, 32, 64, 128, 256)
CHANCES = (0.3, 0.5, 0.7, 0.8, 0.902, 0.95)


def modelled_8b() -> CostTable:
    """Weights and cached tokens streamed at 4.3 TB/s, or 16.4 GFLOP a row at 790 TFLOP/s, whichever takes longer."""
    counts = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    rows = tuple(tuple(n * each for each in (1, 2, 4, 8, 16, 24, 32, 48, 64, 128, 272)) for n in counts)
    seconds = tuple(tuple(max(15.137e9 / 4.3e12, r * 16.4e9 / 790e12) for r in row) for row in rows)
    return CostTable(counts, rows, seconds, per_kv_token=147_456 / 4.3e12, per_row_token=4 * 4096 * 36 / 790e12)


def measured_bundled() -> CostTable:
    return costs_from(json.loads((Path(__file__).parent / "data" / "costs-bundled-2-cores.json").read_text()))


TABLES = {"modelled H200, 8B, k 16": (modelled_8b, 16, 1024.0), "measured CPU, bundled, k 8": (measured_bundled, 8, 100.0)}


def certain(chance: float, block_length: int) -> Acceptance:
    """What a policy knows after very many outcomes."""
    acceptance = Acceptance(block_length)
    for i in range(1, block_length):
        acceptance._tried[i], acceptance._accepted[i] = 1e9, chance * 1e9
    return acceptance


class Device:
    """Requests that never end, each with a coin; it follows whatever plan it is given."""

    def __init__(self, policy: GoodputPolicy, chance: float, num_requests: int, context: float) -> None:
        self.policy, self.chance, self.num_requests, self.context = policy, chance, num_requests, context
        self.rng, self.held = random.Random(1), np.ones(min(num_requests, 16), dtype=np.int64)
        self.counts = {n: certain(chance, n).counts(n) for n in range(1, 17)}

    def step(self) -> None:
        self.policy.begin_step(self.num_requests, self.context)
        plans = self.policy.plans(self.held, np.full_like(self.held, 10_000), bool((self.held > 1).any()))
        accepted, is_hit = zip(*(self._judge(*plan[:2]) for plan in plans.tolist()), strict=True)
        self.held = np.where(is_hit, plans[:, 2], 1)
        self.policy.observe(plans, plans[:, 0], np.array(accepted), np.array(is_hit))

    def _judge(self, num_drafts: int, num_branches: int) -> tuple[int, bool]:
        accepted = 1
        while accepted < num_drafts and self.rng.random() < self.chance:
            accepted += 1
        counts = self.counts[num_drafts]
        run = sorted(range(len(counts)), key=lambda j: -counts[j])[:num_branches]
        return accepted, accepted - 1 in run


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("chance", CHANCES)
def test_in_the_steady_state_auto_is_as_good_as_the_best_fixed_plan(table: str, chance: float) -> None:
    make, block_length, context = TABLES[table]
    costs, truth = make(), certain(chance, block_length)
    for batch in BATCHES:
        if batch > costs.num_requests[-1]:
            continue
        policy = GoodputPolicy(Drafting(block_length, 1), costs)
        device = Device(policy, chance, batch, context)
        for _ in range(1500):
            device.step()
        fixed = {shape: goodput(shape, truth, costs, batch, context) for shape in plan_shapes(block_length)}
        chosen, best = fixed[policy.shape], max(fixed, key=fixed.__getitem__)
        assert chosen >= 0.97 * fixed[best], f"batch {batch}: {policy.shape} instead of {best}"
        assert chosen >= fixed[AR], f"batch {batch}: {policy.shape} is slower than ar"


def test_the_plan_follows_the_load_and_the_acceptance() -> None:
    policy = GoodputPolicy(Drafting(16, 1), modelled_8b())
    alone = Device(policy, 0.9, 1, 1024.0)
    for _ in range(400):
        alone.step()
    assert policy.shape.num_branches > 1
    crowd = Device(policy, 0.9, 256, 1024.0)
    crowd.step()
    assert policy.shape == AR, "the load is looked at at once"
    alone.step()
    assert policy.shape != AR
    worse = Device(policy, 0.0, 64, 1024.0)
    for _ in range(2000):
        worse.step()
    assert policy.shape == AR
    better = Device(policy, 0.95, 1, 1024.0)
    for _ in range(60 * STEPS_BETWEEN_PROBES):
        better.step()
    assert policy.shape != AR, "probes find out that drafts have become good again"


def test_until_acceptance_is_measured_the_configured_plan_is_in_force() -> None:
    policy = GoodputPolicy(Drafting(8, 2), measured_bundled())
    for _ in range(3 * STEPS_BETWEEN_CHOICES):
        policy.begin_step(64, 100.0)
    assert policy.shape == PlanShape(8, 2)
    assert plan(policy, held=8, wanted=100) == DraftPlan(8, 2, 8)
    assert plan(policy, held=1, wanted=100) == DraftPlan(1, 1, 8)


def test_a_plan_does_not_change_for_a_promise_within_the_hysteresis() -> None:
    # Rows are free here and nearly all drafts accepted, so a second branch promises a little more, and only a little.
    free = CostTable((1,), ((1, 1000),), ((1.0, 1.0),))
    policy = GoodputPolicy(Drafting(4, 1), free)
    policy._acceptance = certain(0.999, 4)
    policy.begin_step(1, 0.0)
    promised = dict(policy.expected_by_name)
    assert promised["tidar-1 of 4"] < promised["tidar-2 of 4"] < HYSTERESIS * promised["tidar-1 of 4"]
    assert policy.shape == PlanShape(4, 1)


def test_expected_tokens_and_rows_by_hand() -> None:
    acceptance = certain(0.5, 3)
    counts = acceptance.counts(3)
    assert counts == pytest.approx([0.5, 0.25, 0.25])
    assert blind_chance(counts, 1) == pytest.approx(0.5)
    # Half of the holding steps miss, and a redraft follows each: two steps in three hold. They emit 1.75, redrafts 1.
    one = expect(PlanShape(3, 1), acceptance)
    assert one.tokens_per_step == pytest.approx((2 * 1.75 + 1) / 3)
    assert one.rows_per_step == pytest.approx((2 * 6 + 4) / 3)
    linear = expect(PlanShape(3, 0), acceptance)
    assert (linear.tokens_per_step, linear.rows_per_step) == (pytest.approx(1.375), pytest.approx(3.5))
    every = expect(PlanShape(3, 3), acceptance)
    assert (every.tokens_per_step, every.rows_per_step) == (pytest.approx(1.75), pytest.approx(12))
    assert expect(AR, acceptance).tokens_per_step == 1.0


def test_a_position_is_counted_as_tried_only_when_all_before_it_were_accepted() -> None:
    acceptance = Acceptance(5)
    acceptance.observe(np.array([5]), np.array([2]))
    assert acceptance._tried == [0, 1, 1, 0, 0]
    assert acceptance._accepted == [0, 1, 0, 0, 0]
    acceptance.observe(np.array([3]), np.array([3]))
    assert acceptance._tried == [0, 2, 2, 0, 0]
    assert acceptance._accepted == [0, 2, 1, 0, 0]


def test_outcomes_observed_together_count_like_those_observed_one_by_one() -> None:
    rng = random.Random(3)
    together, one_by_one = Acceptance(6), Acceptance(6)
    for _ in range(50):
        drafts = [rng.randint(0, 6) for _ in range(40)]
        accepted = [rng.randint(min(1, n), n) for n in drafts]
        together.observe(np.array(drafts), np.array(accepted))
        for n, a in zip(drafts, accepted, strict=True):
            # The scalar rule: draft i is tried when all before it were accepted.
            for i in range(1, n):
                one_by_one._tried[i] += a >= i
                one_by_one._accepted[i] += a > i
    assert together._tried == one_by_one._tried
    assert together._accepted == one_by_one._accepted


def test_old_outcomes_fade() -> None:
    acceptance = Acceptance(2)
    for accepted in (2, 1):
        for _ in range(100):
            acceptance.observe(np.full(256, 2), np.full(256, accepted))
    assert acceptance._tried[1] <= MAX_OUTCOMES
    assert acceptance._accepted[1] / acceptance._tried[1] < 0.1


def test_a_probe_that_is_due_waits_for_a_step_that_redrafts() -> None:
    policy = GoodputPolicy(Drafting(16, 0), modelled_8b())
    policy.shape = PlanShape(4, 0)
    held, wanted = np.array([4, 1, 1]), np.full(3, 100)
    for step in range(1, 3 * STEPS_BETWEEN_PROBES):
        policy.begin_step(3, 100.0)
        is_verifying = step % 2 == 0  # a probe is always due in a step that verifies
        plans = policy.plans(held if is_verifying else np.ones_like(held), wanted, is_verifying)
        is_probe = plans[:, 2] == 16
        assert is_probe.sum() == (step > STEPS_BETWEEN_PROBES and step % STEPS_BETWEEN_PROBES == 1)
        assert (plans[:, 1] == (0 if is_verifying else 1)).all(), "all requests are in one phase"


def test_better_ranking_than_by_counts_is_learnt() -> None:
    acceptance = certain(0.5, 4)
    before = acceptance.chance_of_hit(acceptance.counts(4), 1)
    for i in range(400):
        acceptance.observe_hits(np.array([i % 4 != 0]), np.array([4]), np.array([1]))
    after = acceptance.chance_of_hit(acceptance.counts(4), 1)
    assert before == pytest.approx(0.5)
    assert after == pytest.approx(0.75, abs=0.04)


def test_costs_are_linear_between_what_was_measured_and_proportional_behind_it() -> None:
    costs = CostTable((1, 4), ((1, 3), (4, 8)), ((1.0, 2.0), (2.0, 3.0)), per_kv_token=0.01, per_row_token=0.001)
    assert costs.cost(1, 2) == pytest.approx(1.5)
    assert costs.cost(1, 6) == pytest.approx(4.0)
    assert costs.cost(4, 6) == pytest.approx(2.5)
    assert costs.cost(2, 2) == pytest.approx(1 + (2 - 1) / 3), "a row each, between one request and four"
    assert costs.cost(1, 1, context=10) == pytest.approx(1.0 + 10 * (0.01 + 0.001))


def test_measuring_times_every_plan_that_fits_and_what_context_adds() -> None:
    def timer(num_requests: int, plan: DraftPlan, context: int) -> float:
        rows = num_requests * plan.num_rows
        return 1.0 + 0.1 * rows + context * (0.01 * num_requests + 0.002 * rows)

    costs = measure_costs(timer, 8, powers_of_two(6), max_rows=100, max_context=50)
    assert costs.num_requests == (1, 2, 4, 6)
    assert all(row[-1] <= 100 for row in costs.rows)
    assert costs.cost(3, 40) == pytest.approx(1 + 0.1 * 40)
    assert (costs.per_kv_token, costs.per_row_token) == (pytest.approx(0.01), pytest.approx(0.002))
