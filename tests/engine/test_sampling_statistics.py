"""Sampling draws from the processed softmax, and drafts that share its noise are accepted as often as theory says.

All seeds are fixed, so nothing here fails by chance; the bounds are those of the statistic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.core import EngineCore
from engine.decode.inputs import StepInputs
from engine.input_batch import SamplingNeeds
from engine.messages import GenerateRequest, GrammarSpec, Thinking
from engine.sampling_params import DecodingMode, SamplingParams
from kernels.process_logits.metadata import RowSampling
from kernels.process_logits.reference import process_logits
from kernels.sampling.reference import sample
from tests.engine.driver import drive
from tests.engine.oracle import Context, next_token_logits, processed
from tests.engine.tiny import BLOCK_LENGTH, MASK_TOKEN, MAX_MODEL_LEN, VOCAB_SIZE, tiny_engine, tiny_model
from tests.engine.vocabulary import GRAMMARS, THINK_BEGIN, THINK_END

CONTEXT = Context([], [], mask_token_id=MASK_TOKEN)
SETTINGS = {
    "plain": SamplingParams(1),
    "cold": SamplingParams(1, temperature=0.5),
    "hot": SamplingParams(1, temperature=1.6),
    "top_k": SamplingParams(1, temperature=1.2, top_k=6),
    "top_p": SamplingParams(1, top_p=0.8),
    "min_p": SamplingParams(1, min_p=0.15),
    "all": SamplingParams(1, temperature=1.3, top_k=12, top_p=0.9, min_p=0.02),
}


def rows_of(params: SamplingParams, seeds: Tensor) -> RowSampling:
    """The same parameters in every row, under different seeds."""
    count = len(seeds)
    return RowSampling(
        SamplingNeeds.of([params]),
        seeds,
        torch.full((count,), params.temperature, dtype=torch.float64),
        torch.full((count,), params.top_k),
        torch.full((count,), params.top_p, dtype=torch.float64),
        torch.full((count,), params.min_p, dtype=torch.float64),
    )


def assert_drawn_from(counts: Tensor, probs: Tensor) -> None:
    """Pearson's chi-square; rare tokens are pooled. The bound is 4 standard deviations (Wilson and Hilferty, 1931)."""
    assert counts[probs == 0].sum() == 0, "a token that processing dropped was drawn"
    expected = probs * counts.sum()
    rare = expected < 10
    observed = torch.cat((counts[~rare].double(), counts[rare].sum()[None].double()))
    expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    observed, expected = observed[expected > 0], expected[expected > 0]
    freedom = len(expected) - 1
    assert freedom > 0, "nothing is random here"
    statistic = ((observed - expected) ** 2 / expected).sum().item()
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    assert z < 4, f"chi-square {statistic:.1f} with {freedom} degrees of freedom"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("params", SETTINGS.values(), ids=SETTINGS)
def test_samples_follow_the_processed_softmax(params: SamplingParams, dtype: torch.dtype) -> None:
    logits = torch.randn(VOCAB_SIZE, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 1.5
    probs = torch.tensor(processed(logits.tolist(), params, CONTEXT)).double().softmax(dim=-1)
    seeds = torch.arange(40_000)
    rows = rows_of(params, seeds)
    scores = process_logits(logits.to(dtype).expand(len(seeds), -1), rows, MASK_TOKEN)
    tokens = sample(scores, rows, torch.full_like(seeds, 17))
    assert_drawn_from(tokens.bincount(minlength=VOCAB_SIZE), probs)


def test_samples_of_one_seed_are_independent_over_positions() -> None:
    logits = torch.randn(VOCAB_SIZE, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    probs = torch.tensor(processed(logits.tolist(), SETTINGS["plain"], CONTEXT)).double().softmax(dim=-1)
    positions = torch.arange(40_000)
    rows = rows_of(SETTINGS["plain"], torch.full_like(positions, 123))
    tokens = sample(process_logits(logits.expand(len(positions), -1), rows, MASK_TOKEN), rows, positions)
    assert_drawn_from(tokens.bincount(minlength=VOCAB_SIZE), probs)
    pairs = (tokens[0::2] * VOCAB_SIZE + tokens[1::2]).bincount(minlength=VOCAB_SIZE**2)
    assert_drawn_from(pairs, torch.outer(probs, probs).flatten())


@pytest.mark.parametrize("name", ["plain", "top_p", "all"])
def test_ar_in_the_engine_follows_the_processed_softmax(name: str) -> None:
    model, params, prompt = tiny_model("qwen3", 0, 0.0), SETTINGS[name], (9, 12, 15, 11)
    core = tiny_engine(model, max_num_seqs=64, budget=1024)
    requests = [GenerateRequest(str(seed), prompt, replace(params, seed=seed), DecodingMode.AR) for seed in range(2000)]
    transcript = drive(core, requests)
    counts = torch.zeros(VOCAB_SIZE, dtype=torch.long)
    for request in requests:
        counts[transcript.tokens(request.request_id)[0]] += 1
    probs = torch.tensor(processed(next_token_logits(model, list(prompt)), params, CONTEXT)).double().softmax(dim=-1)
    assert_drawn_from(counts, probs)


def draft_and_target(p_logits: Tensor, q_logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Tokens drawn from p and from q with the same noise, as verification and drafting draw them."""
    seeds = torch.arange(count)
    rows, positions = rows_of(SETTINGS["plain"], seeds), torch.full_like(seeds, 5)
    target, draft = (
        sample(process_logits(logits.expand(count, -1), rows, MASK_TOKEN), rows, positions) for logits in (p_logits, q_logits)
    )
    return target, draft


@pytest.mark.parametrize("distance", [0.2, 1.0, 3.0])
def test_shared_noise_is_accepted_as_often_as_the_formula_says(distance: float) -> None:
    count, generator = 40_000, torch.Generator().manual_seed(8)
    p_logits = torch.randn(VOCAB_SIZE, generator=generator, dtype=torch.float64)
    q_logits = p_logits + distance * torch.randn(VOCAB_SIZE, generator=generator, dtype=torch.float64)
    target, draft = draft_and_target(p_logits, q_logits, count)
    p_logits[MASK_TOKEN] = q_logits[MASK_TOKEN] = -math.inf
    kept = torch.arange(VOCAB_SIZE) != MASK_TOKEN
    p, q = p_logits.softmax(dim=-1)[kept], q_logits.softmax(dim=-1)[kept]
    # Daliri, Musco and Suresh, arXiv 2408.07978: the chance that both argmaxes are token i, summed over i.
    expected = (1 / torch.maximum(p / p[:, None], q / q[:, None]).sum(dim=1)).sum().item()
    measured = (target == draft).double().mean().item()
    assert abs(measured - expected) < 4 * math.sqrt(expected * (1 - expected) / count)
    independent = (p * q).sum().item()
    assert measured > independent + 0.02, "no better than independent noise"


def test_equal_distributions_are_always_accepted() -> None:
    logits = torch.randn(VOCAB_SIZE, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    target, draft = draft_and_target(logits, logits.clone(), 10_000)
    assert torch.equal(target, draft)
    assert len(target.unique()) > 10


@dataclass
class TableRunner:
    """A model whose two readings agree: the logits of a token depend on its position only, whichever row asks for them."""

    table: Tensor

    def execute(self, inputs: StepInputs) -> Tensor:
        rows = inputs.layout.logit_rows
        position_of_token = inputs.positions_R + inputs.layout.clean_R.long()
        return self.table[position_of_token if rows is None else position_of_token[rows]]


def table_engine(num_branches: int | None, depth: int) -> tuple[EngineCore, Tensor]:
    core = tiny_engine(tiny_model("qwen3"), num_branches=num_branches, depth=depth)
    table = torch.randn(
        (MAX_MODEL_LEN + 2 * BLOCK_LENGTH, VOCAB_SIZE), generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    core.runner = TableRunner(table)  # type: ignore[assignment]
    return core, table


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize(
    ("mode", "num_branches"), [(DecodingMode.TIDAR, None), (DecodingMode.TIDAR, 1), (DecodingMode.LINEAR, 1)]
)
def test_noise_is_keyed_by_position_so_equal_readings_accept_every_draft(
    mode: DecodingMode, num_branches: int | None, depth: int
) -> None:
    core, _ = table_engine(num_branches, depth)
    requests = [
        GenerateRequest(
            str(i),
            (9, 10, 11, 12)[: 1 + i % 4],
            SamplingParams(40 + i % 7, i, (1.0, 0.7, 1.4)[i % 3], (1.0, 0.9)[i % 2], (0, 15)[i % 2], ignore_eos=True),
            mode,
        )
        for i in range(12)
    ]
    transcript = drive(core, requests)
    stats = core.scheduler.stats()
    assert stats.num_draft_tokens > 200
    assert stats.num_accepted_tokens == stats.num_draft_tokens, "a draft with the target's own distribution was rejected"
    outputs = {transcript.tokens(r.request_id) for r in requests}
    assert len(outputs) == len(requests), "the outputs have to be random for this test to mean anything"
    assert min(len(set(output)) for output in outputs) > 8


EVERY_TOKEN = tuple(token for token in range(VOCAB_SIZE) if token != MASK_TOKEN)


@pytest.mark.parametrize(
    "options",
    [
        {"logit_bias": ((4, 3.0), (9, -50.0), (15, 2.0))},
        {"min_p": 0.2},
        {"min_tokens": 25, "stop_token_ids": (12, 13)},
        # What the whole prompt has said is penalised alike, whatever the block says before.
        {"repetition_penalty": 1.8},
    ],
    ids=lambda options: next(iter(options)),
)
def test_drafts_go_through_the_very_processing_of_their_verification(options: dict[str, Any]) -> None:
    core, _ = table_engine(2, 0)
    for i in range(12):
        sampling = SamplingParams(36, i, (1.0, 0.7)[i % 2], ignore_eos=True, **options)
        core.add(GenerateRequest(str(i), EVERY_TOKEN, sampling, DecodingMode.TIDAR))
    while core.has_work:
        core.step()
    stats = core.scheduler.stats()
    assert stats.num_draft_tokens > 200
    assert stats.num_accepted_tokens == stats.num_draft_tokens


@pytest.mark.parametrize("name", GRAMMARS)
@pytest.mark.parametrize("depth", [0, 1])
def test_drafts_follow_the_grammar_of_their_verification(name: str, depth: int) -> None:
    """A draft that the grammar forbids is drawn again under its mask, not cut, so equal readings accept all of them."""
    core, _ = table_engine(2, depth)
    thinking = (None, Thinking(THINK_END, is_open=True), Thinking(THINK_END, THINK_BEGIN))
    for i in range(24):
        sampling = SamplingParams(40, i, logit_bias=((THINK_END, 1.0),))
        core.add(
            GenerateRequest(str(i), (9, 10), sampling, DecodingMode.TIDAR, grammar=GrammarSpec(GRAMMARS[name], thinking[i % 3]))
        )
    while core.has_work:
        core.step()
    stats = core.scheduler.stats()
    assert stats.num_draft_tokens > 100
    assert stats.num_accepted_tokens == stats.num_draft_tokens


def test_drafts_are_penalised_for_what_was_emitted_before_their_block() -> None:
    """The tokens of a block are made at once, so only a repetition inside of it may be rejected."""
    accepted = {}
    for penalty in (0.0, 2.0):
        core, _ = table_engine(2, 0)
        for i in range(12):
            sampling = SamplingParams(40, i, temperature=0.3, ignore_eos=True, presence_penalty=penalty)
            core.add(GenerateRequest(str(i), (9, 10), sampling, DecodingMode.TIDAR))
        while core.has_work:
            core.step()
        stats = core.scheduler.stats()
        accepted[penalty] = stats.num_accepted_tokens / stats.num_draft_tokens
    assert accepted[0.0] == 1.0
    assert 0.75 < accepted[2.0] < 1.0


def test_choices_of_one_prompt_differ_by_seed_only() -> None:
    core, _ = table_engine(None, 0)
    requests = [
        GenerateRequest(f"{name}{seed}", (9, 10), SamplingParams(20, seed, ignore_eos=True), DecodingMode.TIDAR)
        for name in "ab"
        for seed in (0, 1, 2**63, 2**64 - 1)
    ]
    transcript = drive(core, requests)
    assert len({transcript.tokens(r.request_id) for r in requests}) == 4
    for seed in (0, 1, 2**63, 2**64 - 1):
        assert transcript.tokens(f"a{seed}") == transcript.tokens(f"b{seed}")
