"""The bundled checkpoint in engines of any plan, depth, dtype and device, and what makes two of its answers a tie."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

import server
from engine.build import build_engine_core
from engine.config import DecodeConfig, EngineConfig, Quantization, SchedulerConfig
from engine.core import EngineCore
from engine.messages import GenerateRequest
from engine.models.hf_config import read_model_config
from engine.models.loader import load_model
from engine.models.transformer import Transformer
from engine.sampling_params import DecodingMode, SamplingParams
from tests.engine.driver import drive
from tests.engine.oracle import Context, next_token_logits, noisy_scores, processed
from training.tokenizer import ASSISTANT, END, USER

FOLDER = Path(server.__file__).parent / "bundled_model"
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
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    return [(USER, *tokenizer.encode(shape.format(name)).ids, END, ASSISTANT) for name in NAMES for shape in SHAPES]


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


def gap_where_they_part(model: Transformer, request: GenerateRequest, one: tuple[int, ...], other: tuple[int, ...]) -> float:
    """How far apart the two candidates are where the answers part, in float64 and with their noise."""
    common = next(i for i in range(max(len(one), len(other))) if one[i : i + 1] != other[i : i + 1])
    assert common < min(len(one), len(other)), "one answer is cut short where the other goes on"
    tokens = [*request.prompt_token_ids, *one[:common]]
    config = model.config
    mask = config.tidar.mask_token_id if config.tidar else None
    context = Context(list(request.prompt_token_ids), list(one[:common]), frozenset(config.eos_token_ids), mask)
    scores = processed(next_token_logits(model, tokens), request.sampling, context)
    noisy = noisy_scores(scores, request.sampling, position=len(tokens))
    return abs(noisy[one[common]] - noisy[other[common]])


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
            gap = gap_where_they_part(model, request, one, other)
            assert gap < largest_gap, f"{request} gives {one}, not {other} (gap {gap:.2e})"
            num_ties += 1
    return num_ties
