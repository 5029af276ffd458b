"""What an admission writes: all of a slot, whatever its request before left there, and nothing of other slots."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from engine.input_batch import InputBatch
from engine.sampling_params import DecodingMode, SamplingParams
from engine.step import Admission, StepPlan

VOCAB_SIZE, STOPS = 16, (1, 2)
PLAIN = SamplingParams(9, seed=3)
EVERYTHING = SamplingParams(
    20,
    seed=2**64 - 2,
    temperature=0.7,
    top_p=0.9,
    top_k=5,
    min_p=0.1,
    min_tokens=4,
    frequency_penalty=0.5,
    presence_penalty=-0.5,
    repetition_penalty=1.3,
    logit_bias=((7, 1.5), (3, -100.0)),
)


def admission(slot: int, sampling: SamplingParams, mode: DecodingMode = DecodingMode.AR) -> Admission:
    return Admission(slot, 2, (5, 6, 6), (8, 9, 8), mode, sampling, STOPS)


def batch_of(*steps: list[Admission]) -> InputBatch:
    batch = InputBatch(4, 3, 2, VOCAB_SIZE, torch.device("cpu"), len(STOPS))
    for admissions in steps:
        batch.update(StepPlan.of(0, (), admissions))
    return batch


def state(batch: InputBatch, slot: int) -> dict[str, object]:
    """Everything a slot has but its pages and what a later step writes before it is read."""
    held = {**vars(batch), **{f"biases.{k}": v for k, v in vars(batch.biases).items()}}
    held |= {f"stops.{k}": v for k, v in vars(batch.stops).items()} | (vars(batch.counts) if batch.counts else {})
    kept = ("block_table_SP", "draft_probs_SK", "block_SK")
    columns = {k: v[slot].tolist() for k, v in held.items() if isinstance(v, Tensor) and "_S" in k and k not in kept}
    return columns | {"drafts_SK": int(batch.drafts_SK[slot, 0])}


def test_every_number_of_a_request_arrives() -> None:
    batch = batch_of([admission(2, EVERYTHING, DecodingMode.TIDAR), admission(0, PLAIN, DecodingMode.DIFFUSION)])
    assert batch.num_computed_S.tolist() == [2, 0, 2, 0, 0]
    assert batch.num_held_S.tolist() == [1, 0, 1, 0, 0]
    assert batch.wanted_S.tolist() == [6, 0, 17, 0, 0]
    assert batch.drafts_SK[:, 0].tolist() == [8, 0, 8, 0, 0]
    assert batch.seed_S.tolist() == [3, 0, -2, 0, 0], "the bits of 2**64 - 2"
    assert batch.top_k_S.tolist() == [0, 0, 5, 0, 0]
    assert batch.stop_at_S.tolist() == [9, 0, 16, 0, 0]
    assert batch.is_tidar_S.tolist() == [False, False, True, False, False]
    assert batch.is_diffusion_S.tolist() == [True, False, False, False, False]
    for name in ("temperature", "top_p", "min_p"):
        expected = [getattr(PLAIN, name), 0.0, getattr(EVERYTHING, name), 0.0, 0.0]
        assert getattr(batch, f"{name}_S").tolist() == expected
    for name in ("repetition", "frequency", "presence"):
        expected = [getattr(PLAIN, f"{name}_penalty"), 0.0, getattr(EVERYTHING, f"{name}_penalty"), 0.0, 0.0]
        assert getattr(batch, f"{name}_S").tolist() == expected
    assert batch.biases.ids_SW[2, :3].tolist() == [7, 3, 0]
    assert batch.biases.values_SW[2, :3].tolist() == [1.5, -100.0, 0.0]
    assert batch.stops.ids_SW[2, :3].tolist() == [1, 2, 0]
    assert batch.stops.values_SW[2, :3].tolist() == [-math.inf, -math.inf, 0.0]
    assert batch.counts is not None
    assert batch.counts.in_prompt_SV[2].nonzero().flatten().tolist() == [5, 6]
    assert batch.counts.output_SV[2].tolist() == [0] * 8 + [2, 1] + [0] * 6


@pytest.mark.parametrize("sampling", [PLAIN, EVERYTHING])
def test_a_request_finds_nothing_of_the_one_before_it_and_leaves_others_alone(sampling: SamplingParams) -> None:
    before = SamplingParams(
        7, seed=9, min_tokens=7, repetition_penalty=2.0, presence_penalty=1.0, logit_bias=tuple((i, 2.0) for i in range(9))
    )
    first = [Admission(slot, 5, (11,) * 3, (12, 13), DecodingMode.DIFFUSION, before, (4, 5)) for slot in range(4)]
    again, fresh = batch_of(first, [admission(1, sampling)]), batch_of([admission(1, sampling)])
    assert again.counts is not None
    if sampling.has_penalties:
        assert fresh.counts is not None
        assert torch.equal(again.counts.output_SV[1], fresh.counts.output_SV[1])
        assert torch.equal(again.counts.in_prompt_SV[1], fresh.counts.in_prompt_SV[1])
    again.counts = fresh.counts = None
    assert state(again, 1) == state(fresh, 1)
    untouched = batch_of(first)
    untouched.counts = None
    for slot in (0, 2, 3):
        assert state(again, slot) == state(untouched, slot)


def test_nothing_moves_when_requests_are_admitted() -> None:
    batch = batch_of()
    batch.make_counts()

    def places() -> list[int]:
        owners = (batch, batch.biases, batch.stops, batch.counts)
        return [t.data_ptr() for owner in owners for t in vars(owner).values() if isinstance(t, Tensor)]

    before = places()
    longest = SamplingParams(
        300, min_tokens=1, stop_token_ids=tuple(range(256)), logit_bias=tuple((i % 16, 0.1) for i in range(300))
    )
    stops = tuple(range(256 + len(STOPS)))
    batch.update(StepPlan.of(0, (), [Admission(3, 0, (1,), (), DecodingMode.AR, longest, stops), admission(0, EVERYTHING)]))
    assert places() == before
