"""Processing against a naive implementation in Python floats, and the corners of each filter."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from engine.decode.sampling import Ahead, row_sampling
from engine.input_batch import InputBatch, SamplingNeeds
from engine.sampling_params import DecodingMode, SamplingParams
from engine.step import Admission, StepPlan
from kernels.philox.reference import gumbel
from kernels.process_logits.metadata import RowSampling
from kernels.process_logits.reference import process_logits
from kernels.sampling.reference import probability_of, sample

MASK = 2


def naive(logits: list[float], params: SamplingParams) -> list[float]:
    """Temperature, min-p, top-k, top-p, in this order; -inf where a token was dropped."""
    scores = [-math.inf if i == MASK else x for i, x in enumerate(logits)]
    if params.greedy:
        return scores
    scores = [x / params.temperature for x in scores]

    def probs() -> list[float]:
        weights = [math.exp(x - max(scores)) for x in scores]
        return [w / sum(weights) for w in weights]

    if params.min_p:
        p = probs()
        scores = [x if q >= params.min_p * max(p) else -math.inf for x, q in zip(scores, p, strict=True)]
    if params.top_k:
        bound = sorted(scores)[-min(params.top_k, len(scores))]
        scores = [x if x >= bound else -math.inf for x in scores]
    if params.top_p < 1:
        p = probs()
        order, before = sorted(range(len(p)), key=lambda i: -p[i]), 0.0
        for rank, i in enumerate(order):
            if rank and before >= params.top_p:
                scores[i] = -math.inf
            before += p[i]
    return scores


def rows_of(params: list[SamplingParams]) -> RowSampling:
    batch = InputBatch(len(params), 1, 1, 8, torch.device("cpu"))
    batch.update(StepPlan.of(0, (), [Admission(slot, 0, (0,), (), DecodingMode.AR, p) for slot, p in enumerate(params)]))
    nothing = Ahead(torch.zeros(len(params), dtype=torch.long), torch.zeros((len(params), 0), dtype=torch.long))
    return row_sampling(batch, torch.arange(len(params)), SamplingNeeds.of(params), nothing)


def process(logits: Tensor, *params: SamplingParams) -> Tensor:
    return process_logits(logits, rows_of(list(params)), MASK)


def kept(logits: list[float], **values: float) -> list[int]:
    scores = process(torch.tensor([logits], dtype=torch.float64), SamplingParams(1, **values))  # type: ignore[arg-type]
    return scores[0].isfinite().nonzero().flatten().tolist()


def test_processing_equals_the_naive_one_in_a_batch_of_mixed_settings() -> None:
    rng = random.Random(0)
    params = [
        SamplingParams(
            1,
            temperature=rng.choice((0.0, 0.5, 1.0, 1.9)),
            top_p=rng.choice((1.0, rng.uniform(0.01, 1.0))),
            top_k=rng.choice((0, rng.randint(1, 40))),
            min_p=rng.choice((0.0, rng.uniform(0.0, 1.0))),
        )
        for _ in range(300)
    ]
    logits = torch.randn((300, 30), generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2
    expected = torch.tensor([naive(row, p) for row, p in zip(logits.tolist(), params, strict=True)], dtype=torch.float64)
    torch.testing.assert_close(process(logits, *params), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_logits_are_processed_in_float32_at_least(dtype: torch.dtype) -> None:
    logits = torch.randn((2, 10)).to(dtype)
    before = logits.clone()
    scores = process(logits, SamplingParams(1), SamplingParams(1, temperature=0.0))
    assert scores.dtype == torch.float32
    assert torch.equal(logits, before), "the model's logits were changed"


def test_the_mask_token_can_be_neither_sampled_nor_drafted() -> None:
    logits = torch.zeros((2, 5), dtype=torch.float64)
    logits[:, MASK] = 50.0
    rows = rows_of([SamplingParams(1, temperature=0.0), SamplingParams(1)])
    scores = process_logits(logits, rows, MASK)
    assert scores[:, MASK].tolist() == [-math.inf, -math.inf]
    assert MASK not in sample(scores, rows, torch.tensor([3, 3])).tolist()
    greedy = rows_of([SamplingParams(1, temperature=0.0)] * 2)
    assert sample(process_logits(logits, greedy, MASK), greedy, torch.tensor([3, 3])).tolist() == [0, 0]
    assert process_logits(logits, greedy, None).argmax(dim=-1).tolist() == [MASK, MASK]


def test_filters_keep_what_they_should() -> None:
    logits = [math.log(p) for p in (0.5, 0.25, 0.9, 0.15, 0.1)]
    assert kept(logits) == [0, 1, 3, 4]
    assert kept(logits, top_k=2) == [0, 1]
    assert kept(logits, top_k=1) == [0]
    assert kept(logits, top_k=100) == [0, 1, 3, 4]
    assert kept(logits, top_p=0.5) == [0], "the smallest set whose probability reaches top_p"
    assert kept(logits, top_p=0.51) == [0, 1]
    assert kept(logits, top_p=1e-9) == [0], "the likeliest token always stays"
    assert kept(logits, min_p=0.29) == [0, 1, 3]
    assert kept(logits, min_p=0.31) == [0, 1]
    assert kept(logits, min_p=1.0) == [0]
    # In order: top-k leaves 0.5 and 0.25, of which the first alone is two thirds.
    assert kept(logits, top_k=2, top_p=0.66) == [0]
    assert kept(logits, top_p=0.66) == [0, 1]


def test_tokens_that_tie_with_the_last_one_of_top_k_stay() -> None:
    assert kept([1.0, 1.0, 9.0, 1.0, 0.0], top_k=2) == [0, 1, 3]


def test_a_greedy_row_is_untouched_by_its_neighbours_filters() -> None:
    logits = torch.randn((2, 9), dtype=torch.float64)
    scores = process(
        logits,
        SamplingParams(1, temperature=0.0, top_k=1, top_p=0.1, min_p=0.9),
        SamplingParams(1, top_k=3, min_p=0.01, top_p=0.9),
    )
    expected = logits[0].clone()
    expected[MASK] = -math.inf
    assert torch.equal(scores[0], expected)


def test_a_sample_is_the_argmax_of_scores_and_noise_and_greedy_rows_have_none() -> None:
    params = [SamplingParams(1, seed=2**64 - 1), SamplingParams(1, seed=5), SamplingParams(1, seed=5, temperature=0.0)]
    rows, positions = rows_of(params), torch.tensor([7, 8, 9])
    logits = torch.randn((3, 50), dtype=torch.float64)
    scores = process_logits(logits, rows, None)
    noise = gumbel(torch.tensor([-1, 5, 5]), positions, 50, torch.float64)
    noise[2] = 0.0
    assert sample(scores, rows, positions).tolist() == (logits + noise).argmax(dim=-1).tolist()


def test_the_noise_of_a_row_does_not_depend_on_its_neighbours() -> None:
    params = [SamplingParams(1, seed=seed, temperature=1.5) for seed in range(20)]
    logits = torch.randn((1, 50), dtype=torch.float64).expand(20, -1)
    positions = torch.arange(20)
    rows = rows_of(params)
    together = sample(process_logits(logits, rows, None), rows, positions).tolist()
    alone = []
    for i, p in enumerate(params):
        row = rows_of([p])
        alone += sample(process_logits(logits[:1], row, None), row, positions[i : i + 1]).tolist()
    assert together == alone
    assert len(set(together)) > 5


def test_probability_is_that_of_the_processed_softmax() -> None:
    scores = process(torch.log(torch.tensor([[0.5, 0.25, 0.9, 0.25]])), SamplingParams(1, top_k=1))
    torch.testing.assert_close(probability_of(scores, torch.tensor([0])), torch.tensor([1.0]))
    assert probability_of(scores, torch.tensor([1])).item() == 0.0


def test_needs_are_those_of_the_rows_that_are_not_greedy() -> None:
    greedy = SamplingParams(1, temperature=0.0, top_k=3, top_p=0.5, min_p=0.5)
    assert SamplingNeeds.of([greedy]) == SamplingNeeds(False, False, False, False)
    assert SamplingNeeds.of([greedy, SamplingParams(1, top_p=0.5)]) == SamplingNeeds(True, False, True, False)
    mixed = [SamplingParams(1, top_k=3), SamplingParams(1, min_p=0.5)]
    assert SamplingNeeds.of(mixed) == SamplingNeeds(True, True, False, True)
