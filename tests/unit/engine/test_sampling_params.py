from __future__ import annotations

import re

import pytest

from engine.sampling_params import SamplingParams, choice_seed


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("max_tokens", 0, "max_tokens must be at least 1, got 0"),
        ("temperature", -0.1, "temperature must be between 0 and 2, got -0.1"),
        ("temperature", 2.1, "temperature must be between 0 and 2, got 2.1"),
        ("temperature", float("nan"), "temperature must be between 0 and 2, got nan"),
        ("top_p", 0.0, "top_p must be above 0 and at most 1, got 0.0"),
        ("top_p", 1.1, "top_p must be above 0 and at most 1, got 1.1"),
        ("top_p", float("nan"), "top_p must be above 0 and at most 1, got nan"),
        ("top_k", -1, "top_k must be positive, or 0 to keep all tokens, got -1"),
        ("min_p", -0.1, "min_p must be between 0 and 1, got -0.1"),
        ("min_p", 1.1, "min_p must be between 0 and 1, got 1.1"),
        ("seed", -1, "seed must be between 0 and 2**64 - 1, got -1"),
        ("seed", 2**64, f"seed must be between 0 and 2**64 - 1, got {2**64}"),
        ("logit_bias", ((1, 0.5),) * 301, "logit_bias must have at most 300 tokens, got 301"),
        ("stop_token_ids", (1,) * 257, "stop_token_ids must have at most 256 tokens, got 257"),
    ],
)
def test_a_value_out_of_range_is_refused_with_a_message_for_the_client(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        SamplingParams(**{"max_tokens": 1, field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0.0},
        {"temperature": 2.0},
        {"top_p": 1.0},
        {"top_p": 1e-9},
        {"top_k": 10**9},
        {"min_p": 0.0},
        {"min_p": 1.0},
        {"seed": 0},
        {"seed": 2**64 - 1},
        {"logit_bias": ((1, 0.5),) * 300},
        {"stop_token_ids": (1,) * 256},
    ],
)
def test_the_ends_of_a_range_belong_to_it(values: dict[str, object]) -> None:
    assert SamplingParams(1, **values).max_tokens == 1  # type: ignore[arg-type]


def test_temperature_0_is_greedy() -> None:
    assert SamplingParams(1, temperature=0.0).greedy
    assert not SamplingParams(1, temperature=0.01).greedy


def test_choices_have_different_seeds_and_the_first_keeps_the_requests_own() -> None:
    assert choice_seed(42, 0) == 42
    seeds = {choice_seed(seed, index) for seed in (0, 1, 42, 2**64 - 1) for index in range(100)}
    assert len(seeds) == 400
    assert all(0 <= seed < 2**64 for seed in seeds)


def test_choice_seeds_are_those_of_splitmix64() -> None:
    # The first outputs of SplitMix64 from state 1234567, published with the reference implementation (Vigna).
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [choice_seed(1234567, index) for index in (1, 2, 3)] == expected


def test_a_temperature_that_would_overflow_is_greedy() -> None:
    assert SamplingParams(1, temperature=1e-38).greedy
    assert SamplingParams(1, temperature=1e-38).temperature == 0.0
    assert not SamplingParams(1, temperature=1e-4).greedy
