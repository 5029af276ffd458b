"""Random requests with every option, engines with random limits, and what became of the ones in the others.

The exact modes are compared on such workloads. Everything random in a workload comes from its ``random.Random``.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from engine.core import EngineCore
from engine.decode.auto import GoodputPolicy
from engine.decode.costs import CostTable
from engine.decode.policy import Drafting
from engine.decode.probes import Probe
from engine.messages import EngineStats, FinishReason, GenerateRequest, GrammarSpec, Thinking, TokenLogprobs
from engine.models.transformer import Transformer
from engine.sampling_params import DecodingMode, SamplingParams, choice_seed
from engine.step import StepPlan
from tests.engine.driver import Transcript, drive
from tests.engine.oracle import Answer
from tests.engine.tiny import MAX_MODEL_LEN, tiny_engine
from tests.engine.vocabulary import Language

MAX_TOKENS = 28

PLANS: dict[str, tuple[DecodingMode | None, int | None]] = {
    "ar": (DecodingMode.AR, 1),
    "linear": (DecodingMode.LINEAR, 1),
    "tidar, 1 branch": (DecodingMode.TIDAR, 1),
    "tidar, all branches": (DecodingMode.TIDAR, None),
    "every request its own mode": (None, 2),
    "auto, another plan at every step": (DecodingMode.AUTO, 1),
}
"""The mode of all requests (None: each its own) and the branches of the engine."""


@dataclass
class Workload:
    """Random requests, what each must answer, and strangers among them: some are aborted, some decode by diffusion."""

    model: Transformer
    language: Language
    requests: list[GenerateRequest]
    answers: dict[str, Answer]
    strangers: list[GenerateRequest]


@dataclass
class Run:
    """A workload in one engine."""

    transcript: Transcript
    stats: EngineStats
    depth: int
    num_chunks: int
    """Shares of prompts that took more than one step."""


def random_sampling(rng: random.Random, language: Language) -> SamplingParams:
    """Greedy one time in four, otherwise any mixture of temperature, top-k, top-p and min-p; then penalties and the rest."""
    max_tokens, vocab_size = rng.choice((rng.randint(1, 3), *(rng.randint(4, MAX_TOKENS),) * 2)), language.vocab_size
    return SamplingParams(
        max_tokens=max_tokens,
        seed=rng.choice((rng.randrange(100), rng.randrange(2**63, 2**64))),
        temperature=rng.choice((0.0, 0.3, 1.0, rng.uniform(0.05, 1.5))),
        top_p=rng.choice((1.0, 1.0, rng.uniform(0.05, 0.99))),
        top_k=rng.choice((0, 0, rng.randint(1, 26), rng.randint(1, vocab_size + 3))),
        min_p=rng.choice((0.0, 0.0, rng.uniform(0.01, 1.0))),
        stop_token_ids=tuple(rng.sample(language.text, rng.choice((0, 0, 1, 2)))),
        ignore_eos=rng.random() < 0.5,
        min_tokens=rng.choice((0, rng.randint(0, max_tokens))),
        frequency_penalty=rng.choice((0.0, 0.0, rng.uniform(-2, 2))),
        presence_penalty=rng.choice((0.0, 0.0, rng.uniform(-2, 2))),
        repetition_penalty=rng.choice((1.0, 1.0, rng.uniform(0.5, 2.0))),
        logit_bias=tuple((token, rng.uniform(-8, 8)) for token in rng.sample(range(vocab_size), rng.choice((0, 0, 1, 5)))),
        logprobs=rng.choice((None, None, 0, 1, 20)),
        prompt_logprobs=rng.choice((None, None, None, 0, 3)),
    )


def random_grammar(rng: random.Random, language: Language) -> GrammarSpec | None:
    """For one request in three; sometimes behind thinking that the prompt has opened or that the model may open."""
    if rng.random() < 2 / 3:
        return None
    begin, end = language.thinking
    thinking = rng.choice((None, Thinking(end, is_open=True), Thinking(end, begin)))
    return GrammarSpec(rng.choice(language.grammars), thinking)


def random_requests(rng: random.Random, language: Language, name: str, count: int) -> list[GenerateRequest]:
    """Prompts that may begin alike; one request in eight is a further choice of the one before it."""
    prefixes, requests = [language.passage(rng, 24) for _ in range(2)], list[GenerateRequest]()
    for i in range(count):
        if requests and rng.random() < 1 / 8:
            before = requests[-1]
            seed = choice_seed(before.sampling.seed, 1)
            requests.append(replace(before, request_id=f"{name}-{i}", sampling=replace(before.sampling, seed=seed)))
        else:
            requests.append(_random_request(rng, language, f"{name}-{i}", rng.choice(prefixes)))
    return requests


def _random_request(rng: random.Random, language: Language, name: str, prefix: list[int]) -> GenerateRequest:
    sampling = random_sampling(rng, language)
    prompt = prefix[: rng.randint(0, 24)] + language.passage(rng, rng.randint(1, 12))
    mode = rng.choice((DecodingMode.AR, DecodingMode.LINEAR, DecodingMode.TIDAR, DecodingMode.AUTO))
    salt, grammar = rng.choice(("", "", "other")), random_grammar(rng, language)
    if grammar is not None and rng.random() < 0.7:
        # Models hardly ever end here what they have begun: thinking, or a grammar.
        sampling = replace(sampling, logit_bias=language.ends, max_tokens=MAX_TOKENS, stop_token_ids=())
    return GenerateRequest(name, tuple(prompt[: MAX_MODEL_LEN - sampling.max_tokens]), sampling, mode, salt, grammar=grammar)


def by_diffusion(request: GenerateRequest) -> GenerateRequest:
    """The request with nothing left that needs verification."""
    none = {"frequency_penalty": 0.0, "presence_penalty": 0.0, "repetition_penalty": 1.0, "min_tokens": 0}
    sampling = replace(request.sampling, **none, logprobs=None, prompt_logprobs=None)
    return replace(request, decoding=DecodingMode.DIFFUSION, sampling=sampling, grammar=None)


def make_workload(
    rng: random.Random,
    model: Transformer,
    language: Language,
    requests: list[GenerateRequest],
    decode: Callable[[list[GenerateRequest]], Mapping[str, Answer]],
) -> Workload:
    """Requests and what ``decode`` answers to them; two strangers, one of which decodes by diffusion."""
    strangers = random_requests(rng, language, "stranger", 2)
    strangers[1] = by_diffusion(strangers[1])
    return Workload(model, language, requests, dict(decode(requests)), strangers)


def _random_engine(rng: random.Random, num_branches: int | None, most: int, crowd: int) -> dict[str, object]:
    """Limits that are mostly much too small, for a block length of ``most``; ``crowd`` of the longest requests have pages."""
    page_size = rng.choice((1, 2, 3, 5, 8, 16))
    max_num_seqs = crowd - 1 + rng.choice((1, 3, 6, 10, 10))
    fewest_pages = 1 + crowd * -(-MAX_MODEL_LEN // page_size)
    block_length = rng.choice((None, rng.randint(2, most)))
    if num_branches is not None:
        num_branches = min(num_branches, block_length or most)
    return {
        "page_size": page_size,
        "num_pages": rng.choice((None, fewest_pages, fewest_pages + rng.randint(0, 8))),
        "prefix_caching": rng.random() < 0.7,
        "max_num_seqs": max_num_seqs,
        # Two blocks of rows, or there is no diffusion.
        "budget": max(2 * most, rng.choice((max_num_seqs, max_num_seqs + rng.randint(0, 12), 30, 512))),
        "depth": rng.choice((0, 1)),
        "num_branches": num_branches,
        "block_length": block_length,
    }


class _RandomPlans(GoodputPolicy):
    """``auto`` with a choice by chance instead of goodput."""

    def __init__(self, block_length: int, rng: random.Random) -> None:
        super().__init__(Drafting(block_length, 1), CostTable((1,), ((1,),), ((1.0,),)))
        self.rng = rng

    def begin_step(self, num_requests: int, context: float, level: int = 0) -> None:
        self._follow(self.rng.choice(self._shapes))
        self._probes.now = self.rng.choice(list(Probe))
        self._probes._has_drafted = self.rng.random() < 0.5


def follow_random_plans(core: EngineCore, rng: random.Random) -> None:
    """Let the engine's ``auto`` choose another plan at every step."""
    policy = _RandomPlans(core.info.block_length or 1, rng)
    core.scheduler.planner.use(DecodingMode.AUTO, policy)


