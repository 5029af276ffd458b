from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest

from engine.config import DecodeConfig
from engine.decode.auto import GoodputPolicy
from engine.decode.costs import CostTable
from engine.decode.goodput import AR, PlanShape
from engine.decode.planner import DraftPlanner
from engine.decode.policy import (
    Autoregressive,
    BlockDiffusion,
    Drafting,
    DraftPolicy,
    default_mode,
    num_useful_branches,
    policies,
)
from engine.sampling_params import DecodingMode
from engine.step import DraftPlan

K = 4


def plan(policy: DraftPolicy, held: int, wanted: int, is_verifying: bool | None = None) -> DraftPlan:
    """Of one request, which is alone unless it is said that others verify."""
    is_verifying = held > 1 if is_verifying is None else is_verifying
    ((drafts, branches, block, anchor),) = policy.plans(np.array([held]), np.array([wanted]), is_verifying).tolist()
    return DraftPlan(drafts, branches, block, bool(anchor))


@pytest.mark.parametrize(
    ("num_drafts", "wanted", "useful"),
    [
        # A hit of branch i emits i + 1 tokens; with at most one left after it, its drafts could save no forward.
        (4, 100, 4),
        (4, 6, 4),
        (4, 5, 3),
        (4, 4, 2),
        (3, 3, 1),
        (2, 2, 0),
        (1, 3, 1),
        (1, 2, 0),
        (1, 1, 0),
    ],
)
def test_branches_whose_hit_leaves_at_most_one_token_are_left_out(num_drafts: int, wanted: int, useful: int) -> None:
    assert num_useful_branches(np.array([num_drafts]), np.array([wanted])).tolist() == [useful]
    assert useful == sum(wanted - (branch + 1) > 1 for branch in range(num_drafts))


def test_plain_decoding_has_one_draft_and_no_branch() -> None:
    assert plan(Autoregressive(), held=4, wanted=100) == DraftPlan(1, 0, 1)


@pytest.mark.parametrize("num_branches", [1, 2, K])
def test_tidar_verifies_what_it_holds_beside_its_branches(num_branches: int) -> None:
    policy = Drafting(K, num_branches)
    assert plan(policy, held=K, wanted=100) == DraftPlan(K, num_branches, K)
    assert plan(policy, held=1, wanted=100) == DraftPlan(1, 1, K), "a redraft has branch 0 only"
    assert plan(policy, held=K, wanted=3) == DraftPlan(3, 1, K), "drafts never outnumber the tokens still wanted"
    assert plan(policy, held=K, wanted=2) == DraftPlan(2, 0, K)
    assert plan(policy, held=1, wanted=1) == DraftPlan(1, 0, K)


def test_linear_alternates_between_drafting_and_verifying() -> None:
    policy = Drafting(K, 0)
    assert plan(policy, held=1, wanted=100) == DraftPlan(1, 1, K)
    assert plan(policy, held=K, wanted=100) == DraftPlan(K, 0, K)


def scalar_rule(length: int, branches: int, anchor: bool) -> Callable[[int, int, bool], tuple[int, int, int, bool]]:
    """The plan of the TiDAR family in words: all drafts that are held and wanted; branches whose hit leaves two tokens."""

    def rule(held: int, wanted: int, is_verifying: bool) -> tuple[int, int, int, bool]:
        num_drafts = min(held, wanted, length)
        if held > 1:
            allowed = branches
        elif branches == 0 and is_verifying:
            allowed = 0
        else:
            allowed = 1
        useful = sum(1 for branch in range(num_drafts) if wanted - (branch + 1) >= 2)
        return num_drafts, min(allowed, useful), length, anchor

    return rule


@pytest.mark.parametrize("anchor", [False, True])
@pytest.mark.parametrize("branches", range(K + 1))
def test_a_column_of_plans_is_the_scalar_rule_for_each(branches: int, anchor: bool) -> None:
    policy, rule = Drafting(K, branches, anchor), scalar_rule(K, branches, anchor)
    pairs = list(itertools.product(range(1, K + 1), range(1, 2 * K + 3)))
    auto = GoodputPolicy(policy, CostTable((1,), ((1,),), ((1.0,),)))
    for size in (1, 3, len(pairs)):
        for first in range(0, len(pairs), size):
            held, wanted = (np.array(column) for column in zip(*pairs[first : first + size], strict=True))
            is_verifying = bool((held > 1).any())
            expected = [rule(h, w, is_verifying) for h, w in pairs[first : first + size]]
            for chosen in (policy, auto):
                plans = chosen.plans(held, wanted, is_verifying)
                assert [tuple(row) for row in plans.tolist()] == expected


