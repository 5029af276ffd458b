"""The bundled model on the GPU: exact in float64; in bfloat16 every mismatch has to be shown to be a tie, and is counted."""

from __future__ import annotations

import pytest
import torch

from engine.sampling_params import DecodingMode
from tests.engine.bundled import PLANS, answers, count_ties, double_model, question_prompts, requests_for

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

BFLOAT16_TIE = 0.5
"""Logits near 20 are spaced by 0.125 in bfloat16, and the layers before them round, too."""


@pytest.fixture(scope="module")
def exact_model():
    return double_model()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("depth", [0, 1])
def test_float64_on_the_gpu_equals_the_cpu_in_every_mode(temperature, depth):
    prompts = question_prompts()
    expected = answers(requests_for(prompts, temperature, DecodingMode.AR), 1, 0, 1, dtype="float64")
    for mode, num_branches in [(DecodingMode.AR, 1), *PLANS.values()]:
        requests = requests_for(prompts, temperature, mode)
        assert answers(requests, num_branches, depth, 16, dtype="float64", device="cuda") == expected, mode


@pytest.mark.parametrize("kernels", ["reference", "triton"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_bfloat16_mismatches_are_ties(kernels, temperature, exact_model, record_property):
    prompts = question_prompts()
    options = {"dtype": "bfloat16", "device": "cuda", "kernels": kernels}
    expected = answers(requests_for(prompts, temperature, DecodingMode.AR), 1, 0, 1, **options)
    num_ties = 0
    for place, (mode, num_branches) in enumerate(PLANS.values()):
        requests = requests_for(prompts, temperature, mode)
        given = answers(requests, num_branches, place % 2, 16, **options)
        num_ties += count_ties(exact_model, requests, given, expected, BFLOAT16_TIE)
    record_property("ties", num_ties)
    print(f"{kernels}, temperature {temperature}: {num_ties} ties in {len(prompts) * len(PLANS)} answers")
