"""The bundled checkpoint in engines of any plan, depth, dtype and device, and what makes two of its answers a tie."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from engine.build import build_engine_core
from engine.config import DecodeConfig, EngineConfig, Quantization, SchedulerConfig
from engine.core import EngineCore
from engine.messages import GenerateRequest
from engine.models.hf_config import read_model_config
from engine.models.loader import load_model
from engine.models.transformer import Transformer
from engine.sampling_params import DecodingMode, SamplingParams
from tests.engine.driver import drive
from tests.engine.oracle import context_of, next_token_logits, noisy_scores, processed
from tests.engine.real_text import FOLDER, llg_real_tokenizer, real_tokenizer
from training.tokenizer import ASSISTANT, END, USER

TOP_P_ROUNDING = 1e-5
MAX_TOKENS = 32
NAMES = ("os.path.join", "len", "json.dumps", "re.sub", "math.sqrt", "itertools.chain", "pathlib.Path", "sorted", "zip", "max")
SHAPES = ("What does {} do?", "How do I use {}?", "What is the signature of {}?", "Tell me about {}")
PLANS = {
    "linear": (DecodingMode.LINEAR, 1),
    "tidar, 1 branch": (DecodingMode.TIDAR, 1),
    "tidar, 2 branches": (DecodingMode.TIDAR, 2),
    "tidar, all branches": (DecodingMode.TIDAR, None),
}


def question_prompts() -> list[tuple[int, ...]]:
    """Token ids of the questions as the chat template writes them."""
    return [(USER, *real_tokenizer().encode(shape.format(name)).ids, END, ASSISTANT) for name in NAMES for shape in SHAPES]


def double_model(quantization: Quantization = Quantization.NONE) -> Transformer:
    """The same weights in float64 on the CPU, to judge ties."""
    config = replace(read_model_config(FOLDER), quantization=quantization)
    model = load_model(FOLDER, config, torch.float64, torch.device("cpu"))
    model.build_rope(256)
    return model


def requests_for(prompts: list[tuple[int, ...]], temperature: float, mode: DecodingMode) -> list[GenerateRequest]:
    """One request a prompt, each with a seed of its own."""
    return [
        GenerateRequest(str(i), prompt, SamplingParams(MAX_TOKENS, seed=i, temperature=temperature), mode)
        for i, prompt in enumerate(prompts)
    ]


def answers(
    requests: list[GenerateRequest], num_branches: int | None, depth: int, seqs: int, **options: Any
) -> list[tuple[int, ...]]:
    """The tokens of every request from one engine."""
    transcript = drive(bundled_engine(num_branches, depth, seqs, **options), requests)
    return [transcript.tokens(request.request_id) for request in requests]


def bundled_engine(
    num_branches: int | None, depth: int, seqs: int, dtype: str = "float32", device: str = "cpu", **options: Any
) -> EngineCore:
    """An engine that serves the bundled checkpoint; ``options`` are those of ``EngineConfig``."""
    config = EngineConfig(
        str(FOLDER),
        dtype=dtype,
        device=device,
        scheduler=SchedulerConfig(max_num_seqs=seqs, async_depth=depth),
        decode=DecodeConfig(DecodingMode.TIDAR, None, num_branches),
        **options,
    )
    return build_engine_core(config)


def is_tie(
    model: Transformer, request: GenerateRequest, one: tuple[int, ...], other: tuple[int, ...], largest_gap: float
) -> bool:
    """Whether two raw logits that differ by ``largest_gap`` less or more decide where the answers part.

    The model is in float64. Either candidate has to win when its logit is raised and the other's lowered, each by half of it;
    the edge of top-p may move as sums in float32 do.
    """
    common = next(i for i in range(max(len(one), len(other))) if one[i : i + 1] != other[i : i + 1])
    if common >= min(len(one), len(other)):
        return False  # one answer is cut short where the other goes on
    output = list(one[:common])
    context = context_of(model, request, output, llg_real_tokenizer)
    logits, position = next_token_logits(model, [*request.prompt_token_ids, *output]), len(request.prompt_token_ids) + common

    def can_win(token: int, rival: int) -> bool:
        nudge = {token: largest_gap / 2, rival: -largest_gap / 2}
        nudged = [logit + nudge.get(i, 0.0) for i, logit in enumerate(logits)]
        for shift in (0.0, TOP_P_ROUNDING, -TOP_P_ROUNDING):
            sampling = replace(request.sampling, top_p=min(1.0, max(TOP_P_ROUNDING, request.sampling.top_p + shift)))
            noisy = noisy_scores(processed(nudged, sampling, context), sampling, position)
            if max(range(len(noisy)), key=noisy.__getitem__) == token:
                return True
        return False

    return can_win(one[common], other[common]) and can_win(other[common], one[common])


def count_ties(
    model: Transformer,
    requests: list[GenerateRequest],
    given: list[tuple[int, ...]],
    wanted: list[tuple[int, ...]],
    largest_gap: float,
) -> int:
    """How many answers differ; AssertionError where the candidates are not as close as ``largest_gap``."""
    num_ties = 0
    for request, one, other in zip(requests, given, wanted, strict=True):
        if one != other:
            assert is_tie(model, request, one, other, largest_gap), f"{request} gives {one}, not {other}"
            num_ties += 1
    return num_ties
