"""Builds the engine from its configuration: the one place where the parts meet."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch

from engine.config import ConfigError, DraftAnchor, EngineConfig, Quantization, SchedulerConfig
from engine.core import EngineCore, launch
from engine.cuda_graphs import Capture, CudaCapture, StepGraphs
from engine.decode.auto import GoodputPolicy
from engine.decode.costs import CostTable
from engine.decode.measure import step_timer
from engine.decode.policy import Drafting, default_mode, policies
from engine.decode.tidar import DecoderSettings, TidarDecoder
from engine.grammar import GrammarCompiler, tokenizer_loader
from engine.host_memory import available_memory
from engine.input_batch import InputBatch, SamplingNeeds
from engine.kv_cache import KVCache, page_bytes
from engine.kv_cache_manager import KVCacheManager
from engine.measurement_cache import MeasurementCache
from engine.memory import (
    GIB,
    CudaMemory,
    DeviceMemory,
    GpuBudget,
    PageNeeds,
    largest_steps,
    measure_budget,
    pages_on_cpu,
    pages_on_gpu,
    run_steps,
)
from engine.messages import EngineInfo, SamplingDefaults
from engine.model_runner import ModelRunner
from engine.models.hf_config import read_model_config, read_sampling_defaults
from engine.models.loader import load_model, resolve_dtype, resolve_model
from engine.models.transformer import Transformer
from engine.page_pool import PagePool
from engine.sampling_params import DecodingMode, SamplingParams
from engine.scheduler import Scheduler
from engine.self_check import choose_kernels
from engine.step import DraftPlan, StepPlan
from engine.validation import check, resolve_block_length, resolve_device, resolve_max_model_len
from engine.warm_up import capture_steps, follow_goodput, plans_of
from kernels.linear.choice import ChoiceTable


def build_engine_core(config: EngineConfig, progress: Callable[[str], None] = lambda message: None) -> EngineCore:
    """Resolve the configuration, load the model and put the engine together.

    Raises ConfigError or ModelLoadError.
    """
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    device = resolve_device(config.device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    folder = resolve_model(config.model, config.revision)
    model_config = read_model_config(folder)
    if config.quantize_fp8 and model_config.quantization is Quantization.NONE:
        model_config = replace(model_config, quantization=Quantization.AT_LOAD)
    dtype = resolve_dtype(config.dtype, folder, device)
    max_model_len = resolve_max_model_len(config, model_config)
    chosen = choose_kernels(config, device, dtype, model_config, progress)
    progress(f"loading {model_config.architecture} from {folder} as {str(dtype).removeprefix('torch.')} on {device}")
    model = load_model(folder, model_config, dtype, device, progress, chosen)
    eos, tokenizer = model_config.eos_token_ids, Path(config.tokenizer or folder)
    grammars = GrammarCompiler(tokenizer_loader(tokenizer, eos, model_config.vocab_size), eos)
    enforce_eager = not chosen.attends_by_length if config.enforce_eager is None else config.enforce_eager
    capture = CudaCapture(device) if device.type == "cuda" and not enforce_eager else None
    memory = CudaMemory(device) if device.type == "cuda" else None
    return assemble(config, model, max_model_len, read_sampling_defaults(folder), grammars, progress, capture, memory)


def assemble(
    config: EngineConfig,
    model: Transformer,
    max_model_len: int,
    defaults: SamplingDefaults,
    grammars: GrammarCompiler,
    progress: Callable[[str], None] = lambda message: None,
    capture: Capture | None = None,
    memory: DeviceMemory | None = None,
) -> EngineCore:
    """Put an engine around a loaded model; tests start here. With a ``capture`` its decode steps are recorded and replayed.

    ``memory``: what the pages have to fit into; None: what is free of a CPU's.
    """
    block_length, limits = resolve_block_length(config, model.config), config.scheduler
    check(config, block_length)
    # Masks of the last block stand beyond the last position that a token can take.
    num_positions = max_model_len + 2 * (block_length or 1)
    model.build_rope(num_positions)
    device = model.embedding.device
    cache = MeasurementCache.of_device(config, device, model.kernels.name, progress).of_engine(config, model)
    choices = _prepare_linear(model, limits.max_num_batched_tokens, progress, cache)
    decoder = _decoder(config, model, block_length, num_positions)
    tidar = model.config.tidar
    has_anchor = tidar is not None and tidar.anchor is DraftAnchor.COPY
    table = policies(config.decode, block_length, limits.max_num_batched_tokens, has_anchor)
    # Below 1, trust_ar makes the output depend on the plan: then auto stays with one.
    is_auto = config.decode.mode is DecodingMode.AUTO and config.decode.trust_ar == 1.0
    plans = plans_of(table.values(), is_auto)
    largest = functools.partial(largest_steps, plans, limits.max_num_seqs, limits.max_num_batched_tokens, max_model_len)
    budget = None
    if memory is not None:
        progress("running the largest step")
        budget = _budget(config, model, decoder, largest, memory, capture is not None)
    kv, runner = _pages(config, model, max_model_len, budget, progress)
    graphs = None
    if capture is not None:
        graphs = StepGraphs(decoder, runner, capture, max_model_len)
        _capture(graphs, plans, defaults, limits.max_num_batched_tokens, memory, progress)
    depth = int(decoder.batch.device.type == "cuda") if limits.async_depth is None else limits.async_depth
    configured = table[DecodingMode.AUTO]
    if is_auto and isinstance(configured, Drafting):
        keep = functools.partial(_keep_costs, cache, choices, graphs, progress)
        table[DecodingMode.AUTO] = _timed_policy(configured, decoder, runner, graphs, kv, limits, depth, max_model_len, keep)
    if memory is not None:
        # Requests shall find the memory of the largest step with the allocator, which has given it back since.
        _run_largest(decoder, runner, largest, limits.max_num_batched_tokens)
    scheduler = Scheduler(limits, kv, table, model.config.eos_token_ids, max_model_len)
    settings = {
        "kernels": model.kernels.name,
        "auto": str(table[DecodingMode.AUTO]),
        "threads": str(torch.get_num_threads()),
        "loop depth": str(depth),
        "captured steps": str(graphs.num_captured) if graphs is not None else "none",
        **({} if budget is None else {"memory": str(budget)}),
        **({} if model.config.quantization is Quantization.NONE else {"weights": "fp8 (e4m3)"}),
        **({} if choices is None else {"linear layers": str(choices)}),
    }
    info = _info(config, model, max_model_len, block_length, tuple(table), kv.pool.num_pages, defaults, settings)
    return EngineCore(scheduler, decoder, runner, grammars, info, depth, graphs)


def _info(
    config: EngineConfig,
    model: Transformer,
    max_model_len: int,
    block_length: int | None,
    modes: tuple[DecodingMode, ...],
    num_pages: int,
    defaults: SamplingDefaults,
    settings: dict[str, str],
) -> EngineInfo:
    """What the server is told of the engine."""
    tidar = model.config.tidar
    return EngineInfo(
        architecture=model.config.architecture,
        num_parameters=sum(p.numel() for p in model.parameters()),
        vocab_size=model.config.vocab_size,
        max_model_len=max_model_len,
        eos_token_ids=model.config.eos_token_ids,
        block_length=block_length,
        mask_token_id=tidar.mask_token_id if tidar else None,
        supported_modes=modes,
        default_mode=default_mode(config.decode, block_length),
        num_pages=num_pages,
        page_size=config.cache.page_size,
        dtype=str(model.embedding.dtype).removeprefix("torch."),
        device=str(model.embedding.device),
        sampling_defaults=defaults,
        settings=settings,
    )


def _decoder(config: EngineConfig, model: Transformer, block_length: int | None, num_positions: int) -> TidarDecoder:
    """The decoder, and with it the device state of the requests."""
    decode, page_size, tidar = config.decode, config.cache.page_size, model.config.tidar
    pages_per_sequence = -(-num_positions // page_size)
    slots, device = config.scheduler.max_num_seqs, model.embedding.device
    vocab_size, num_eos_tokens = model.config.vocab_size, len(model.config.eos_token_ids)
    batch = InputBatch(slots, block_length or 1, pages_per_sequence, vocab_size, device, num_eos_tokens)
    settings = DecoderSettings(
        decode.trust_ar, decode.draft_temperature, decode.diffusion_threshold, decode.synthetic_acceptance
    )
    return TidarDecoder(batch, page_size, tidar.mask_token_id if tidar else None, settings, model.kernels)


def _pages(
    config: EngineConfig,
    model: Transformer,
    max_model_len: int,
    budget: GpuBudget | None,
    progress: Callable[[str], None],
) -> tuple[KVCacheManager, ModelRunner]:
    """The pages, as many as there is room for, and who owns them."""
    cache, weight = config.cache, model.embedding
    needs = PageNeeds.of(cache, page_bytes(model.config, cache.page_size, weight.dtype), max_model_len)
    num_pages = pages_on_cpu(needs, config.scheduler, available_memory()) if budget is None else pages_on_gpu(needs, budget)
    progress(f"allocating {num_pages} KV pages of {cache.page_size} tokens, {num_pages * needs.page_bytes / GIB:.2f} GiB")
    try:
        tensors = KVCache(model.config, num_pages, cache.page_size, weight.dtype, weight.device)
    except RuntimeError as error:
        # Somebody else has taken memory since, or the system did not say how much there is.
        share = "" if budget is None else " or --gpu-memory-utilization"
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise ConfigError(f"{needs.size_of(num_pages)}, which cannot be had: lower --num-pages{share} ({reason})") from error
    num_sequences = config.scheduler.max_num_seqs
    kv = KVCacheManager(PagePool(num_pages), cache.page_size, num_sequences, cache.enable_prefix_caching)
    return kv, ModelRunner(model, tensors)


def _prepare_linear(
    model: Transformer, max_rows: int, progress: Callable[[str], None], cache: MeasurementCache
) -> ChoiceTable | None:
    def keep(measure: Callable[[], ChoiceTable]) -> ChoiceTable:
        # What the time did not suffice for is measured by the next start, whose kernels are compiled.
        return cache.get("linear", measure, lambda table: table.to_plain() if table.is_complete else None, ChoiceTable.of_plain)

    try:
        return model.kernels.prepare_linear(model.linear_weights(), model.embedding.dtype, max_rows, progress, keep)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _budget(
    config: EngineConfig,
    model: Transformer,
    decoder: TidarDecoder,
    largest: Callable[[], Iterator[StepPlan]],
    memory: DeviceMemory,
    has_graphs: bool,
) -> GpuBudget:
    """What is left for pages. The largest steps run with the null page alone."""
    cache = KVCache(model.config, 1, config.cache.page_size, model.embedding.dtype, model.embedding.device)
    start = functools.partial(launch, decoder=decoder, runner=ModelRunner(model, cache))
    utilization, max_rows = config.cache.gpu_memory_utilization, config.scheduler.max_num_batched_tokens
    return measure_budget(memory, utilization, lambda: run_steps(start, decoder, largest()), max_rows, has_graphs)


def _capture(
    graphs: StepGraphs,
    plans: list[DraftPlan],
    defaults: SamplingDefaults,
    max_rows: int,
    memory: DeviceMemory | None,
    progress: Callable[[str], None],
) -> None:
    needs = SamplingNeeds.of([SamplingParams(1, **asdict(defaults))])
    before = memory.free() if memory is not None else 0
    try:
        capture_steps(graphs, plans, [needs], max_rows, progress)
    except RuntimeError as error:
        raise ConfigError(f"steps cannot be captured in CUDA graphs ({error}): start with --enforce-eager") from error
    if memory is not None:
        progress(f"captured steps hold {(before - memory.free()) / GIB:.2f} GiB")


def _run_largest(decoder: TidarDecoder, runner: ModelRunner, largest: Callable[[], Iterator[StepPlan]], max_rows: int) -> None:
    try:
        run_steps(functools.partial(launch, decoder=decoder, runner=runner), decoder, largest())
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"a step of max_num_batched_tokens {max_rows} rows does not fit beside weights, pages and captured steps: lower "
            "--gpu-memory-utilization or --max-num-batched-tokens, or start with --enforce-eager"
        ) from error


def _timed_policy(
    configured: Drafting,
    decoder: TidarDecoder,
    runner: ModelRunner,
    graphs: StepGraphs | None,
    kv: KVCacheManager,
    limits: SchedulerConfig,
    depth: int,
    max_model_len: int,
    keep: Callable[[Callable[[], CostTable]], CostTable],
) -> GoodputPolicy:
    """The policy of ``auto``, which knows what steps cost on the path that requests take, and uncaptured ones elsewhere."""
    timer, uncaptured_timer = (
        step_timer(
            functools.partial(launch, decoder=decoder, runner=runner, graphs=g),
            decoder,
            configured.block_length,
            kv.pool.num_pages,
        )
        for g in (graphs, None)
    )
    return follow_goodput(
        configured, timer, uncaptured_timer, graphs, limits, depth > 0, max_model_len - 1, kv.num_tokens, keep
    )


def _keep_costs(
    cache: MeasurementCache,
    choices: ChoiceTable | None,
    graphs: StepGraphs | None,
    progress: Callable[[str], None],
    measure: Callable[[], CostTable],
) -> CostTable:
    def measured() -> CostTable:
        progress("timing draft plans")
        return measure()

    more = {"linear layers": str(choices and choices.to_plain()), "captured": str(graphs and graphs.num_captured)}
    return cache.get("costs", measured, asdict, CostTable.of_plain, **more)
