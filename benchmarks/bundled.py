"""The bundled model in engines of any draft plan: what the benchmarks and the model's own tests run."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.build import assemble
from engine.config import CacheConfig, DecodeConfig, EngineConfig, SchedulerConfig
from engine.core import EngineCore
from engine.grammar import GrammarCompiler, tokenizer_loader
from engine.messages import GenerateRequest, SamplingDefaults
from engine.models.hf_config import read_model_config
from engine.models.loader import load_model
from engine.models.transformer import Transformer
from engine.sampling_params import DecodingMode, SamplingParams
from kernels.backend import select_kernels

MODEL = Path(__file__).parents[1] / "server" / "bundled_model"
MAX_TOKENS = 96
MAX_MODEL_LEN = 512


@dataclass(frozen=True, slots=True)
class Sample:
    """One timed pass over a prompt set."""

    seconds: float
    tokens: int
    forwards: int
    steps: int
    rows: int


def load_bundled(folder: Path = MODEL, batch_invariant: bool = False) -> Transformer:
    """The model on the CPU in float32, with the kernels that the server picks there."""
    config, device = read_model_config(folder), torch.device("cpu")
    kernels = select_kernels("auto", device, torch.float32, config.num_kv_heads, batch_invariant)
    return load_model(folder, config, torch.float32, device, kernels=kernels)


def build_engine(
    model: Transformer, mode: DecodingMode, block_length: int | None, branches: int | None, batch: int
) -> EngineCore:
    """An engine with ``batch`` slots around a loaded model; ``branches`` None runs all of them."""
    config = EngineConfig(
        str(MODEL),
        cache=CacheConfig(num_pages=1 + batch * MAX_MODEL_LEN // 64, enable_prefix_caching=False),
        scheduler=SchedulerConfig(max_num_seqs=batch),
        decode=DecodeConfig(mode, block_length, branches),
    )
    eos = model.config.eos_token_ids
    grammars = GrammarCompiler(tokenizer_loader(MODEL, eos, model.config.vocab_size), eos)
    return assemble(config, model, MAX_MODEL_LEN, SamplingDefaults(), grammars)


def run_engine(core: EngineCore, prompts: list[list[int]]) -> tuple[Sample, list[tuple[int, ...]]]:
    """All prompts through one engine; as many at a time as it has slots."""
    answers: dict[str, list[int]] = {str(i): [] for i in range(len(prompts))}
    before, begun = core.scheduler.stats(), time.perf_counter()
    for i, prompt in enumerate(prompts):
        core.add(GenerateRequest(str(i), tuple(prompt), SamplingParams(MAX_TOKENS, temperature=0.0)))
    while core.has_work:
        for output in core.step().outputs:
            answers[output.request_id] += output.token_ids
    seconds, after = time.perf_counter() - begun, core.scheduler.stats()
    rows = sum(getattr(after, f) - getattr(before, f) for f in ("prefill_rows", "draft_rows", "mask_rows"))
    tokens = after.generation_tokens - before.generation_tokens
    sample = Sample(seconds, tokens, after.forwards - before.forwards, after.num_steps - before.num_steps, rows)
    return sample, [tuple(a) for a in answers.values()]
