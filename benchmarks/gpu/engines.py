"""Engines around random models: the server's own parts, put together as ``engine.build`` does."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from benchmarks.bundled import MODEL
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.record import Cell
from engine.build import assemble
from engine.config import CacheConfig, DecodeConfig, EngineConfig, ModelConfig, SchedulerConfig
from engine.core import EngineCore, launch
from engine.cuda_graphs import GREEDY, SAMPLED, Capture, StepGraphs
from engine.decode.pending import PendingResult
from engine.grammar import GrammarCompiler, tokenizer_loader
from engine.kv_cache import page_bytes
from engine.memory import DeviceMemory
from engine.messages import SamplingDefaults
from engine.models.transformer import Transformer
from engine.sampling_params import DecodingMode, SamplingParams
from engine.step import Admission, DraftPlan, ScheduledRequest, StepPlan

PAGE = 64
ROOM = 320
"""Positions behind the context for which a request has pages: more than the rows of any plan."""

RESERVED_BYTES = 10 << 30
"""Left free beside weights and KV pages, for activations and captured steps."""

AR = DraftPlan(1, 0, 1)
FOREVER = 1 << 20


def linear(length: int) -> DraftPlan:
    """The step of ``linear`` that verifies a block."""
    return DraftPlan(length, 0, length)


def redraft(length: int) -> DraftPlan:
    """The step after a miss: the certain draft, and one branch."""
    return DraftPlan(1, 1, length)


def tidar(length: int, num_branches: int) -> DraftPlan:
    """The step of ``tidar`` that verifies a block beside branches."""
    return DraftPlan(length, num_branches, length)


def plan_name(plan: DraftPlan) -> str:
    """How tables call a plan."""
    if plan == AR:
        return "ar"
    if plan.num_branches == 0:
        return f"linear {plan.block_length}"
    if plan.num_drafts == 1:
        return f"redraft {plan.block_length}"
    return f"tidar {plan.block_length}x{plan.num_branches}"


@dataclass(frozen=True, slots=True)
class Limits:
    """How large an engine is. ``num_pages`` is what is wanted; memory may give fewer."""

    max_num_seqs: int
    max_model_len: int
    num_pages: int
    max_rows: int = 2048


def engine_config(
    bench: Bench, model: ModelConfig, limits: Limits, decode: DecodeConfig, *, share_prefixes: bool = False, depth: int = 1
) -> EngineConfig:
    """The configuration of an engine that fits the memory that is free now. What plans cost is measured anew."""
    pages = min(limits.num_pages, affordable_pages(bench, model))
    return EngineConfig(
        "random",
        device=str(bench.device),
        cost_cache=tempfile.mkdtemp(dir=_scratch()),
        cache=CacheConfig(PAGE, pages, share_prefixes),
        scheduler=SchedulerConfig(limits.max_num_seqs, limits.max_rows, async_depth=depth),
        decode=decode,
    )


@functools.cache
def _scratch() -> str:
    """A folder that goes away with the process: each engine keeps its measurements in one of its own, and measures anew."""
    folder = tempfile.mkdtemp(prefix="costs-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def affordable_pages(bench: Bench, model: ModelConfig) -> int:
    """KV pages that the free memory has room for."""
    if bench.device.type != "cuda":
        return FOREVER
    bench.release()
    free = torch.cuda.mem_get_info(bench.device)[0] - RESERVED_BYTES
    return int(free // page_bytes(model, PAGE, bench.dtype))


def build_core(
    config: EngineConfig,
    model: Transformer,
    max_model_len: int,
    capture: Capture | None = None,
    progress: Callable[[str], None] = lambda message: None,
    memory: DeviceMemory | None = None,
) -> EngineCore:
    """An engine whose cache holds random numbers, as a used one does."""
    eos = model.config.eos_token_ids
    grammars = GrammarCompiler(tokenizer_loader(MODEL, eos, model.config.vocab_size), eos)
    defaults = SamplingDefaults(temperature=0.0)
    core = assemble(config, model, max_model_len, defaults, grammars, progress, capture, memory)
    for tensor in (tensor for layer in core.runner.cache.layers for tensor in layer):
        tensor.normal_()
    return core


def facts(core: EngineCore) -> Cell:
    """What an engine is made of: the implementation of every operation, and what it says of itself."""
    kernels = core.runner.model.kernels
    operations = {}
    for field in fields(kernels):
        value = getattr(kernels, field.name)
        function = value.func if isinstance(value, functools.partial) else value
        if callable(function):
            kind = function if hasattr(function, "__qualname__") else type(function)
            operations[field.name] = f"{kind.__module__}.{kind.__qualname__}"
    return {"engine": {"kernels": kernels.name, "operations": operations, "settings": dict(core.info.settings)}}


class StepRig:
    """Steps of requests that do not exist, each with pages of its own, as in ``engine.decode.measure``.

    Where there are fewer pages than the requests would hold, pages are used by several of them, which lie so far apart in the
    step that the L2 cache does not notice.
    """

    def __init__(self, bench: Bench, model: Transformer, limits: Limits, options: dict[str, Any] | None = None) -> None:
        """``options`` are further fields of the engine's configuration."""
        self.bench, self.max_model_len = bench, limits.max_model_len
        config = replace(engine_config(bench, model.config, limits, DecodeConfig(DecodingMode.TIDAR)), **(options or {}))
        self.core, self.capture = build_core(config, model, limits.max_model_len), bench.capture
        self.graphs = StepGraphs(self.core.decoder, self.core.runner, self.capture, limits.max_model_len)

    def has_own_pages(self, num_requests: int, context: int) -> bool:
        """Whether no page is used twice."""
        return num_requests * self._pages_each(context) < self.core.info.num_pages

    def _pages_each(self, context: int) -> int:
        return min(-(-(context + ROOM) // PAGE), -(-self.max_model_len // PAGE))

    def admit(self, num_requests: int, context: int, temperature: float = 0.0) -> None:
        """Fill the first slots with requests that have so many tokens in the cache."""
        sampling = SamplingParams(FOREVER, temperature=temperature)
        each, usable = self._pages_each(context), self.core.info.num_pages - 1
        admissions = [
            Admission(i, context, (1,), (), DecodingMode.TIDAR, replace(sampling, seed=i)) for i in range(num_requests)
        ]
        pages = ((i, j, 1 + (i * each + j) % usable) for i in range(num_requests) for j in range(each))
        self.core.decoder.admit(StepPlan.of(0, (), admissions, pages))

    def hold(self, num_requests: int, plan: DraftPlan, context: int) -> None:
        """Undo what a step has done to the requests: they hold a block again."""
        batch = self.core.decoder.batch
        batch.num_computed_S[:num_requests] = context
        batch.num_held_S[:num_requests] = plan.num_drafts
        batch.wanted_S[:num_requests] = FOREVER

    def step(self, num_requests: int, plan: DraftPlan, context: int) -> StepPlan:
        """The step of requests that were admitted."""
        return StepPlan.of(0, [ScheduledRequest(i, (), plan, context) for i in range(num_requests)])

    def launch(self, step: StepPlan) -> PendingResult:
        """Put the step on the device on the path that requests take."""
        return launch(step, self.core.decoder, self.core.runner, self.graphs)

    def ms(self, num_requests: int, plan: DraftPlan, context: int, temperature: float = 0.0) -> tuple[float, bool]:
        """Milliseconds of a step, and whether it was replayed. Raises torch.OutOfMemoryError."""
        self.admit(num_requests, context, temperature)
        self.graphs.prepare(num_requests, [plan], SAMPLED if temperature else GREEDY)
        step, before = self.step(num_requests, plan, context), self.graphs.num_replays
        ms = self.bench.timer(lambda: self.launch(step), lambda: self.hold(num_requests, plan, context))
        return ms, self.graphs.num_replays > before