def run_plan(rng: random.Random, workload: Workload, plan: str, crowd: int = 1) -> Run:
    """All requests of a workload, arriving and leaving at random, in an engine with random limits, for ``crowd`` at least."""
    mode, num_branches = PLANS[plan]
    tidar, language = workload.model.config.tidar, workload.language
    assert tidar is not None
    limits = _random_engine(rng, num_branches, tidar.block_length, crowd)
    core = tiny_engine(workload.model, grammars=language.compiler(), **limits)  # type: ignore[arg-type]
    if mode is DecodingMode.AUTO:
        follow_random_plans(core, rng)
    chunks = _count_chunks(core)
    everyone = [r if mode is None else replace(r, decoding=mode) for r in workload.requests + workload.strangers[:1]]
    everyone = rng.sample([*everyone, *workload.strangers[1:]], len(everyone) + len(workload.strangers) - 1)
    spread = rng.choice((0, 20))
    arrivals = {r.request_id: rng.randint(0, spread) for r in everyone}
    aborts = {r.request_id: arrivals[r.request_id] + rng.randint(0, 12) for r in workload.strangers}
    transcript = drive(core, everyone, arrivals, aborts)
    return Run(transcript, core.scheduler.stats(), core.depth, chunks.total())


def _count_chunks(core: EngineCore) -> Counter[int]:
    schedule, chunks = core.scheduler.schedule, Counter[int]()

    def counted() -> StepPlan | None:
        plan = schedule()
        if plan is not None:
            chunks[plan.step_id] += int(((plan.num_prefill > 0) & (plan.num_drafts == 0)).sum())
        return plan

    core.scheduler.schedule = counted  # type: ignore[method-assign]
    return chunks


