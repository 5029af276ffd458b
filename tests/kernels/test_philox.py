"""The noise: published answers, purity, and the distribution."""

from __future__ import annotations

import math

import pytest
import torch

from kernels.philox.reference import gumbel, philox
from tests.kernels.checks import check_philox

SEEDS = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 1, 1])
POSITIONS = torch.tensor([0, 0, 5, 131071, 7, 1, 2**31])


def test_known_answers():
    check_philox(torch.device("cpu"))


def test_noise_is_a_function_of_seed_position_and_token_alone():
    whole = gumbel(SEEDS, POSITIONS, 103, torch.float32)
    order = torch.tensor([4, 0, 6, 2, 5, 1, 3])
    assert torch.equal(gumbel(SEEDS[order], POSITIONS[order], 103, torch.float32), whole[order])
    for row in range(len(SEEDS)):
        alone = gumbel(SEEDS[row : row + 1], POSITIONS[row : row + 1], 103, torch.float32)
        assert torch.equal(alone[0], whole[row])
    for vocab_size in (1, 3, 4, 50, 102):
        assert torch.equal(gumbel(SEEDS, POSITIONS, vocab_size, torch.float32), whole[:, :vocab_size])


def test_noise_follows_from_the_words_of_its_counter():
    """Token 4 c + w has word w of counter (c, position, 0, 0) under key (low half of the seed, high half)."""
    seed, position, token = -(2**40) + 12345, 321, 42
    key = tuple(torch.tensor(x) for x in (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))
    counter = tuple(torch.tensor(x) for x in (token // 4, position, 0, 0))
    u = (int(philox(key, counter)[token % 4]) + 0.5) * 2.0**-32
    noise = gumbel(torch.tensor([seed]), torch.tensor([position]), 64, torch.float64)[0, token]
    assert float(noise) == pytest.approx(-math.log(-math.log1p(-u)), rel=1e-12)


def test_different_seeds_positions_and_tokens_give_different_noise():
    whole = gumbel(SEEDS, POSITIONS, 1000, torch.float64)
    assert len(whole.unique()) == whole.numel()
    correlation = torch.corrcoef(whole) - torch.eye(len(whole))
    assert correlation.abs().max() < 5 / math.sqrt(1000)


def test_precision_changes_only_last_bits():
    """Save in the lower tail, which no argmax takes: there ``u`` is near 1, where float32 is coarse."""
    fine, coarse = (gumbel(SEEDS, POSITIONS, 4096, dtype) for dtype in (torch.float64, torch.float32))
    upper = fine > -2
    torch.testing.assert_close(coarse.double()[upper], fine[upper], atol=2e-5, rtol=1e-5)
    assert coarse[~upper].max() < -1.99


def test_distribution():
    """Kolmogorov's statistic and the moments; fixed seeds, so the bounds (about 1 in 10,000) are met always or never."""
    rows, vocab_size = 50, 4000
    noise = gumbel(torch.full((rows,), 1234), torch.arange(rows), vocab_size, torch.float32).double().flatten()
    n = noise.numel()
    cdf = torch.exp(-torch.exp(-noise.sort().values))
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    distance = torch.maximum((cdf - steps[:-1]).max(), (steps[1:] - cdf).max())
    assert float(distance) * math.sqrt(n) < 2.23
    euler, variance = 0.5772156649015329, math.pi**2 / 6
    assert abs(float(noise.mean()) - euler) < 4 * math.sqrt(variance / n)
    # The fourth central moment of a Gumbel variable is 5.4 variances squared.
    assert abs(float(noise.var()) - variance) < 4 * variance * math.sqrt(4.4 / n)


def test_argmax_with_noise_samples_the_softmax():
    """Chi-square of the Gumbel-max trick on eight tokens."""
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -0.5, -1.0, -1.5, -3.0])
    n = 20_000
    tokens = (logits + gumbel(torch.full((n,), 99), torch.arange(n), 8, torch.float32)).argmax(-1)
    expected = torch.softmax(logits.double(), 0) * n
    chi_square = ((torch.bincount(tokens, minlength=8) - expected) ** 2 / expected).sum()
    assert float(chi_square) < 29.9, "7 degrees of freedom, 1 in 10,000"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_words_give_finite_noise(dtype, monkeypatch):
    words = torch.tensor([[0], [0xFFFFFFFF], [0xFFFFFF80], [1]])
    monkeypatch.setattr("kernels.philox.reference.philox", lambda key, counter: tuple(w[None] for w in words))
    noise = gumbel(torch.tensor([0]), torch.tensor([0]), 4, dtype)[0]
    assert noise.isfinite().all()
    assert noise[0] > noise[3] > 20
    assert noise[1] < -2.5


def test_many_values_are_finite():
    assert gumbel(torch.arange(16), torch.arange(16), 150_001, torch.float32).isfinite().all()
