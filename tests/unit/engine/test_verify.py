from __future__ import annotations

import random

import pytest
import torch

from kernels.survival.reference import rank_branches
from kernels.verify.reference import imposed_drafts, num_accepted


def accepted(sampled: list[int], drafts: list[int], num_drafts: int) -> int:
    result = num_accepted(torch.tensor([sampled]), torch.tensor([drafts]), torch.tensor([num_drafts]))
    return int(result)


@pytest.mark.parametrize(
    ("sampled", "drafts", "num_drafts", "count"),
    [
        ([5, 6, 7], [4, 5, 6], 3, 3),
        ([5, 6, 7], [4, 5, 9], 3, 2),
        # A match after a mismatch does not count.
        ([5, 6, 7], [4, 9, 6], 3, 1),
        # Entries beyond the drafts that the request holds are left over from earlier steps.
        ([5, 6, 7], [4, 5, 6], 2, 2),
        ([5, 6, 7], [4, 5, 6], 1, 1),
        ([5, 6, 7], [4, 5, 6], 0, 0),
        ([5], [4], 1, 1),
        ([5], [4], 0, 0),
    ],
)
def test_drafts_are_accepted_while_they_equal_what_verification_takes(
    sampled: list[int], drafts: list[int], num_drafts: int, count: int
) -> None:
    assert accepted(sampled, drafts, num_drafts) == count


def test_acceptance_of_a_batch_equals_the_loop_of_the_definition() -> None:
    rng = random.Random(0)
    width, size = 6, 400
    sampled, drafts = ([[rng.randrange(2) for _ in range(width)] for _ in range(size)] for _ in range(2))
    counts = [rng.randint(0, width) for _ in range(size)]

    def loop(t: list[int], d: list[int], n: int) -> int:
        a = min(n, 1)
        while 0 < a < n and t[a - 1] == d[a]:
            a += 1
        return a

    expected = [loop(t, d, n) for t, d, n in zip(sampled, drafts, counts, strict=True)]
    assert set(expected) == set(range(width + 1))
    assert num_accepted(torch.tensor(sampled), torch.tensor(drafts), torch.tensor(counts)).tolist() == expected


def best_branches(probs: list[float], num_drafts: int, num_useful: int, num_branches: int) -> list[int]:
    """By the definition: P(hit i) = p_1 ... p_i (1 - p_{i+1}); with two branches or more, branch 0 is always one of them."""

    def chance(i: int) -> float:
        survival = 1.0
        for p in probs[1 : i + 1]:
            survival *= p
        return survival * (1 - probs[i + 1]) if i + 1 < num_drafts else survival

    order = sorted(range(min(num_drafts, num_useful)), key=lambda i: -chance(i))
    if num_branches > 1 and 0 in order:
        order.remove(0)
        order.insert(0, 0)
    return order[:num_branches]


def test_branches_are_ranked_by_their_chance_to_be_hit() -> None:
    rng = random.Random(1)
    width, size, most = 5, 500, 3
    probs = [[rng.random() for _ in range(width)] for _ in range(size)]
    drafts = [rng.randint(1, width) for _ in range(size)]
    useful = [rng.randint(0, n) for n in drafts]
    branches = [rng.randint(1, most) for _ in range(size)]
    order = rank_branches(torch.tensor(probs), torch.tensor(drafts), torch.tensor(useful), torch.tensor(branches), most)
    assert order.shape == (size, most)
    for row, p, n, u, b in zip(order.tolist(), probs, drafts, useful, branches, strict=True):
        assert [branch for branch in row[:b] if branch >= 0] == best_branches(p, n, u, b)


def test_the_first_probability_is_ignored_since_draft_0_is_certain() -> None:
    def order(first: float) -> list[list[int]]:
        one = torch.tensor([3])
        return rank_branches(torch.tensor([[first, 0.6, 0.7]]), one, one, torch.tensor([3]), 3).tolist()

    assert order(0.0) == order(1.0) == order(float("nan"))


@pytest.mark.parametrize("useful", [0, -1])
def test_no_branch_is_run_near_the_end(useful: int) -> None:
    one = torch.tensor([1])
    assert rank_branches(torch.tensor([[1.0]]), one, torch.tensor([useful]), one, 1).tolist() == [[-1]]


def test_drafts_that_are_sure_to_be_accepted_leave_the_last_branch() -> None:
    three, one = torch.tensor([3]), torch.tensor([1])
    assert rank_branches(torch.tensor([[0.0, 1.0, 1.0]]), three, three, one, 1).tolist() == [[2]]


@pytest.mark.parametrize("chance", [0.0, 0.6, 1.0])
def test_an_imposed_acceptance_is_that_of_independent_coins(chance: float) -> None:
    size, width = 20_000, 5
    sampled = torch.zeros((size, width), dtype=torch.long)
    drafts = imposed_drafts(sampled, torch.zeros(size, dtype=torch.long), torch.arange(size) * width, chance)
    counts = num_accepted(sampled, drafts, torch.full((size,), width))
    expected = sum(chance**i for i in range(width))
    assert counts.double().mean().item() == pytest.approx(expected, abs=0.03)


def test_imposed_acceptance_differs_between_seeds_and_stays_with_a_position() -> None:
    sampled, seeds = torch.zeros((2, 200), dtype=torch.long), torch.tensor([1, -5])
    drafts = imposed_drafts(sampled, seeds, torch.tensor([7, 7]), 0.5)
    later = imposed_drafts(sampled[:, 50:], seeds, torch.tensor([57, 57]), 0.5)
    assert torch.equal(drafts[:, 51:], later[:, 1:]), "the coin of a position does not depend on where a step begins"
    assert 60 < (drafts[0] == drafts[1]).sum() < 140
