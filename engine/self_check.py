"""Whether the GPU's kernels compute what the references do on this very machine, found out before they serve anybody.

A small model of the checkpoint's shape takes the steps of a few requests: prompts, a redraft, drafts beside branches. Each step
is run by the kernels, by the references, and by the references in higher precision; the kernels may be as far from the last as
the references are, and no further. Everything else of a step, its rows and its verdict, has to be equal.

It runs in a process of its own, since a kernel that fails may take the device's context with it.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from engine.config import ConfigError, DraftAnchor, EngineConfig, ModelConfig, Quantization
from engine.decode.penalties import TokenCounts, TokenTable
from engine.decode.tidar import TidarDecoder
from engine.input_batch import HostColumns, InputBatch
from engine.kv_cache import KVCache
from engine.measurement_cache import MeasurementCache
from engine.model_runner import ModelRunner
from engine.models.transformer import Transformer
from engine.sampling_params import DecodingMode, SamplingParams
from engine.step import Admission, DraftPlan, ScheduledRequest, StepPlan
from kernels.backend import REFERENCE, Kernels, select_kernels

MAX_SECONDS = 300.0
"""For the process, compilation of the kernels included."""

NUM_LAYERS, VOCABULARY = 2, 8192
"""Of the small model, at most."""

PROMPT_LENGTHS = (3, 70, 130)
"""Shorter than a page, across a page, across key blocks."""

SLACK = 1.5
"""How many times the references' own error the kernels' may be."""

HIGHER = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.float32: torch.float64}

SAMPLING = (
    SamplingParams(64, temperature=0.0),
    SamplingParams(64, temperature=0.8, seed=1, top_p=0.9, repetition_penalty=1.1),
    SamplingParams(
        64,
        temperature=1.0,
        seed=2,
        top_k=50,
        min_p=0.02,
        frequency_penalty=0.5,
        presence_penalty=0.5,
        min_tokens=8,
        logit_bias=((1, 4.0), (3, -100.0)),
    ),
)


@dataclass(frozen=True, slots=True)
class Question:
    """What to check: Triton's kernels, for checkpoints of this shape."""

    config: ModelConfig
    dtype: torch.dtype
    device: torch.device
    page_size: int
    batch_invariant: bool = False
    kernels: str = "triton"


class KernelError(Exception):
    """Kernels that must not serve. The message says why."""


def choose_kernels(
    config: EngineConfig,
    device: torch.device,
    dtype: torch.dtype,
    model: ModelConfig,
    progress: Callable[[str], None],
    asked: Callable[[Question], str | None] | None = None,
) -> Kernels:
    """The kernels that are asked for. ``auto`` is Triton's on a GPU that can run them, once they have passed the check.

    That they have is kept; a fault is looked for again at the next start. Raises ConfigError.
    """
    choose = functools.partial(
        select_kernels, device=device, dtype=dtype, num_kv_heads=model.num_kv_heads, batch_invariant=config.batch_invariant
    )
    try:
        if config.kernels != "auto" or device.type == "cpu":
            return choose(config.kernels)
        candidate = choose("triton")
    except ValueError as error:
        if config.kernels != "auto" or config.batch_invariant:
            raise ConfigError(str(error)) from error
        progress(f"the reference kernels serve: {error}")
        return REFERENCE
    question = Question(model, dtype, device, config.cache.page_size, config.batch_invariant)

    def check() -> bool:
        progress("checking the Triton kernels on this GPU")
        problem = (asked or ask)(question)
        if problem is not None:
            raise KernelError(problem)
        return True

    cache = MeasurementCache.of_device(config, device, candidate.name, progress)
    try:
        cache.get("kernels", check, bool, bool, question=str(question))
    except KernelError as problem:
        if config.batch_invariant:
            raise ConfigError(f"batch invariance needs the Triton kernels, which cannot serve here: {problem}") from problem
        progress(f"the Triton kernels cannot serve here, and the slower references do: {problem}")
        return replace(REFERENCE, name=f"reference ({problem})")
    return candidate


