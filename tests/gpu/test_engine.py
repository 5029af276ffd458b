"""The bundled model on the GPU: exact in float64; in bfloat16 every mismatch has to be shown to be a tie, and is counted."""

from __future__ import annotations

import dataclasses

import pytest

from engine.config import CacheConfig, Quantization
from engine.sampling_params import DecodingMode
from tests.engine.bundled import PLANS, answers, bundled_engine, count_ties, double_model, question_prompts, requests_for
from tests.engine.driver import drive
from tests.gpu.waiting import no_waiting

BFLOAT16_TIE = 0.5
"""Logits near 20 are spaced by 0.125 in bfloat16, and the layers before them round, too."""

FEW_PAGES = CacheConfig(num_pages=256)
"""Leaves the memory to the other tests, beside which these run first."""


@pytest.fixture(scope="module")
def exact_model():
    return double_model()


@pytest.mark.parametrize("enforce_eager", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("depth", [0, 1])
def test_float64_on_the_gpu_equals_the_cpu_in_every_mode(temperature, depth, enforce_eager):
    prompts = question_prompts()
    expected = answers(requests_for(prompts, temperature, DecodingMode.AR), 1, 0, 1, dtype="float64")
    for mode, num_branches in [(DecodingMode.AR, 1), *PLANS.values()]:
        requests = requests_for(prompts, temperature, mode)
        options = {"dtype": "float64", "device": "cuda", "enforce_eager": enforce_eager}
        assert answers(requests, num_branches, depth, 16, **options) == expected, mode


@pytest.mark.smoke
def test_a_mode_gives_the_answers_of_ar_at_both_depths(short_start, exact_model, record_property):
    """A few answers, by Triton kernels in bfloat16, in captured steps."""
    prompts = question_prompts()[:12]
    options = {"dtype": "bfloat16", "device": "cuda", "kernels": "triton", "cache": FEW_PAGES}
    expected = answers(requests_for(prompts, 0.0, DecodingMode.AR), 2, 0, 4, **options)
    requests, num_ties = requests_for(prompts, 0.0, DecodingMode.TIDAR), 0
    for depth in (0, 1):
        core = bundled_engine(2, depth, 4, **options)
        transcript = drive(core, requests)
        assert core.graphs.num_replays > 0
        given = [transcript.tokens(request.request_id) for request in requests]
        num_ties += count_ties(exact_model, requests, given, expected, BFLOAT16_TIE)
    record_property("ties", num_ties)


@pytest.mark.smoke_where(kernels="triton", temperature=0.0, depth=1)
@pytest.mark.parametrize("kernels", ["reference", "triton"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("depth", [0, 1])
def test_decode_steps_are_replayed_and_nothing_in_them_waits_for_the_device(kernels, temperature, depth, short_start):
    options = {"kernels": kernels, "enforce_eager": False, "cache": FEW_PAGES}
    core = bundled_engine(2, depth, 8, dtype="bfloat16", device="cuda", **options)
    for request in requests_for(question_prompts()[:8], temperature, DecodingMode.TIDAR):
        core.add(request)
    while not all(r.num_output_tokens for r in core.scheduler.running) or len(core.scheduler.running) < 8:
        core.step()
    replayed = core.graphs.num_replays
    with no_waiting():
        for _ in range(3):
            core.step()
    assert core.graphs.num_replays == replayed + 3


def test_an_uncaptured_decode_step_does_not_wait_for_the_device_either():
    core = bundled_engine(2, 1, 8, dtype="bfloat16", device="cuda", kernels="triton", enforce_eager=True)
    for request in requests_for(question_prompts()[:8], 0.0, DecodingMode.AR):
        core.add(request)
    for _ in range(6):
        core.step()
    with no_waiting():
        for _ in range(3):
            core.step()


def test_a_sampled_batch_with_every_option_is_replayed_and_equals_the_uncaptured_one():
    options = {"top_p": 0.9, "top_k": 40, "min_p": 0.01, "repetition_penalty": 1.1, "min_tokens": 3, "logit_bias": ((9, 1.0),)}
    requests = [
        dataclasses.replace(request, sampling=dataclasses.replace(request.sampling, **options))
        for request in requests_for(question_prompts(), 0.8, DecodingMode.TIDAR)
    ]
    both = [answers(requests, 2, 1, 16, "float64", "cuda", enforce_eager=eager) for eager in (True, False)]
    assert both[0] == both[1]


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


@pytest.mark.parametrize("kernels", ["reference", "triton"])
def test_eight_bit_weights_are_the_same_in_every_mode(kernels, record_property):
    """Against the dequantised weights in float64."""
    prompts, judge = question_prompts(), double_model(Quantization.AT_LOAD)
    options = {"dtype": "bfloat16", "device": "cuda", "kernels": kernels, "quantize_fp8": True}
    expected = answers(requests_for(prompts, 1.0, DecodingMode.AR), 1, 0, 1, **options)
    num_ties = 0
    for mode, num_branches in PLANS.values():
        requests = requests_for(prompts, 1.0, mode)
        num_ties += count_ties(judge, requests, answers(requests, num_branches, 0, 16, **options), expected, BFLOAT16_TIE)
    record_property("ties", num_ties)
    print(f"{kernels}, fp8: {num_ties} ties in {len(prompts) * len(PLANS)} answers")
