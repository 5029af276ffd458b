"""The promise: a request gives the same tokens in every exact mode, in every plan, at every load, greedy or sampled.

A workload is a handful of random requests. Its answers come from ``oracle.decode``, which knows no engine; then engines with
random limits run it in every mode, and every answer must be equal. Everything random in a workload comes from its number and
``TIDAR_TEST_SEED``, so that a failure can be repeated.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from dataclasses import dataclass, field, replace

import pytest

from engine.messages import EngineStats, FinishReason, GenerateRequest
from engine.sampling_params import DecodingMode, SamplingParams
from tests.engine.driver import Transcript, drive
from tests.engine.oracle import Answer, decode
from tests.engine.tiny import (
    ARCHITECTURES,
    BLOCK_LENGTH,
    EOS_TOKEN,
    MASK_TOKEN,
    MAX_MODEL_LEN,
    SHARED,
    VOCAB_SIZE,
    tiny_engine,
    tiny_model,
)

BASE_SEED = int(os.environ.get("TIDAR_TEST_SEED", "0"))
NUM_WORKLOADS, NUM_REQUESTS, NUM_VICTIMS = 25, 8, 2
TEXT_TOKENS = [token for token in range(VOCAB_SIZE) if token not in (MASK_TOKEN, EOS_TOKEN)]

PLANS: dict[str, tuple[DecodingMode | None, int | None]] = {
    "ar": (DecodingMode.AR, 1),
    "linear": (DecodingMode.LINEAR, 1),
    "tidar, 1 branch": (DecodingMode.TIDAR, 1),
    "tidar, 2 branches": (DecodingMode.TIDAR, 2),
    "tidar, all branches": (DecodingMode.TIDAR, None),
    "every request its own mode": (None, 2),
}
"""The mode of all requests (None: each its own) and the branches of the engine."""


@dataclass
class Workload:
    """Random requests, what each must answer, and others that are aborted on the way."""

    requests: list[GenerateRequest]
    answers: dict[str, Answer]
    victims: list[GenerateRequest]


@dataclass
class Tally:
    """What the suite has met, to show that it was worth running."""

    workloads: set[str] = field(default_factory=set)
    num_requests: Counter[str] = field(default_factory=Counter)
    sums: Counter[str] = field(default_factory=Counter)
    finish_reasons: Counter[FinishReason] = field(default_factory=Counter)

    def add(self, stats: EngineStats) -> None:
        for name in ("num_preemptions", "prefix_cache_hits", "branch_hits", "branch_misses", "num_draft_tokens"):
            self.sums[name] += getattr(stats, name)
        for position, count in enumerate(stats.accepted_per_position):
            self.sums[f"accepted_{position + 1}"] += count


@pytest.fixture(scope="module")
def tally() -> Tally:
    return Tally()


def random_sampling(rng: random.Random) -> SamplingParams:
    """Greedy one time in four, otherwise any mixture of temperature, top-k, top-p and min-p."""
    return SamplingParams(
        max_tokens=rng.choice((1, 2, 3, rng.randint(4, 28))),
        seed=rng.choice((rng.randrange(100), rng.randrange(2**63, 2**64))),
        temperature=rng.choice((0.0, 0.3, 1.0, rng.uniform(0.05, 1.5))),
        top_p=rng.choice((1.0, 1.0, rng.uniform(0.05, 0.99))),
        top_k=rng.choice((0, 0, rng.randint(1, VOCAB_SIZE + 3))),
        min_p=rng.choice((0.0, 0.0, rng.uniform(0.01, 1.0))),
        stop_token_ids=tuple(rng.sample(TEXT_TOKENS, rng.choice((0, 0, 1, 2)))),
        ignore_eos=rng.random() < 0.5,
    )


def random_request(rng: random.Random, name: str, prefixes: list[list[int]]) -> GenerateRequest:
    """A prompt that may begin like others do."""
    sampling = random_sampling(rng)
    longest = MAX_MODEL_LEN - sampling.max_tokens
    prompt = rng.choice(prefixes)[: rng.randint(0, 24)] + rng.choices(TEXT_TOKENS, k=rng.randint(1, 12))
    mode = rng.choice((DecodingMode.AR, DecodingMode.LINEAR, DecodingMode.TIDAR, DecodingMode.AUTO))
    return GenerateRequest(name, tuple(prompt[:longest]), sampling, mode, cache_salt=rng.choice(("", "", "other")))


def random_engine(rng: random.Random, num_branches: int | None) -> dict[str, object]:
    """Limits that are mostly much too small."""
    page_size = rng.choice((1, 2, 3, 5, 8, 16))
    max_num_seqs = rng.choice((1, 2, 4, 10))
    fewest_pages = 1 + -(-MAX_MODEL_LEN // page_size)
    block_length = rng.choice((None, rng.randint(2, BLOCK_LENGTH)))
    if num_branches is not None:
        num_branches = min(num_branches, block_length or BLOCK_LENGTH)
    return {
        "page_size": page_size,
        "num_pages": rng.choice((None, fewest_pages, fewest_pages + rng.randint(0, 8))),
        "prefix_caching": rng.random() < 0.7,
        "max_num_seqs": max_num_seqs,
        "budget": rng.choice((max_num_seqs, max_num_seqs + rng.randint(0, 12), 30, 512)),
        "depth": rng.choice((0, 1)),
        "num_branches": num_branches,
        "block_length": block_length,
    }


def make_workload(rng: random.Random, architecture: str, number: int) -> Workload:
    model = tiny_model(architecture, BASE_SEED, SHARED[number % len(SHARED)])
    prefixes = [rng.choices(TEXT_TOKENS, k=24) for _ in range(2)]
    requests = [random_request(rng, f"request-{i}", prefixes) for i in range(NUM_REQUESTS)]
    victims = [random_request(rng, f"victim-{i}", prefixes) for i in range(NUM_VICTIMS)]
    return Workload(requests, {r.request_id: decode(model, r) for r in requests}, victims)


def run_plan(
    rng: random.Random, workload: Workload, architecture: str, number: int, plan: str
) -> tuple[Transcript, EngineStats]:
    mode, num_branches = PLANS[plan]
    core = tiny_engine(
        tiny_model(architecture, BASE_SEED, SHARED[number % len(SHARED)]),
        **random_engine(rng, num_branches),  # type: ignore[arg-type]
    )
    everyone = rng.sample([*workload.requests, *workload.victims], NUM_REQUESTS + NUM_VICTIMS)
    everyone = [r if mode is None else replace(r, decoding=mode) for r in everyone]
    spread = rng.choice((0, 20))
    arrivals = {r.request_id: rng.randint(0, spread) for r in everyone}
    aborts = {r.request_id: arrivals[r.request_id] + rng.randint(0, 12) for r in workload.victims}
    return drive(core, everyone, arrivals, aborts), core.scheduler.stats()


@pytest.mark.parametrize("number", range(NUM_WORKLOADS), ids=lambda n: f"w{n:02}")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_exact_mode_gives_the_tokens_of_plain_decoding(architecture: str, number: int, tally: Tally) -> None:
    workload = make_workload(random.Random(f"{BASE_SEED} {architecture} {number}"), architecture, number)
    for plan in PLANS:
        rng = random.Random(f"{BASE_SEED} {architecture} {number} {plan}")
        transcript, stats = run_plan(rng, workload, architecture, number, plan)
        for request in workload.requests:
            given, expected = transcript.answer(request.request_id), workload.answers[request.request_id]
            assert given == expected, (
                f"{plan}: {request} gives\n{given}, and plain decoding\n{expected}\nRepeat it with\n"
                f"TIDAR_TEST_SEED={BASE_SEED} pytest tests/engine/test_losslessness.py -k '{architecture} and w{number:02}'"
            )
        tally.add(stats)
    tally.workloads.add(f"{architecture} {number}")
    tally.num_requests[architecture] += len(workload.requests)
    tally.finish_reasons.update(answer.finish_reason for answer in workload.answers.values())


def test_the_workloads_met_everything_that_can_happen(tally: Tally) -> None:
    if len(tally.workloads) < len(ARCHITECTURES) * NUM_WORKLOADS:
        pytest.skip("only some of the workloads were run")
    assert min(tally.num_requests[name] for name in ARCHITECTURES) >= 200
    assert min(tally.finish_reasons[reason] for reason in (FinishReason.STOP, FinishReason.LENGTH)) > 50
    seen = tally.sums
    rare = {name: count for name, count in seen.items() if count < 100}
    assert not rare, f"too seldom for the suite to mean much: {rare} of {seen}"
    assert f"accepted_{BLOCK_LENGTH - 1}" in seen, "no step accepted all of its drafts"
    rejected = seen["num_draft_tokens"] - sum(seen[f"accepted_{i}"] for i in range(1, BLOCK_LENGTH))
    assert rejected > 1000