def ask(question: Question, module: str = __name__, seconds: float = MAX_SECONDS) -> str | None:
    """Check in a process of its own. None where the kernels agree with the references, else what is wrong."""
    # The same source as this process's: not what lies in the working directory.
    command = [sys.executable, "-P", "-m", module]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    asked = pickle.dumps(question)
    try:
        done = subprocess.run(command, input=asked, capture_output=True, timeout=seconds, check=False, env=environment)
    except subprocess.TimeoutExpired:
        return f"their check was not done after {seconds:.0f} s"
    said = done.stdout.decode(errors="replace").strip().splitlines()
    complaints = done.stderr.decode(errors="replace").strip().splitlines()
    try:
        if done.returncode == 0 and said:
            problem: str | None = json.loads(said[-1])
            return problem
    except ValueError:
        complaints = said
    return f"their check ended with status {done.returncode}: {complaints[-1] if complaints else 'it said nothing'}"


@torch.inference_mode()
def disagreement(
    candidate: Kernels, config: ModelConfig, dtype: torch.dtype, device: torch.device, page_size: int
) -> str | None:
    """Where kernels and references part; None if nowhere. The first part of a step that differs is named."""
    small = _small(config)
    models = {
        "kernels": _model(small, candidate, dtype, device),
        "references": _model(small, REFERENCE, dtype, device),
        "truth": _model(small, REFERENCE, HIGHER[dtype], device),
    }
    block_length = small.tidar.block_length if small.tidar else 1
    pages_each = -(-(max(PROMPT_LENGTHS) + 4 * block_length) // page_size)
    batch = InputBatch(len(PROMPT_LENGTHS), block_length, pages_each, small.vocab_size, device)
    decoder = TidarDecoder(batch, page_size, small.tidar.mask_token_id if small.tidar else None)
    num_pages = 1 + len(PROMPT_LENGTHS) * pages_each
    runners = {
        name: ModelRunner(model, KVCache(small, num_pages, page_size, model.embedding.dtype, device))
        for name, model in models.items()
    }
    for name, plan in _steps(small, pages_each):
        decoder.admit(plan)
        other = copy.deepcopy(decoder)
        other.kernels = other.rows.kernels = candidate
        inputs, others = decoder.lay_out(plan), other.lay_out(plan)
        if not _equal(inputs, others):
            return f"the rows of a step differ ({name})"
        logits = {of: runner.execute(inputs) for of, runner in runners.items()}
        problem = _problem_with(logits["kernels"], logits["references"], logits["truth"])
        if problem is not None:
            return f"{problem} ({name})"
        expected = decoder.judge(plan, inputs, logits["references"]).read()
        given = other.judge(plan, others, logits["references"]).read()
        if (expected.counts != given.counts).any() or (expected.token_ids != given.token_ids).any():
            return f"another verdict on the same logits ({name})"
        for after in (decoder.batch, other.batch):
            _forget_what_is_not_held(after)
        if not _equal(decoder.batch, other.batch) or not _equal(decoder.state, other.state):
            return f"another state after the verdict ({name})"
    return None


def _problem_with(given: Tensor | None, expected: Tensor | None, truth: Tensor | None) -> str | None:
    """Compare logits [Q, V]: in all, and row by row, where a single key that should not be seen would show."""
    assert given is not None
    assert expected is not None
    assert truth is not None
    if not given.isfinite().all():
        return "logits are not finite"
    error, own = ((logits.double() - truth.double()).norm(dim=1) for logits in (given, expected))
    limit = SLACK * own.square().mean().sqrt().clamp(min=1e-6 * truth.double().norm(dim=1).mean())
    if error.square().mean().sqrt() > limit or (error > 2 * torch.maximum(limit, SLACK * own)).any():
        return f"logits are {float((error / own.clamp(min=1e-12)).max()):.1f} times as far off as the references'"
    return None


def _forget_what_is_not_held(batch: InputBatch) -> None:
    """Behind the drafts that are held there may be anything."""
    index = torch.arange(batch.drafts_SK.shape[1], device=batch.device)
    is_held_SK = index < batch.num_held_S[:, None]
    batch.drafts_SK.mul_(is_held_SK)
    batch.draft_probs_SK.mul_(is_held_SK)


def _equal(one: Any, other: Any) -> bool:
    """Whether two objects of one class are the same on the device, at any depth; a number's last bits may differ.

    Raises TypeError for what it does not know, so that nothing is left out unseen.
    """
    if isinstance(one, Tensor):
        if one.is_floating_point():
            return torch.allclose(one, other, rtol=1e-4, atol=1e-6, equal_nan=True)
        return torch.equal(one, other)
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, (InputBatch, TokenCounts, TokenTable)):
        return all(_equal(value, vars(other)[name]) for name, value in vars(one).items())
    if is_dataclass(one):
        return all(_equal(getattr(one, field.name), getattr(other, field.name)) for field in fields(one))
    if isinstance(one, HostColumns):  # the host's own, which no kernel sees
        return True
    if one is None or isinstance(one, (int, float, str, torch.device)):
        return bool(one == other)
    raise TypeError(f"the check does not know how to compare {type(one).__name__}")


