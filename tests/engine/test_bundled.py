"""The promise on the bundled checkpoint in float32, where two tokens may tie: every mismatch has to be shown to be a tie."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from engine.models.transformer import Transformer
from engine.sampling_params import DecodingMode
from tests.engine.bundled import NAMES, PLANS, answers, count_ties, double_model, question_prompts, requests_for

TIE = 1e-4


@pytest.fixture(scope="module")
def prompts() -> list[tuple[int, ...]]:
    return question_prompts()


@pytest.fixture(scope="module")
def exact_model() -> Transformer:
    return double_model()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_exact_mode_equals_ar_or_the_mismatch_is_a_tie(
    temperature: float,
    prompts: list[tuple[int, ...]],
    exact_model: Transformer,
    record_property: Callable[[str, object], None],
) -> None:
    expected = answers(requests_for(prompts, temperature, DecodingMode.AR), 1, depth=0, seqs=1)
    num_ties = 0
    for place, (mode, num_branches) in enumerate(PLANS.values()):
        requests = requests_for(prompts, temperature, mode)
        given = answers(requests, num_branches, depth=place % 2, seqs=16)
        num_ties += count_ties(exact_model, requests, given, expected, TIE)
    record_property("ties", num_ties)
    print(f"temperature {temperature}: {num_ties} ties in {len(prompts) * len(PLANS)} answers")
    assert len(set(expected)) >= len(NAMES) - 2, "the answers hardly differ"
