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

from engine.core import EngineCore
from engine.decode.auto import GoodputPolicy
from engine.decode.goodput import CostTable
from engine.decode.policy import Drafting
from engine.messages import EngineStats, FinishReason, GenerateRequest, GrammarSpec, Thinking, TokenLogprobs
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
from tests.engine.vocabulary import CLOSERS, GRAMMARS, THINK_BEGIN, THINK_END

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
    "auto, another plan at every step": (DecodingMode.AUTO, 1),
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
    options: Counter[str] = field(default_factory=Counter)

    def add(self, stats: EngineStats) -> None:
        for name in ("num_preemptions", "prefix_cache_hits", "branch_hits", "branch_misses", "num_draft_tokens"):
            self.sums[name] += getattr(stats, name)
        for position, count in enumerate(stats.accepted_per_position):
            self.sums[f"accepted_{position + 1}"] += count

    def count_options(self, workload: Workload) -> None:
        """Requests whose option could change something, and did as far as an answer alone can tell."""
        for request in workload.requests:
            answer, sampling, grammar = workload.answers[request.request_id], request.sampling, request.grammar
            seen = {
                "penalties": sampling.has_penalties and len(answer.token_ids) > 4,
                "logit_bias": bool(sampling.logit_bias) and len(answer.token_ids) > 1,
                "min_tokens": sampling.min_tokens > 4,
                "logprobs": len(answer.logprobs) > 4,
                "prompt_logprobs": len(answer.prompt_logprobs) > 4,
                "complete grammar": grammar is not None and len(answer.token_ids) > 2 and answer.stop_token_id == EOS_TOKEN,
                "grammar after thinking": grammar is not None and THINK_END in answer.token_ids[:-1],
            }
            self.options.update(name for name, is_seen in seen.items() if is_seen)


@pytest.fixture(scope="module")
def tally() -> Tally:
    return Tally()


def random_sampling(rng: random.Random) -> SamplingParams:
    """Greedy one time in four, otherwise any mixture of temperature, top-k, top-p and min-p; then penalties and the rest."""
    max_tokens = rng.choice((1, 2, 3, rng.randint(4, 28)))
    return SamplingParams(
        max_tokens=max_tokens,
        seed=rng.choice((rng.randrange(100), rng.randrange(2**63, 2**64))),
        temperature=rng.choice((0.0, 0.3, 1.0, rng.uniform(0.05, 1.5))),
        top_p=rng.choice((1.0, 1.0, rng.uniform(0.05, 0.99))),
        top_k=rng.choice((0, 0, rng.randint(1, VOCAB_SIZE + 3))),
        min_p=rng.choice((0.0, 0.0, rng.uniform(0.01, 1.0))),
        stop_token_ids=tuple(rng.sample(TEXT_TOKENS, rng.choice((0, 0, 1, 2)))),
        ignore_eos=rng.random() < 0.5,
        min_tokens=rng.choice((0, 0, rng.randint(0, max_tokens))),
        frequency_penalty=rng.choice((0.0, 0.0, rng.uniform(-2, 2))),
        presence_penalty=rng.choice((0.0, 0.0, rng.uniform(-2, 2))),
        repetition_penalty=rng.choice((1.0, 1.0, rng.uniform(0.5, 2.0))),
        logit_bias=tuple((token, rng.uniform(-8, 8)) for token in rng.sample(range(VOCAB_SIZE), rng.choice((0, 0, 1, 5)))),
        logprobs=rng.choice((None, None, 0, 1, 5)),
        prompt_logprobs=rng.choice((None, None, None, 0, 3)),
    )


def random_grammar(rng: random.Random) -> GrammarSpec | None:
    """For one request in three; sometimes behind thinking that the prompt has opened or that the model may open."""
    if rng.random() < 2 / 3:
        return None
    thinking = rng.choice((None, Thinking(THINK_END, is_open=True), Thinking(THINK_END, THINK_BEGIN)))
    return GrammarSpec(rng.choice(list(GRAMMARS.values())), thinking)


def random_request(rng: random.Random, name: str, prefixes: list[list[int]]) -> GenerateRequest:
    """A prompt that may begin like others do."""
    sampling = random_sampling(rng)
    prompt = rng.choice(prefixes)[: rng.randint(0, 24)] + rng.choices(TEXT_TOKENS, k=rng.randint(1, 12))
    mode = rng.choice((DecodingMode.AR, DecodingMode.LINEAR, DecodingMode.TIDAR, DecodingMode.AUTO))
    salt, grammar = rng.choice(("", "", "other")), random_grammar(rng)
    if grammar is not None and rng.random() < 0.7:
        # Random models hardly ever end what they have begun: thinking, or a grammar.
        ends = ((THINK_BEGIN, 4.0), (THINK_END, 6.0), *((token, 2.0) for token in CLOSERS), (EOS_TOKEN, 1.0))
        sampling = replace(sampling, logit_bias=ends, max_tokens=28, stop_token_ids=())
    return GenerateRequest(name, tuple(prompt[: MAX_MODEL_LEN - sampling.max_tokens]), sampling, mode, salt, grammar=grammar)


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


