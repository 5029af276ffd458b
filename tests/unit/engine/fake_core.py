"""A core without a model, for tests of the process around it: each request gets its own prompt back, a token a step.

Names steer it. Of the config's ``model``: how the start goes. Of a request's id: ``hold...`` is never finished, ``mute...``
gets no output at all, ``watch...`` is told of the next abort, ``raise...`` and ``exit...`` end the process in a step, and
``unreadable...`` is answered with bytes that the server cannot turn into a message. Of a grammar's source: ``slow`` compiles
only after a request whose id begins with ``release`` has come, ``wrong`` does not compile.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Callable
from dataclasses import astuple

import numpy as np

from engine.config import EngineConfig
from engine.messages import (
    EngineInfo,
    EngineStats,
    FinishReason,
    GenerateRequest,
    GrammarSpec,
    RequestOutput,
    SpeculationStats,
    StepOutputs,
    TokenColumns,
)
from engine.sampling_params import DecodingMode

EXIT_CODE = 7

INFO = EngineInfo(
    architecture="Fake",
    num_parameters=0,
    vocab_size=100,
    max_model_len=1000,
    eos_token_ids=(),
    block_length=None,
    mask_token_id=None,
    supported_modes=(DecodingMode.AR,),
    default_mode=DecodingMode.AR,
    num_pages=1,
    page_size=64,
    dtype="float32",
    device="cpu",
)


class GrammarError(Exception):
    """Stands for the real one, with which every process of these tests would import torch."""


class ConfigError(Exception):
    """Stands for the real one, which is known by its full name."""

    __module__ = "engine.config"


def build(config: EngineConfig, progress: Callable[[str], None]) -> FakeCore:
    progress(f"loading {config.model}")
    match config.model:
        case "foreseen":
            raise ConfigError("no such model;\nname a folder")
        case "unforeseen":
            raise ZeroDivisionError("oops")
        case "stuck":
            threading.Event().wait()
        case "long farewell":
            atexit.register(print, "taken apart", flush=True)
    progress("ready soon")
    return FakeCore()


class Unreadable:
    """Can be pickled, and not unpickled."""

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return _raise_garbage, ()


def _raise_garbage() -> None:
    raise ValueError("garbage")


def columns_of(outputs: list[RequestOutput]) -> TokenColumns:
    return TokenColumns(
        tuple(output.request_id for output in outputs),
        np.array([len(output.token_ids) for output in outputs], dtype=np.int64),
        np.array([token for output in outputs for token in output.token_ids], dtype=np.int64),
        np.array([astuple(output.speculation) for output in outputs], dtype=np.int64).reshape(-1, 4),
    )


class FakeCore:
    info = INFO

    def __init__(self) -> None:
        self._requests: dict[str, GenerateRequest] = {}
        self._num_emitted: dict[str, int] = {}
        self._extra: list[RequestOutput] = []
        self._num_steps = 0
        self._released = threading.Event()

    @property
    def has_work(self) -> bool:
        return bool(self._extra) or any(self._rest(request) for request in self._requests.values())

    def compile(self, spec: GrammarSpec) -> str:
        if spec.source == "wrong":
            raise GrammarError("no such\ngrammar")
        if spec.source == "slow":
            self._released.wait()
        return f"compiled {spec.source}"

    def reject(self, request_id: str, problem: str) -> None:
        self._extra.append(RequestOutput(request_id, (), FinishReason.ERROR, error=problem))

    def add(self, request: GenerateRequest, grammar: str | None = None) -> None:
        assert grammar == (f"compiled {request.grammar.source}" if request.grammar else None)
        if request.request_id.startswith("release"):
            self._released.set()
        self._requests[request.request_id] = request
        self._num_emitted[request.request_id] = 0

    def abort(self, request_id: str) -> None:
        if self._requests.pop(request_id, None):
            watchers = [name for name in self._requests if name.startswith("watch")]
            self._extra += [RequestOutput(name, (), FinishReason.ERROR, error=f"aborted {request_id}") for name in watchers]

    def step(self) -> StepOutputs:
        self._num_steps += 1
        outputs = [self._advance(request) for request in list(self._requests.values()) if self._rest(request)]
        outputs += self._extra
        self._extra = []
        # As the real core does: what is neither a first nor a last output goes into columns.
        plain = [o for o in outputs if o.finish_reason is None and self._num_emitted[o.request_id] > 1]
        others = tuple(o for o in outputs if not any(o is p for p in plain))
        return StepOutputs(EngineStats(num_steps=self._num_steps, num_running=len(self._requests)), others, columns_of(plain))

    def _rest(self, request: GenerateRequest) -> tuple[int, ...]:
        if request.request_id.startswith(("mute", "watch")):
            return ()
        return request.prompt_token_ids[self._num_emitted[request.request_id] :]

    def _advance(self, request: GenerateRequest) -> RequestOutput:
        name = request.request_id
        if name.startswith("raise"):
            raise RuntimeError("device lost")
        if name.startswith("exit"):
            os._exit(EXIT_CODE)
        if name.startswith("unreadable"):
            return RequestOutput(name, (), error=Unreadable())  # type: ignore[arg-type]
        token = self._rest(request)[0]
        self._num_emitted[name] += 1
        if self._rest(request) or name.startswith("hold"):
            forwards = SpeculationStats(num_forwards=self._num_emitted[name])
            return RequestOutput(name, (token,), num_cached_tokens=3, speculation=forwards)
        del self._requests[name]
        return RequestOutput(name, (token,), FinishReason.LENGTH)
