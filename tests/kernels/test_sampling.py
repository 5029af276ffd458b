"""The Triton sampling chain (interpreted where there is no GPU) against the reference."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels.process_logits import reference as process_reference
from kernels.sampling import reference as sampling_reference
from tests.kernels.checks import check_noise, check_philox_words
from tests.kernels.sampling_cases import (
    INF,
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

NUCLEUS = tuple(
    Row(top_p=top_p, seed=i) for i, top_p in enumerate((0.5, 0.25, 0.5, 0.9, 0.3, 1 / 3, 0.5, 0.99, 0.7, 0.7, 0.5, 0.75))
)
TOP_K = tuple(
    Row(top_k=top_k, top_p=top_p) for top_k, top_p in ((3, 1.0), (2, 0.5), (5, 1.0), (1, 1.0), (4, 0.6), (7, 1.0)) * 2
)
GREEDY = (Row(temperature=0.0),) * 6
SOME = (*MIXED[:3], MIXED[5], MIXED[10])


@pytest.fixture(scope="module")
def processing(device):
    from kernels.process_logits import triton

    return triton


@pytest.fixture(scope="module")
def sampler(device):
    from kernels.sampling import triton

    return triton


def test_noise_integers_are_the_references(device):
    check_philox_words(device)


def test_noise_is_the_references_but_for_last_bits(device):
    check_noise(device)


@pytest.mark.parametrize(
    ("rows", "vocab_size", "dtype"), [(MIXED, 50, torch.float32), (MIXED, 2048, torch.float16), (SOME, 5003, torch.float32)]
)
def test_processing_of_mixed_rows(rows, vocab_size, dtype, processing, device):
    logits = random_logits(len(rows), vocab_size, dtype, device)
    check_processing(processing, logits, sampling_of(rows, device))


@pytest.mark.parametrize("name", ["grammar", "bias", "bans", "penalties", "all"])
@pytest.mark.parametrize("rows", [SOME, GREEDY], ids=["mixed", "greedy"])
def test_constrained_rows(rows, name, processing, sampler, device):
    vocab_size = 303
    logits = random_logits(len(rows), vocab_size, torch.float16, device)
    sampling = sampling_of(rows, device, **constraints(len(rows), vocab_size, device)[name])
    check_processing(processing, logits, sampling)
    check_draws(sampler, logits, sampling)


@pytest.mark.parametrize(
    ("rows", "vocab_size"), [(MIXED, 2048), (TOP_K, 2048), (NUCLEUS, 4099)], ids=["mixed", "top_k", "nucleus"]
)
def test_extreme_rows(rows, vocab_size, processing, device):
    logits = extreme_rows(vocab_size, torch.float16, device)
    check_processing(processing, logits, sampling_of(rows, device), None)


def test_draws_of_extreme_rows(sampler, device):
    rows = tuple(Row(temperature=temperature, seed=i) for i, temperature in enumerate((1.0, 0.0, 0.6, 1.9) * 3))
    check_draws(sampler, extreme_rows(4099, torch.float32, device), sampling_of(rows, device))


def test_ties_at_the_end_of_top_p_go_to_the_first_ids_and_those_of_top_k_stay(processing, device):
    """Sums of equal powers of two are exact, so these sets are known."""
    logits = torch.zeros(3, 8192, device=device)
    logits[1:, 5000:5003] = 20.0
    rows = (Row(top_p=0.25), Row(top_k=2), Row(top_k=2, top_p=0.5))
    for module in (processing, process_reference):
        kept = module.process_logits(logits, sampling_of(rows, device), None) > -INF
        assert kept[0].nonzero().flatten().tolist() == list(range(2048))
        assert kept[1].nonzero().flatten().tolist() == [5000, 5001, 5002]
        assert kept[2].nonzero().flatten().tolist() == [5000, 5001]


@pytest.mark.parametrize(("draft_temperature", "vocab_size"), [(None, 5003), (0.0, 50), (0.4, 2048), (1.5, 50)])
def test_draws_of_mixed_rows(draft_temperature, vocab_size, sampler, device):
    logits = random_logits(len(SOME), vocab_size, torch.float32, device, seed=1)
    check_draws(sampler, logits, sampling_of(SOME, device), draft_temperature)


def test_verification_draws_what_drafting_draws(sampler, device):
    check_verifying_draws(sampler, random_logits(len(SOME), 103, torch.float16, device), sampling_of(SOME, device))


def test_a_greedy_batch_takes_the_first_of_the_largest(sampler, device):
    logits = torch.zeros(3, 9001, device=device)
    logits[0, [4999, 5000, 8999]] = 1.0
    logits[1, 9000] = 1.0
    logits[2] = -INF
    sampling, position = sampling_of((Row(temperature=0.0),) * 3, device), torch.zeros(3, dtype=torch.long, device=device)
    for module in (sampler, sampling_reference):
        assert module.sample_tokens(logits, None, sampling, position, None).tolist() == [4999, 9000, 0]
    check_draws(sampler, logits[:2], sampling_of((Row(temperature=0.0),) * 2, device))


def test_a_large_vocabulary(processing, sampler, device):
    """With a stride. 131,072 values in float16: many tokens tie."""
    rows = (Row(seed=3), Row(top_p=0.95, seed=4))
    logits = random_logits(2, 131_080, torch.float16, device)[:, :131_072]
    sampling = sampling_of(rows, device)
    check_processing(processing, logits, sampling)
    position = torch.tensor([131_000, 5], device=device)
    tokens, probs = sampler.sample_drafts(logits, None, sampling, position, MASK, None)
    expected = sampling_reference.sample_drafts(logits, None, sampling, position, MASK, None)
    assert torch.equal(tokens, expected[0])
    torch.testing.assert_close(probs, expected[1], atol=0, rtol=1e-4)


def test_a_row_does_not_depend_on_its_batch(sampler, device):
    check_rows_are_alone(sampler, random_logits(len(SOME), 5003, torch.float32, device), sampling_of(SOME, device))


def test_samples_follow_the_processed_softmax(sampler, device):
    check_distribution(sampler, Row(temperature=1.25), device, 1000)


def test_float64_is_refused(sampler, device):
    logits = torch.zeros(1, 20, dtype=torch.float64, device=device)
    with pytest.raises(ValueError, match="float64"):
        sampler.sample_tokens(logits, None, sampling_of((Row(),), device), torch.zeros(1, dtype=torch.long), MASK)


def test_triton_compiles_for_a_gpu(tmp_path):
    """As it is launched: with these types, and what is None left out. Compiling takes no GPU."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.kernels.compile_sampling"]
    run = subprocess.run(command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