def test_after_a_change_to_shorter_blocks_the_drafts_at_hand_are_cut_to_them() -> None:
    auto = GoodputPolicy(Drafting(16, 2), CostTable((1,), ((1,),), ((1.0,),)))
    held, wanted = np.array([16, 1, 16, 4]), np.array([50, 50, 3, 50])
    auto._follow(PlanShape(4, 2))
    assert auto.plans(held, wanted, True).tolist() == [[4, 2, 4, 0], [1, 1, 4, 0], [3, 1, 4, 0], [4, 2, 4, 0]]
    auto._follow(AR)
    assert auto.plans(held, wanted, True).tolist() == [[1, 0, 1, 0]] * 4


def test_linear_requests_redraft_together_or_not_at_all() -> None:
    policy, wanted = Drafting(K, 0), np.full(3, 100)
    assert policy.plans(np.array([1, 1, 1]), wanted, False).tolist() == [[1, 1, K, 0]] * 3
    assert policy.plans(np.array([1, K, 1]), wanted, True).tolist() == [[1, 0, K, 0], [K, 0, K, 0], [1, 0, K, 0]]


def test_a_diffusion_block_stands_behind_all_drafts_that_are_held() -> None:
    assert plan(BlockDiffusion(K), held=3, wanted=1) == DraftPlan(3, 1, K)


def test_the_planner_asks_each_policy_for_its_own_requests() -> None:
    table = policies(DecodeConfig(DecodingMode.TIDAR, None, 2), K, 100)
    planner = DraftPlanner(table)
    modes = (DecodingMode.LINEAR, DecodingMode.AR, DecodingMode.TIDAR, DecodingMode.LINEAR, DecodingMode.AUTO)
    numbers = np.array([planner.number_of(mode) for mode in modes])
    assert numbers[2] == numbers[4], "auto means the configured policy here"
    planner.begin_step(np.array([10] * 5), np.zeros(5, dtype=np.int64))
    held, wanted = np.array([1, 1, K, K, 1]), np.array([9, 9, 9, 9, 0])
    expected = [[1, 0, K, 0], [1, 0, 1, 0], [K, 2, K, 0], [K, 0, K, 0], [0, 0, 1, 0]]
    assert planner.plans(numbers, held, wanted).tolist() == expected
    # Whoever is admitted in the same step keeps its phase; those of the next step start anew.
    late = planner.plans(numbers[:1], np.array([1]), np.array([9]))
    planner.begin_step(np.array([10]), np.array([0]))
    assert (late.tolist(), planner.plans(numbers[:1], np.array([1]), np.array([9])).tolist()) == (
        [[1, 0, K, 0]],
        [[1, 1, K, 0]],
    )


def test_a_plan_counts_its_rows() -> None:
    assert [DraftPlan(k, k, k).num_rows for k in (4, 8, 16)] == [20, 72, 272]


def test_every_mode_has_a_policy() -> None:
    table = policies(DecodeConfig(DecodingMode.TIDAR, None, 2), K, 100)
    assert table[DecodingMode.AR] == Autoregressive()
    assert table[DecodingMode.LINEAR] == Drafting(K, 0)
    assert table[DecodingMode.TIDAR] == table[DecodingMode.AUTO] == Drafting(K, 2)
    assert policies(DecodeConfig(DecodingMode.TIDAR, None, None), K, 100)[DecodingMode.TIDAR] == Drafting(K, K)


@pytest.mark.parametrize("mode", [DecodingMode.LINEAR, DecodingMode.AR])
def test_auto_means_the_configured_mode(mode: DecodingMode) -> None:
    table = policies(DecodeConfig(mode), K, 100)
    assert table[DecodingMode.AUTO] == table[mode]


def test_a_checkpoint_that_cannot_draft_decodes_plainly() -> None:
    table = policies(DecodeConfig(DecodingMode.AUTO), None, 100)
    assert default_mode(DecodeConfig(DecodingMode.AUTO), None) is DecodingMode.AR
    assert default_mode(DecodeConfig(DecodingMode.AUTO), K) is DecodingMode.TIDAR
    assert set(table) == {DecodingMode.AR, DecodingMode.AUTO}
    assert table[DecodingMode.AUTO] == Autoregressive()
