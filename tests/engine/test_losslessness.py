"""The promise: a request gives the same tokens and log-probabilities in every exact mode, in every plan, at every load.

A workload is a handful of random requests with all their options mixed. Its answers come from ``oracle.decode``, which knows
no engine; then engines with random limits run it in every mode, and every answer must be equal. All of it is in float64, where
no tie is flipped by rounding; ``test_bundled.py`` holds the same for a trained model in float32. Everything random comes from
a workload's number and ``TIDAR_TEST_SEED``, so that a failure can be repeated.
"""

from __future__ import annotations

import os
import random
from collections import defaultdict

import pytest

from engine.models.transformer import Transformer
from tests.engine.oracle import decode
from tests.engine.real_text import real_text_language
from tests.engine.tiny import ARCHITECTURES, BLOCK_LENGTH, SHARED, tiny_model
from tests.engine.vocabulary import TINY, Language
from tests.engine.workload import PLANS, Tally, make_workload, random_requests, run_plan, same

BASE_SEED = int(os.environ.get("TIDAR_TEST_SEED", "0"))
TINY_WORKLOADS, REAL_WORKLOADS, NUM_REQUESTS = 5, 3, 10
"""Workloads of every architecture: in the tiny language, whose few tokens collide often, and with prompts of real text."""


@pytest.fixture(scope="module")
def tallies() -> defaultdict[str, Tally]:
    return defaultdict(Tally)


def check_workload(name: str, architecture: str, number: int, model: Transformer, language: Language, tally: Tally) -> None:
    """Run one workload in every plan."""
    rng = random.Random(f"{BASE_SEED} {name} {architecture} {number}")
    requests = random_requests(rng, language, "request", NUM_REQUESTS)
    workload = make_workload(
        rng, model, language, requests, lambda rs: {r.request_id: decode(model, r, language.tokenizer) for r in rs}
    )
    for plan in PLANS:
        run = run_plan(random.Random(f"{BASE_SEED} {name} {architecture} {number} {plan}"), workload, plan)
        for request in workload.requests:
            given, expected = run.transcript.answer(request.request_id), workload.answers[request.request_id]
            assert same(given, expected), (
                f"{plan}: {request} gives\n{given}, and plain decoding\n{expected}\nRepeat it with\n"
                f"TIDAR_TEST_SEED={BASE_SEED} pytest tests/engine/test_losslessness.py -k '{name} and {architecture} and "
                f"w{number:02}'"
            )
        tally.count_run(plan, run)
    tally.count_workload(workload)


@pytest.mark.parametrize("number", range(TINY_WORKLOADS), ids=lambda n: f"w{n:02}")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_exact_mode_gives_the_tokens_of_plain_decoding(
    architecture: str, number: int, tallies: defaultdict[str, Tally]
) -> None:
    model = tiny_model(architecture, BASE_SEED, SHARED[number % len(SHARED)])
    check_workload("plain_decoding", architecture, number, model, TINY, tallies["tiny"])


@pytest.mark.parametrize("number", range(REAL_WORKLOADS), ids=lambda n: f"w{n:02}")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_so_it_does_with_prompts_of_real_text(architecture: str, number: int, tallies: defaultdict[str, Tally]) -> None:
    language = real_text_language()
    model = tiny_model(architecture, BASE_SEED, SHARED[number % len(SHARED)], language)
    check_workload("real_text", architecture, number, model, language, tallies["real"])


def test_the_workloads_met_everything_that_can_happen(tallies: defaultdict[str, Tally]) -> None:
    tiny, real = tallies["tiny"], tallies["real"]
    if (tiny.workloads, real.workloads) != (TINY_WORKLOADS * len(ARCHITECTURES), REAL_WORKLOADS * len(ARCHITECTURES)):
        pytest.skip("only some of the workloads were run")
    assert tiny.num_requests + real.num_requests >= 300
    tiny.check(fewest=15, block_length=BLOCK_LENGTH)
    real.check(fewest=5, block_length=BLOCK_LENGTH)