def same(given: Answer, expected: Answer, tolerance: float = 1e-9) -> bool:
    """Equal, but for the last bits of log-probabilities."""
    pairs = zip(given.logprobs + given.prompt_logprobs, expected.logprobs + expected.prompt_logprobs, strict=False)
    return (
        replace(given, logprobs=(), prompt_logprobs=()) == replace(expected, logprobs=(), prompt_logprobs=())
        and (len(given.logprobs), len(given.prompt_logprobs)) == (len(expected.logprobs), len(expected.prompt_logprobs))
        and all(same_logprobs(one, other, tolerance) for one, other in pairs)
    )


def same_logprobs(one: TokenLogprobs, other: TokenLogprobs, tolerance: float) -> bool:
    """Equal values; equal tokens and rank, but for neighbours that are closer than the tolerance."""
    if (one.token_id, len(one.top)) != (other.token_id, len(other.top)):
        return False
    values = [(one.logprob, other.logprob), *((p[1], q[1]) for p, q in zip(one.top, other.top, strict=True))]
    if any(abs(p - q) > tolerance for p, q in values):
        return False
    swapped = [i for i, (p, q) in enumerate(zip(one.top, other.top, strict=True)) if p[0] != q[0]]
    return all(_has_close_neighbour(one, i, tolerance) for i in swapped) and abs(one.rank - other.rank) <= (tolerance > 1e-6)


def _has_close_neighbour(entry: TokenLogprobs, place: int, tolerance: float) -> bool:
    """The last one may have been swapped with the first that is not reported."""
    value, ends = entry.top[place][1], (place == len(entry.top) - 1) * (tolerance > 1e-6)
    return bool(ends) or any(abs(v - value) < 2 * tolerance for i, (_, v) in enumerate(entry.top) if i != place)


@dataclass
class Tally:
    """What a suite has met, to show that it was worth running."""

    workloads: int = 0
    num_requests: int = 0
    depths: Counter[tuple[str, int]] = field(default_factory=Counter)
    sums: Counter[str] = field(default_factory=Counter)
    finish_reasons: Counter[FinishReason] = field(default_factory=Counter)
    options: Counter[str] = field(default_factory=Counter)

    def count_run(self, plan: str, run: Run) -> None:
        stats = run.stats
        self.depths[plan, run.depth] += 1
        for name in ("num_preemptions", "prefix_cache_hits", "branch_hits", "branch_misses", "num_draft_tokens"):
            self.sums[name] += getattr(stats, name)
        self.sums["chunks"] += run.num_chunks
        for position, count in enumerate(stats.accepted_per_position):
            self.sums[f"accepted_{position + 1}"] += count

    def count_workload(self, workload: Workload) -> None:
        """Requests whose option could change something, and did as far as an answer alone can tell."""
        self.workloads += 1
        self.num_requests += len(workload.requests)
        self.finish_reasons.update(answer.finish_reason for answer in workload.answers.values())
        eos, end = workload.language.eos, workload.language.thinking[1]
        for request in workload.requests:
            answer, sampling, grammar = workload.answers[request.request_id], request.sampling, request.grammar
            seen = {
                "penalties": sampling.has_penalties and len(answer.token_ids) > 4,
                "logit_bias": bool(sampling.logit_bias) and len(answer.token_ids) > 1,
                "min_tokens": sampling.min_tokens > 4,
                "logprobs": len(answer.logprobs) > 4,
                "prompt_logprobs": len(answer.prompt_logprobs) > 4,
                "complete grammar": grammar is not None and len(answer.token_ids) > 2 and answer.stop_token_id == eos,
                "grammar after thinking": grammar is not None and end in answer.token_ids[:-1],
            }
            self.options.update(name for name, is_seen in seen.items() if is_seen)

    def check(self, fewest: int, block_length: int) -> None:
        """AssertionError unless everything that can happen was met, most of it at least ``fewest`` times."""
        assert all(self.depths[plan, depth] for plan in PLANS for depth in (0, 1)), f"{self.depths}"
        assert min(self.finish_reasons[reason] for reason in (FinishReason.STOP, FinishReason.LENGTH)) >= 2 * fewest
        rare = {name: count for name, count in self.sums.items() if count < 5 * fewest}
        assert not rare, f"too seldom for the suite to mean much: {rare} of {self.sums}"
        assert f"accepted_{block_length - 1}" in self.sums, "no step accepted all of its drafts"
        assert len(self.options) == 7
        assert min(self.options.values()) >= fewest, f"too seldom for the suite to mean much: {self.options}"
        rejected = self.sums["num_draft_tokens"] - sum(self.sums[f"accepted_{i}"] for i in range(1, block_length))
        assert rejected > 50 * fewest
