"""The options of ``tidar serve``: the table of flags, and the frozen configuration that they resolve to."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine import CacheConfig, DecodeConfig, DecodingMode, EngineConfig, EngineInfo, SchedulerConfig
from server.config import ServerConfig
from server.flags import ENV_PREFIX, Flag, branches, integer, number, one_of, resolve, switch, text
from server.parsers import ReasoningFormat, ToolFormat

BUNDLED_MODEL = Path(__file__).parent / "bundled_model"
BUNDLED_MODEL_NAME = "tidar-stdlib"
MODEL_VARIABLE = ENV_PREFIX + "MODEL"

_CACHE, _SCHEDULER, _DECODE, _SERVER = CacheConfig(), SchedulerConfig(), DecodeConfig(), ServerConfig()

SERVE_FLAGS = (
    Flag("host", text, "127.0.0.1", "address to listen on; 0.0.0.0 for all"),
    Flag("port", integer(0, 65535), 8000, "port to listen on; 0 takes a free one"),
    Flag("served-model-name", text, (), "name that clients ask for; several may be given", is_list=True),
    Flag("api-key", text, (), "key that clients must send; several may be given", is_list=True),
    Flag("cors-origins", text, (), "web origin that may call this server; several may be given", is_list=True),
    Flag("tokenizer", text, None, "folder of the tokenizer, where it is not the model's"),
    Flag("revision", text, None, "revision of a model from the Hub"),
    Flag("device", text, "auto", "auto, cpu or cuda"),
    Flag("dtype", one_of("auto", "float32", "bfloat16", "float16", "float64"), "auto", "type of the weights and the KV cache"),
    Flag("quantization", one_of("none", "fp8"), "none", "fp8: weights of the layers in eight bits, computed while loading"),
    Flag("max-model-len", integer(2), None, "longest prompt and answer together, in tokens; the model's limit if not given"),
    Flag("max-num-seqs", integer(1), _SCHEDULER.max_num_seqs, "requests that run at once"),
    Flag("max-num-batched-tokens", integer(1), _SCHEDULER.max_num_batched_tokens, "rows of one step"),
    Flag("num-pages", integer(2), None, "pages of the KV cache; sized from free memory if not given"),
    Flag("page-size", integer(1), _CACHE.page_size, "tokens of a page"),
    Flag("enable-prefix-caching", switch, True, "share pages between prompts that begin alike", is_switch=True),
    Flag("gpu-memory-utilization", number(0.05, 1), _CACHE.gpu_memory_utilization, "share of the GPU's memory to use"),
    Flag("decoding", one_of(*(mode.value for mode in DecodingMode)), "auto", "what decoding: auto means in a request"),
    Flag("block-length", integer(2), None, "drafts per step; the checkpoint's if not given"),
    Flag("num-branches", branches, _DECODE.num_branches, "branches per step, or all"),
    Flag("draft-temperature", number(0, 2), None, "temperature of drafts, 0 for argmax; the request's if not given"),
    Flag(
        "trust-ar",
        number(0, 1),
        _DECODE.trust_ar,
        "weight of AR logits in tidar mode; below 1 (lossy) with all branches",
    ),
    Flag("diffusion-threshold", number(0, 1), _DECODE.diffusion_threshold, "probability from which diffusion decides a token"),
    Flag("tool-call-parser", one_of("auto", "none", *(f.value for f in ToolFormat)), "auto", "how the model writes tool calls"),
    Flag("reasoning-parser", one_of("auto", "none", *(f.value for f in ReasoningFormat)), "auto", "how the model thinks"),
    Flag(
        "async-depth",
        integer(0, 1),
        None,
        "steps launched before the last one was read; if not given, 1 on a GPU",
    ),
    Flag(
        "cost-cache",
        text,
        None,
        "folder that keeps what a start measures, for the next one; on a GPU, the user's cache if not given",
    ),
    Flag(
        "enforce-eager", switch, None, "run steps without CUDA graphs; if not given, with the reference kernels", is_switch=True
    ),
    Flag(
        "max-waiting-requests", integer(0), _SCHEDULER.max_waiting_requests, "length of the queue; beyond it clients get a 503"
    ),
    Flag("max-waiting-tokens", integer(1), _SCHEDULER.max_waiting_tokens, "prompt tokens in the queue; beyond them the same"),
    Flag("shutdown-timeout", number(0, 86400), _SERVER.shutdown_timeout, "seconds that running requests get after SIGTERM"),
    Flag(
        "heartbeat-deadline",
        number(1, 86400),
        _SERVER.heartbeat_deadline,
        "seconds without a sign of life from the engine until /health/live fails; a first compile may take minutes",
    ),
    Flag("num-threads", integer(1), None, "CPU threads of the engine"),
    Flag("kernels", one_of("auto", "reference", "triton"), "auto", "implementation of the step's operations"),
    Flag(
        "batch-invariant",
        switch,
        False,
        "the same bits for a request alone and in any batch, in every exact mode; slower",
        is_switch=True,
    ),
    Flag("log-level", one_of("debug", "info", "warning", "error"), "info", "least severe log line to write"),
)


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """Everything that ``tidar serve`` was told."""

    host: str
    port: int
    tokenizer: str
    log_level: str
    engine: EngineConfig
    server: ServerConfig

    def lines(self) -> Iterator[str]:
        """The resolved configuration for the terminal; keys are counted, not shown."""
        engine, server = self.engine, self.server
        yield f"model                 {engine.model} as {', '.join(server.served_model_names)}"
        quantized = ", weights of the layers in fp8" if engine.quantize_fp8 else ""
        yield f"device, dtype         {engine.device}, {engine.dtype}{quantized}"
        yield f"max_model_len         {_or_auto(engine.max_model_len)}"
        yield (
            f"scheduler             max_num_seqs {engine.scheduler.max_num_seqs}, max_num_batched_tokens "
            f"{engine.scheduler.max_num_batched_tokens}, max_waiting_requests {engine.scheduler.max_waiting_requests}, "
            f"async_depth {_or_auto(engine.scheduler.async_depth)}"
        )
        yield (
            f"cache                 page_size {engine.cache.page_size}, num_pages {_or_auto(engine.cache.num_pages)}, "
            f"prefix caching {'on' if engine.cache.enable_prefix_caching else 'off'}"
        )
        branches = "all" if engine.decode.num_branches is None else engine.decode.num_branches
        yield (
            f"decoding              {engine.decode.mode.value}, block_length {_or_auto(engine.decode.block_length)}, "
            f"num_branches {branches}"
        )
        yield f"API keys              {len(server.api_keys) or 'none: anybody who reaches the port may use it'}"


def resolved_lines(info: EngineInfo) -> Iterator[str]:
    """What the engine made of the configuration: what ``auto`` has become."""
    yield f"loaded                {info.architecture}, {info.num_parameters:,} parameters"
    yield f"device, dtype         {info.device}, {info.dtype}"
    yield f"max_model_len         {info.max_model_len}"
    yield f"cache                 {info.num_pages} pages of {info.page_size} tokens"
    modes = ", ".join(mode.value for mode in info.supported_modes)
    yield f"decoding              {modes}; block_length {info.block_length or 'none'}"
    if info.settings:
        yield f"engine                {', '.join(f'{name} {value}' for name, value in info.settings.items())}"


class OptionsError(Exception):
    """The options cannot work; the message is one line."""


def serve_options(parser: argparse.ArgumentParser, arguments: argparse.Namespace, environ: Mapping[str, str]) -> ServeOptions:
    """Resolve flags and environment. Bad values end the program with one line and exit status 2."""
    values = resolve(parser, SERVE_FLAGS, arguments, environ)
    try:
        return _build(arguments.model or environ.get(MODEL_VARIABLE) or None, values)
    except OptionsError as error:
        parser.error(str(error))


def _build(model: str | None, values: dict[str, Any]) -> ServeOptions:
    if model is None and not (BUNDLED_MODEL / "config.json").is_file():
        raise OptionsError("the bundled model is not part of this installation; give a checkpoint: tidar serve FOLDER")
    names = values["served_model_name"] or ((BUNDLED_MODEL_NAME,) if model is None else (_name_of(model),))
    folder = str(BUNDLED_MODEL) if model is None else model
    if values["max_num_batched_tokens"] < values["max_num_seqs"]:
        raise OptionsError(
            f"--max-num-batched-tokens {values['max_num_batched_tokens']} must be at least --max-num-seqs "
            f"{values['max_num_seqs']}, so that every running request gets a row"
        )
    engine = _engine_config(folder, values)
    return ServeOptions(
        host=values["host"],
        port=values["port"],
        tokenizer=values["tokenizer"] or folder,
        log_level=values["log_level"],
        engine=engine,
        server=ServerConfig(
            served_model_names=names,
            model_root=folder,
            api_keys=values["api_key"],
            cors_origins=values["cors_origins"],
            shutdown_timeout=values["shutdown_timeout"],
            heartbeat_deadline=values["heartbeat_deadline"],
            tool_call_parser=values["tool_call_parser"],
            reasoning_parser=values["reasoning_parser"],
            limits=engine.scheduler,
        ),
    )


def _engine_config(model: str, values: dict[str, Any]) -> EngineConfig:
    return EngineConfig(
        model=model,
        tokenizer=values["tokenizer"],
        revision=values["revision"],
        dtype=values["dtype"],
        quantize_fp8=values["quantization"] == "fp8",
        batch_invariant=values["batch_invariant"],
        device=values["device"],
        max_model_len=values["max_model_len"],
        num_threads=values["num_threads"],
        kernels=values["kernels"],
        enforce_eager=values["enforce_eager"],
        cost_cache=values["cost_cache"],
        cache=CacheConfig(
            page_size=values["page_size"],
            num_pages=values["num_pages"],
            enable_prefix_caching=values["enable_prefix_caching"],
            gpu_memory_utilization=values["gpu_memory_utilization"],
        ),
        scheduler=SchedulerConfig(
            max_num_seqs=values["max_num_seqs"],
            max_num_batched_tokens=values["max_num_batched_tokens"],
            max_waiting_requests=values["max_waiting_requests"],
            max_waiting_tokens=values["max_waiting_tokens"],
            async_depth=values["async_depth"],
        ),
        decode=DecodeConfig(
            mode=DecodingMode(values["decoding"]),
            block_length=values["block_length"],
            num_branches=values["num_branches"],
            trust_ar=values["trust_ar"],
            draft_temperature=values["draft_temperature"],
            diffusion_threshold=values["diffusion_threshold"],
        ),
    )


def _name_of(model: str) -> str:
    """A Hub id as it is, a folder by its last part."""
    path = Path(model)
    return path.resolve().name if path.is_dir() else model


def _or_auto(value: int | None) -> str:
    return "auto" if value is None else str(value)
