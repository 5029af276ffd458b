"""The compiled sampling chain against the reference on the GPU, in the sizes of real models."""

from __future__ import annotations

import pytest
import torch

from kernels.backend import triton_kernels
from kernels.process_logits import reference as process_reference
from kernels.sampling import reference as sampling_reference
from tests.gpu.waiting import no_waiting
from tests.kernels.checks import check_noise, check_philox_words
from tests.kernels.sampling_cases import (
    MASK,
    MIXED,
    Row,
    check_distribution,
    check_draws,
    check_processing,
    check_rows_are_alone,
    check_verifying_draws,
    constraints,
    extreme_rows,
    random_logits,
    sampling_of,
)

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
VOCABULARIES = [2048, 5003, 131_072, 151_936]
GREEDY = (Row(temperature=0.0),) * len(MIXED)


@pytest.fixture(scope="module")
def processing():
    from kernels.process_logits import triton

    return triton


@pytest.fixture(scope="module")
def sampler():
    from kernels.sampling import triton

    return triton


@pytest.mark.smoke
def test_noise(device):
    check_philox_words(device)
    check_noise(device)


@pytest.mark.smoke_where(dtype=torch.bfloat16, vocab_size=151_936)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_mixed_rows(vocab_size, dtype, processing, sampler, device):
    logits, sampling = random_logits(len(MIXED), vocab_size, dtype, device), sampling_of(MIXED, device)
    check_processing(processing, logits, sampling)
    check_verifying_draws(sampler, logits, sampling)
    for draft_temperature in (None, 0.0, 0.4):
        check_draws(sampler, logits, sampling, draft_temperature)


@pytest.mark.smoke_where(vocab_size=151_936, name="all")
@pytest.mark.parametrize("name", ["grammar", "bias", "bans", "penalties", "all"])
@pytest.mark.parametrize("rows", [MIXED, GREEDY], ids=["mixed", "greedy"])
@pytest.mark.parametrize("vocab_size", [1003, 151_936])
def test_constrained_rows(vocab_size, rows, name, processing, sampler, device):
    logits = random_logits(len(rows), vocab_size, torch.bfloat16, device)
    sampling = sampling_of(rows, device, **constraints(len(rows), vocab_size, device)[name])
    check_processing(processing, logits, sampling)
    check_draws(sampler, logits, sampling)


@pytest.mark.parametrize("vocab_size", [2048, 4099, 131_072])
def test_extreme_rows(vocab_size, processing, sampler, device):
    logits, sampling = extreme_rows(vocab_size, torch.bfloat16, device), sampling_of(MIXED, device)
    check_processing(processing, logits, sampling, None)
    check_draws(sampler, logits, sampling)


def test_many_rows(sampler, device):
    """As many as a large batch has, one place each in four times as many rows."""
    rows = tuple(Row(temperature=(i % 5) / 4, top_p=1.0 if i % 3 else 0.9, seed=i) for i in range(1000))
    logits, sampling = random_logits(4000, 32_003, torch.bfloat16, device), sampling_of(rows, device)
    place = torch.arange(1000, device=device) * 4 + 1
    position = torch.arange(1000, device=device)
    tokens = sampler.sample_tokens(logits, place, sampling, position, MASK)
    processed = process_reference.process_logits(logits[place], sampling, MASK)
    # Rounding may break a tie of scores, or leave or drop a token at the end of top-p, which may be the one that is drawn.
    assert (tokens != sampling_reference.sample(processed, sampling, position)).sum() <= 5


def test_a_row_does_not_depend_on_its_batch(sampler, device):
    check_rows_are_alone(sampler, random_logits(len(MIXED), 131_072, torch.bfloat16, device), sampling_of(MIXED, device))


@pytest.mark.parametrize("row", [Row(temperature=1.25), Row(temperature=1.25, top_k=8, top_p=0.97)], ids=["plain", "truncated"])
def test_samples_follow_the_processed_softmax(row, sampler, device):
    check_distribution(sampler, row, device, 50_000)


@pytest.mark.smoke
def test_nothing_waits_for_the_device(device):
    kernels = triton_kernels(8)
    logits, sampling = random_logits(len(MIXED), 151_936, torch.bfloat16, device), sampling_of(MIXED, device)
    place = position = torch.arange(len(MIXED), device=device)

    def run() -> None:
        kernels.sample_tokens(logits, None, sampling, position, MASK)
        kernels.sample_drafts(logits, place, sampling, position, MASK, 0.5)

    run()  # compiles
    torch.cuda.synchronize()
    with no_waiting():
        run()


def test_a_captured_draw_follows_its_inputs(sampler, device):
    """Captured once, replayed with other logits, places, seeds and parameters."""
    logits, sampling = random_logits(len(MIXED), 32_003, torch.bfloat16, device), sampling_of(MIXED, device)
    place, position = (torch.arange(len(MIXED), device=device) for _ in range(2))

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        return sampler.sample_drafts(logits, place, sampling, position, MASK, None)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens, probs = run()
    for seed in (1, 2):
        logits.copy_(random_logits(len(MIXED), 32_003, torch.bfloat16, device, seed))
        position += 17
        place.copy_(place.flip(0))
        sampling.seed.add_(3)
        sampling.top_k.copy_(sampling.top_k.roll(1))
        sampling.temperature.copy_(sampling.temperature.roll(2))
        graph.replay()
        expected = run()
        assert torch.equal(tokens, expected[0])
        assert torch.equal(probs, expected[1])