class RandomPlans(GoodputPolicy):
    """``auto`` with a choice by chance instead of goodput."""

    def __init__(self, block_length: int, rng: random.Random) -> None:
        super().__init__(Drafting(block_length, 1), CostTable((1,), ((1,),), ((1.0,),)))
        self.rng = rng

    def begin_step(self, num_requests: int, context: float) -> None:
        self.shape, self._probes = self.rng.choice(self._shapes), self.rng.random() < 0.2


def follow_random_plans(core: EngineCore, rng: random.Random) -> None:
    policy = RandomPlans(core.info.block_length or 1, rng)
    core.scheduler.policies[DecodingMode.AUTO] = core.scheduler._auto = policy


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
    if mode is DecodingMode.AUTO:
        follow_random_plans(core, rng)
    everyone = rng.sample([*workload.requests, *workload.victims], NUM_REQUESTS + NUM_VICTIMS)
    everyone = [r if mode is None else replace(r, decoding=mode) for r in everyone]
    spread = rng.choice((0, 20))
    arrivals = {r.request_id: rng.randint(0, spread) for r in everyone}
    aborts = {r.request_id: arrivals[r.request_id] + rng.randint(0, 12) for r in workload.victims}
    return drive(core, everyone, arrivals, aborts), core.scheduler.stats()


def same(given: Answer, expected: Answer) -> bool:
    """Equal, but for the last bits of log-probabilities."""
    pairs = zip(given.logprobs + given.prompt_logprobs, expected.logprobs + expected.prompt_logprobs, strict=False)
    return (
        replace(given, logprobs=(), prompt_logprobs=()) == replace(expected, logprobs=(), prompt_logprobs=())
        and (len(given.logprobs), len(given.prompt_logprobs)) == (len(expected.logprobs), len(expected.prompt_logprobs))
        and all(same_logprobs(one, other) for one, other in pairs)
    )


def same_logprobs(one: TokenLogprobs, other: TokenLogprobs) -> bool:
    values = [(one.logprob, other.logprob), *((p[1], q[1]) for p, q in zip(one.top, other.top, strict=True))]
    ids = [t for t, _ in one.top] == [t for t, _ in other.top]
    return ids and (one.token_id, one.rank) == (other.token_id, other.rank) and all(abs(p - q) < 1e-9 for p, q in values)


@pytest.mark.parametrize("number", range(NUM_WORKLOADS), ids=lambda n: f"w{n:02}")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_exact_mode_gives_the_tokens_of_plain_decoding(architecture: str, number: int, tally: Tally) -> None:
    workload = make_workload(random.Random(f"{BASE_SEED} {architecture} {number}"), architecture, number)
    for plan in PLANS:
        rng = random.Random(f"{BASE_SEED} {architecture} {number} {plan}")
        transcript, stats = run_plan(rng, workload, architecture, number, plan)
        for request in workload.requests:
            given, expected = transcript.answer(request.request_id), workload.answers[request.request_id]
            assert same(given, expected), (
                f"{plan}: {request} gives\n{given}, and plain decoding\n{expected}\nRepeat it with\n"
                f"TIDAR_TEST_SEED={BASE_SEED} pytest tests/engine/test_losslessness.py -k '{architecture} and w{number:02}'"
            )
        tally.add(stats)
    tally.workloads.add(f"{architecture} {number}")
    tally.num_requests[architecture] += len(workload.requests)
    tally.finish_reasons.update(answer.finish_reason for answer in workload.answers.values())
    tally.count_options(workload)


def test_the_workloads_met_everything_that_can_happen(tally: Tally) -> None:
    if len(tally.workloads) < len(ARCHITECTURES) * NUM_WORKLOADS:
        pytest.skip("only some of the workloads were run")
    assert min(tally.num_requests[name] for name in ARCHITECTURES) >= 200
    assert min(tally.finish_reasons[reason] for reason in (FinishReason.STOP, FinishReason.LENGTH)) > 50
    seen = tally.sums
    rare = {name: count for name, count in seen.items() if count < 100}
    assert not rare, f"too seldom for the suite to mean much: {rare} of {seen}"
    assert f"accepted_{BLOCK_LENGTH - 1}" in seen, "no step accepted all of its drafts"
    assert len(tally.options) == 7
    assert min(tally.options.values()) >= 20, f"too seldom for the suite to mean much: {tally.options}"
    rejected = seen["num_draft_tokens"] - sum(seen[f"accepted_{i}"] for i in range(1, BLOCK_LENGTH))
    assert rejected > 1000