def _small(config: ModelConfig) -> ModelConfig:
    """The same shape, with few layers and tokens. Weights of 8 bits are the linear layers' concern, which are timed later."""
    vocab_size = min(config.vocab_size, VOCABULARY)
    tidar = None if config.tidar is None else replace(config.tidar, mask_token_id=vocab_size - 1)
    num_layers = min(config.num_layers, NUM_LAYERS)
    return replace(config, num_layers=num_layers, vocab_size=vocab_size, tidar=tidar, quantization=Quantization.NONE)


def _model(config: ModelConfig, kernels: Kernels, dtype: torch.dtype, device: torch.device) -> Transformer:
    """Random weights that keep numbers near one, the same in every data type."""
    torch.manual_seed(0)
    with torch.device(device):
        model = Transformer(config, kernels).requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, 1.0, 0.1)
        else:
            nn.init.normal_(parameter, 0.0, 1.0 / math.sqrt(parameter.shape[-1]))
        parameter.copy_(parameter.to(torch.bfloat16))
    model.to(dtype)
    model.build_rope(4 * max(PROMPT_LENGTHS))
    return model


def _steps(config: ModelConfig, pages_each: int) -> Iterator[tuple[str, StepPlan]]:
    """The prompts, all but their last tokens; then steps of every kind that the checkpoint takes."""
    requests = range(len(PROMPT_LENGTHS))
    prompts = [tuple((7 * i + 3 * j) % (config.vocab_size - 1) for j in range(PROMPT_LENGTHS[i])) for i in requests]
    mode = DecodingMode.TIDAR if config.tidar else DecodingMode.AR
    admissions = [Admission(i, 0, prompts[i], (), mode, SAMPLING[i]) for i in requests]
    pages = [(i, j, 1 + i * pages_each + j) for i in requests for j in range(pages_each)]

    def step(name: str, plan: DraftPlan, most_emitted: int) -> tuple[str, StepPlan]:
        return name, StepPlan.of(1, [ScheduledRequest(i, (), plan, PROMPT_LENGTHS[i] - 1 + most_emitted) for i in requests])

    first = [ScheduledRequest(i, prompts[i][:-1], DraftPlan(1, 0, 1), 0) for i in requests]
    yield "prompts", StepPlan.of(0, first, admissions, pages)
    yield step("one draft each", DraftPlan(1, 0, 1), 1)
    if config.tidar is None:
        return
    length, has_anchor = config.tidar.block_length, config.tidar.anchor is DraftAnchor.COPY
    yield step("a redraft", DraftPlan(1, 1, length, has_anchor), 2)
    yield step("drafts beside two branches", DraftPlan(length, min(2, length), length, has_anchor), 3)
    yield step("drafts alone", DraftPlan(length, 0, length, has_anchor), 3 + length)


def main() -> None:
    """Answer the question on the standard input, with a line of JSON."""
    # The engine leaves its signals to the server. Nobody but this process ends it if the engine is gone.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    signal.alarm(math.ceil(MAX_SECONDS))
    question: Question = pickle.loads(sys.stdin.buffer.read())
    config, device, dtype = question.config, question.device, question.dtype
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    kernels = select_kernels(question.kernels, device, dtype, config.num_kv_heads, question.batch_invariant)
    print(json.dumps(disagreement(kernels, config, dtype, device, question.page_size)))


if __name__ == "__main__":
    main()
