"""The lossy settings against their own oracles: block diffusion, and the paper's mix of both readings."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from engine.messages import FinishReason, GenerateRequest
from engine.models.transformer import Transformer
from engine.sampling_params import DecodingMode, SamplingParams
from tests.engine.driver import drive
from tests.engine.oracle import Answer, Context, decode, noisy_scores, processed
from tests.engine.tiny import BLOCK_LENGTH, EOS_TOKEN, MASK_TOKEN, MAX_MODEL_LEN, VOCAB_SIZE, tiny_engine, tiny_model

TEXT_TOKENS = [token for token in range(VOCAB_SIZE) if token not in (MASK_TOKEN, EOS_TOKEN)]


@dataclass
class DenseAttention:
    """Every row sees the rows that a table says."""

    visible: Tensor

    def __call__(self, layer: int, q_RHD: Tensor, k_RGD: Tensor, v_RGD: Tensor) -> Tensor:
        copies = q_RHD.shape[1] // k_RGD.shape[1]
        k_RHD, v_RHD = k_RGD.repeat_interleave(copies, dim=1), v_RGD.repeat_interleave(copies, dim=1)
        scores = torch.einsum("rhd,shd->hrs", q_RHD, k_RHD) * q_RHD.shape[-1] ** -0.5
        weights = scores.masked_fill(~self.visible, -torch.inf).softmax(dim=-1)
        return torch.einsum("hrs,shd->rhd", weights, v_RHD)


def block_logits(model: Transformer, prefix: list[int], block: list[int]) -> list[list[float]]:
    """Same-position logits of a block behind a causal prefix."""
    size = len(prefix) + len(block)
    visible = torch.ones((size, size), dtype=torch.bool).tril()
    visible[len(prefix) :] = True
    with torch.inference_mode():
        hidden = model(torch.tensor(prefix + block), torch.arange(size), DenseAttention(visible))
        logits: list[list[float]] = model.logits(hidden[len(prefix) :]).tolist()
    return logits


def denoise(model: Transformer, request: GenerateRequest, threshold: float) -> tuple[Answer, int]:
    """Block diffusion, and how many forwards it took."""
    prompt, sampling, output, forwards = list(request.prompt_token_ids), request.sampling, [], 0
    context = Context(prompt, [], frozenset([EOS_TOKEN]), MASK_TOKEN)
    while True:
        block = [MASK_TOKEN] * BLOCK_LENGTH
        while MASK_TOKEN in block:
            forwards += 1
            guesses: list[tuple[float, int, int]] = []
            for i, logits in enumerate(block_logits(model, prompt + output, block)):
                scores = processed(logits, sampling, context)
                noisy = noisy_scores(scores, sampling, len(prompt) + len(output) + i)
                token = max(range(VOCAB_SIZE), key=noisy.__getitem__)
                probability = torch.tensor(scores, dtype=torch.float64).softmax(0)[token].item()
                if block[i] == MASK_TOKEN:
                    guesses.append((probability, -i, token))
            best = max(guesses)
            for guess in guesses:
                if guess == best or guess[0] >= threshold:
                    block[-guess[1]] = guess[2]
        for token in block[: sampling.max_tokens - len(output)]:
            output.append(token)
            if token == EOS_TOKEN:
                return Answer(tuple(output), FinishReason.STOP, token), forwards
        if len(output) == sampling.max_tokens:
            return Answer(tuple(output), FinishReason.LENGTH, None), forwards


def random_requests(rng: random.Random, mode: DecodingMode | None, count: int) -> list[GenerateRequest]:
    requests = []
    for i in range(count):
        sampling = SamplingParams(
            rng.randint(1, 30),
            seed=rng.randrange(100),
            temperature=rng.choice((0.0, 0.7, 1.2)),
            top_k=rng.choice((0, 5)),
            top_p=rng.choice((1.0, 0.8)),
            logit_bias=rng.choice(((), ((4, 2.0), (5, -3.0)))),
        )
        prompt = tuple(rng.choices(TEXT_TOKENS, k=rng.randint(1, MAX_MODEL_LEN - sampling.max_tokens)))
        chosen = mode or rng.choice((DecodingMode.AR, DecodingMode.TIDAR, DecodingMode.LINEAR, DecodingMode.DIFFUSION))
        requests.append(GenerateRequest(f"{mode}-{i}", prompt, sampling, chosen))
    return requests


@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("shared", [0.0, 2.0])
@pytest.mark.parametrize("depth", [0, 1])
def test_diffusion_is_block_diffusion_beside_any_other_mode(threshold: float, shared: float, depth: int) -> None:
    model, rng = tiny_model("qwen3", shared=shared), random.Random(f"{threshold} {shared} {depth}")
    requests = random_requests(rng, None, 12)
    core = tiny_engine(
        model,
        page_size=rng.choice((2, 8)),
        num_pages=rng.choice((None, 40)),
        max_num_seqs=rng.choice((2, 6)),
        budget=rng.choice((12, 64)),
        depth=depth,
        diffusion_threshold=threshold,
    )
    transcript = drive(core, requests, {r.request_id: rng.randint(0, 10) for r in requests})
    for request in requests:
        is_diffusion = request.decoding is DecodingMode.DIFFUSION
        expected = denoise(model, request, threshold)[0] if is_diffusion else decode(model, request)
        assert transcript.answer(request.request_id) == expected, request


def test_forwards_of_diffusion_are_counted_and_its_drafts_are_not_called_verified() -> None:
    model = tiny_model("llama", shared=1.0)
    (request,) = random_requests(random.Random(3), DecodingMode.DIFFUSION, 1)
    core = tiny_engine(model, diffusion_threshold=0.5)
    last = drive(core, [request]).outputs[request.request_id][-1]
    stats = core.scheduler.stats()
    assert last.speculation.num_forwards == stats.forwards == denoise(model, request, 0.5)[1]
    assert (stats.num_drafts, stats.num_draft_tokens, stats.branch_hits, stats.branch_misses) == (0, 0, 0, 0)
    assert stats.generation_tokens == len(denoise(model, request, 0.5)[0].token_ids)


def test_a_last_block_that_reaches_beyond_the_end_touches_nobody_elses_cache() -> None:
    """At depth 1 a step is launched behind the block that ends the request; its pages end where its tokens do."""
    model = tiny_model("mistral", shared=1.0)
    rng = random.Random(8)
    short = [
        replace(r, request_id=f"short-{r.request_id}", sampling=replace(r.sampling, max_tokens=1))
        for r in random_requests(rng, DecodingMode.DIFFUSION, 12)
    ]
    exact = random_requests(rng, DecodingMode.TIDAR, 12)
    core = tiny_engine(model, page_size=2, max_num_seqs=3, depth=1)
    transcript = drive(core, [r for pair in zip(short, exact, strict=True) for r in pair])
    for request in exact:
        assert transcript.answer(request.request_id) == decode(model, request)


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ({"presence_penalty": 1.0}, "penalty"),
        ({"min_tokens": 2}, "min_tokens"),
        ({"logprobs": 0}, "logprobs"),
    ],
)
def test_diffusion_refuses_what_only_verification_can_give(option: dict[str, float], named: str) -> None:
    core = tiny_engine(tiny_model("qwen2"))
    core.add(GenerateRequest("r", (1, 2), SamplingParams(5, **option), DecodingMode.DIFFUSION))  # type: ignore[arg-type]
    (output,) = core.step().outputs
    assert output.finish_reason is FinishReason.ERROR
    assert named in str(output.error)


def trust(model: Transformer, request: GenerateRequest, beta: float) -> tuple[int, ...]:
    """Plain decoding whose logits are the mixture of both readings."""
    prompt, sampling, output = list(request.prompt_token_ids), request.sampling, []
    context = Context(prompt, [], frozenset([EOS_TOKEN]), MASK_TOKEN)
    while len(output) < sampling.max_tokens and EOS_TOKEN not in output:
        size = len(prompt) + len(output)
        with torch.inference_mode():
            visible = torch.ones((size, size), dtype=torch.bool).tril()
            hidden = model(torch.tensor(prompt + output), torch.arange(size), DenseAttention(visible))
            causal = model.logits(hidden[-1])
        # A branch is left out where its hit would leave at most one token: nothing is mixed there.
        is_mixed = sampling.max_tokens - len(output) >= 3
        same = torch.tensor(block_logits(model, prompt + output, [MASK_TOKEN] * BLOCK_LENGTH)[0], dtype=torch.float64)
        logits = beta * causal + (1 - beta) * same if is_mixed else causal
        noisy = noisy_scores(processed(logits.tolist(), sampling, context), sampling, size)
        output.append(max(range(VOCAB_SIZE), key=noisy.__getitem__))
    return tuple(output)


@pytest.mark.parametrize("shared", [0.0, 2.0])
def test_trusting_diffusion_mixes_the_readings_of_each_position(shared: float) -> None:
    model, beta = tiny_model("mistral", shared=shared), 0.4
    requests = random_requests(random.Random(1), DecodingMode.TIDAR, 8)
    exact = random_requests(random.Random(2), DecodingMode.AR, 2)
    transcript = drive(tiny_engine(model, num_branches=None, trust_ar=beta), requests + exact)
    differs = 0
    for request in requests:
        tokens = transcript.tokens(request.request_id)
        # Where the last branches are left out depends on the plan's blocks; before that the mixture does not.
        settled = max(0, request.sampling.max_tokens - BLOCK_LENGTH - 2)
        assert tokens[:settled] == trust(model, request, beta)[:settled]
        differs += tokens != decode(model, request).token_ids
    assert differs, "the mixture changed nothing"
    for request in exact:
        assert transcript.answer(request.request_id) == decode(model, request), "ar stays exact beside it"


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_a_draft_temperature_changes_the_speed_only(temperature: float) -> None:
    model, requests = tiny_model("qwen2", shared=1.0), random_requests(random.Random(5), DecodingMode.TIDAR, 10)
    accepted = {}
    for draft_temperature in (None, temperature):
        core = tiny_engine(model, draft_temperature=draft_temperature)  # type: ignore[arg-type]
        transcript = drive(core, requests)
        for request in requests:
            assert transcript.answer(request.request_id) == decode(model, request)
        accepted[draft_temperature] = core.scheduler.stats().num_accepted_tokens
    assert accepted[None] != accepted[temperature], "the setting reaches the drafts"
