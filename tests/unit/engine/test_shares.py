"""How shares are cut to the rows of a step, against the rule for one request after the other."""

from __future__ import annotations

import random

import numpy as np

from engine.shares import Shares

Shape = tuple[int, int, int, int, int, int]


def scalar_rule(shapes: list[Shape], budget: int, kept_back: int, for_prompts: int) -> list[Shape]:
    """Oldest first: at most what is left beyond one row of each later request and the rows that are kept back; drafts and
    branches leave rows to the prompts behind them, too."""
    cut: list[Shape] = []
    for place, (prefill, drafts, branches, block, anchor, _) in enumerate(shapes):
        limit = max(1, budget - (len(shapes) - place - 1) - kept_back)
        chunk = min(prefill, limit)
        for_later = min(for_prompts, sum(shape[0] for shape in shapes[place + 1 :]))
        limit = max(1, min(limit, budget - (len(shapes) - place - 1) - for_later))
        drafts = max(0, min(drafts, limit - chunk)) if chunk == prefill else 0
        branches = max(0, min(branches, (limit - chunk - drafts) // (block + anchor))) if chunk == prefill else 0
        is_empty = drafts + branches == 0
        cut.append((chunk, drafts, branches, *((1, 0) if is_empty else (block, anchor)), 0))
        budget -= chunk + drafts + branches * (block + anchor)
    return cut


def random_shape(rng: random.Random) -> Shape:
    if rng.random() < 0.1:
        return 0, 0, 0, 1, 0, 0  # wants nothing more
    block = rng.choice((1, 4, 8))
    drafts = 1 if block == 1 else rng.randint(1, block)
    branches = 0 if block == 1 else rng.randint(0, drafts)
    return rng.choice((0, 0, 0, rng.randint(1, 40))), drafts, branches, block, rng.randint(0, 1) if branches else 0, 0


def test_shares_are_cut_like_one_request_after_the_other() -> None:
    rng = random.Random(2)
    num_cut = 0
    for _ in range(500):
        shapes = [random_shape(rng) for _ in range(rng.randint(1, 9))]
        size = len(shapes)
        budget = size + rng.choice((0, 1, 5, 20, 60, 300))
        kept_back, for_prompts = rng.choice((0, budget // 4)), rng.choice((0, budget // 4))
        shares = Shares(np.arange(size), np.array(shapes).reshape(-1, 6), np.arange(size) * 10)
        fitted = shares.fit(budget, kept_back, for_prompts)
        expected = scalar_rule(shapes, budget, kept_back, for_prompts)
        kept = [row for row, (chunk, drafts, branches, *_) in enumerate(expected) if chunk + drafts + branches]
        assert fitted.slots_N.tolist() == kept
        assert [tuple(shape) for shape in fitted.shapes_N6.tolist()] == [expected[row] for row in kept]
        assert fitted.max_computed_N.tolist() == [row * 10 for row in kept]
        assert int(fitted.num_rows().sum()) <= budget
        num_cut += expected != shapes
    assert 100 < num_cut < 450
