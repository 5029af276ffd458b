from __future__ import annotations

import pytest

from engine.config import DecodeConfig
from engine.decode.policy import Autoregressive, Drafting, default_mode, num_useful_branches, policies
from engine.sampling_params import DecodingMode
from engine.step import DraftPlan

K = 4


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
    assert num_useful_branches(num_drafts, wanted) == useful
    assert useful == sum(wanted - (branch + 1) > 1 for branch in range(num_drafts))


def test_plain_decoding_has_one_draft_and_no_branch() -> None:
    assert Autoregressive().plan(held=4, wanted=100) == DraftPlan(1, 0, 1)


@pytest.mark.parametrize("num_branches", [1, 2, K])
def test_tidar_verifies_what_it_holds_beside_its_branches(num_branches: int) -> None:
    policy = Drafting(K, num_branches)
    assert policy.plan(held=K, wanted=100) == DraftPlan(K, num_branches, K)
    assert policy.plan(held=1, wanted=100) == DraftPlan(1, 1, K), "a redraft has branch 0 only"
    assert policy.plan(held=K, wanted=3) == DraftPlan(3, 1, K), "drafts never outnumber the tokens still wanted"
    assert policy.plan(held=K, wanted=2) == DraftPlan(2, 0, K)
    assert policy.plan(held=1, wanted=1) == DraftPlan(1, 0, K)


def test_linear_alternates_between_drafting_and_verifying() -> None:
    policy = Drafting(K, 0)
    assert policy.plan(held=1, wanted=100) == DraftPlan(1, 1, K)
    assert policy.plan(held=K, wanted=100) == DraftPlan(K, 0, K)


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
