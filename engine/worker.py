"""The engine process: it builds the core, steps it while there is work, and never outlives the server."""

from __future__ import annotations

import os
import pkgutil
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from ctypes import c_double
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, NoReturn, Protocol, TypeAlias

from engine.config import EngineConfig
from engine.messages import (
    AbortRequest,
    EngineFailed,
    EngineInfo,
    EngineReady,
    EngineStats,
    GenerateRequest,
    GrammarSpec,
    Progress,
    Shutdown,
    StepOutputs,
)

ToEngine: TypeAlias = GenerateRequest | AbortRequest | Shutdown
"""What the server sends. The closed pipe is a message too: the server is gone."""

FromEngine: TypeAlias = Progress | EngineReady | EngineFailed | StepOutputs
"""What the engine sends: progress, then ready, then outputs; failed may come at any time and is the last."""

REAL_CORE = "engine.build:build_engine_core"
"""Where the core comes from, as ``module:function``: imported in the engine process only, since torch comes with it."""

PARENT_SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""Ctrl-C and service managers signal the whole process group; the server drains and then ends the engine itself."""

IDLE_TICK_SECONDS = 1.0
"""How often an idle engine shows that it is alive."""

_ERRORS_FOR_THE_USER = frozenset({"engine.config.ConfigError", "engine.models.loader.ModelLoadError"})
"""Errors whose message says what to do. By name: importing the classes would load torch for a core that needs none."""


class EngineCore(Protocol):
    """What this process needs of the engine's loop."""

    @property
    def info(self) -> EngineInfo:
        """The loaded model."""
        ...

    @property
    def has_work(self) -> bool:
        """Whether ``step`` has something to do or to report. While False, the process sleeps until a message comes."""
        ...

    def compile(self, spec: GrammarSpec) -> Any:
        """Compile a request's grammar. Called from another thread than the rest. Raises an exception for the client."""
        ...

    def add(self, request: GenerateRequest, grammar: Any = None) -> None:
        """Queue a request, with its compiled grammar. Never raises for a bad one: the next step answers it with an error."""
        ...

    def reject(self, request_id: str, problem: str) -> None:
        """Have the next step answer a request with an error output."""
        ...

    def abort(self, request_id: str) -> None:
        """Stop a request before the next step; unknown ids are ignored."""
        ...

    def step(self) -> StepOutputs:
        """Run one step; with nothing to do, it gives the statistics alone. An exception is fatal for the process."""
        ...


@dataclass(frozen=True, slots=True)
class _Compiled:
    """The grammar of a request that was put aside, or what is wrong with it."""

    request: GenerateRequest
    grammar: Any = None
    problem: str | None = None


class _GrammarQueue:
    """Compiles grammars in a thread of its own, so that no other request waits for one; puts the results in the inbox."""

    def __init__(self, core: EngineCore, put: Callable[[_Compiled], None]) -> None:
        self._core, self._put = core, put
        self._waiting: set[str] = set()
        self._requests: queue.SimpleQueue[GenerateRequest] = queue.SimpleQueue()
        # A daemon: the process must not wait for a grammar when it ends.
        threading.Thread(target=self._work, name="engine-grammars", daemon=True).start()

    def start(self, request: GenerateRequest) -> None:
        """Put a request aside until its grammar is compiled."""
        self._waiting.add(request.request_id)
        self._requests.put(request)

    def abort(self, request_id: str) -> None:
        """Forget a request; unknown ids are ignored."""
        self._waiting.discard(request_id)

    def finish(self, compiled: _Compiled) -> None:
        """Hand a request over to the core, unless it was aborted meanwhile."""
        request = compiled.request
        if request.request_id not in self._waiting:
            return
        self._waiting.discard(request.request_id)
        if compiled.problem is not None:
            self._core.reject(request.request_id, compiled.problem)
        else:
            self._core.add(request, compiled.grammar)

    def _work(self) -> None:
        while True:
            self._put(self._compile(self._requests.get()))

    def _compile(self, request: GenerateRequest) -> _Compiled:
        assert request.grammar is not None
        try:
            return _Compiled(request, self._core.compile(request.grammar))
        except Exception as error:  # whatever it is, it must end this request and no other
            return _Compiled(request, problem=" ".join(str(error).split()) or type(error).__name__)


class CoreFactory(Protocol):
    """Builds the core; it reports each start-up step in a few words."""

    def __call__(self, config: EngineConfig, progress: ProgressCallback, /) -> EngineCore:
        """Raise an exception with a message for the user when the model cannot be loaded."""
        ...


class ProgressCallback(Protocol):
    """Takes a start-up step, such as ``loading weights``."""

    def __call__(self, message: str, /) -> None:
        """Report it."""
        ...


class _Channel:
    """The pipe to the server and the heartbeat that it reads. The process ends as soon as the server is gone."""

    def __init__(self, connection: Connection, heartbeat: c_double) -> None:
        self._connection = connection
        self._heartbeat = heartbeat
        self._inbox: queue.SimpleQueue[ToEngine | _Compiled] = queue.SimpleQueue()
        self.put = self._inbox.put
        threading.Thread(target=self._read, name="engine-inbox", daemon=True).start()

    def _read(self) -> None:
        # A thread, so that the server's death is seen also while the model loads or a step is long.
        while True:
            try:
                self._inbox.put(self._connection.recv())
            except (EOFError, OSError):
                _exit_without_server()
            except Exception as error:  # from unpickling; without this thread the process would outlive the server
                traceback.print_exception(error)
                sys.stderr.flush()
                os._exit(1)

    def receive(self, *, wait: bool) -> list[ToEngine | _Compiled]:
        """All messages that are here, oldest first; with ``wait``, sleep for the first one, one idle tick at most."""
        messages: list[ToEngine | _Compiled] = []
        try:
            if wait:
                messages.append(self._inbox.get(timeout=IDLE_TICK_SECONDS))
            while True:
                messages.append(self._inbox.get_nowait())
        except queue.Empty:
            return messages

    def send(self, message: FromEngine) -> None:
        """Hand a message to the server."""
        try:
            self._connection.send(message)
        except OSError:
            _exit_without_server()

    def progress(self, message: str) -> None:
        """Report a start-up step; it counts as a sign of life."""
        self.tick()
        self.send(Progress(message))

    def tick(self) -> None:
        """Beat: the loop is alive now. The monotonic clock is the same in all processes of a machine."""
        self._heartbeat.value = time.monotonic()


def run_engine(config: EngineConfig, connection: Connection, heartbeat: c_double, core_factory: str = REAL_CORE) -> NoReturn:
    """Be the engine process: build the core, serve until ``Shutdown``, exit with 1 after a failure. Never returns.

    ``heartbeat`` is shared memory, in seconds of ``time.monotonic()``. ``core_factory`` names a ``CoreFactory``.
    """
    _leave_signals_to_server()
    channel = _Channel(connection, heartbeat)
    try:
        build: CoreFactory = pkgutil.resolve_name(core_factory)
        core = build(config, channel.progress)
    except Exception as error:
        _fail(channel, error, "the engine cannot start")
    channel.tick()
    channel.send(EngineReady(core.info))
    try:
        _serve(core, channel)
    except Exception as error:
        _fail(channel, error, "the engine stopped in a step")
    _exit(0)


def _serve(core: EngineCore, channel: _Channel) -> None:
    sent_stats = EngineStats()
    grammars = _GrammarQueue(core, channel.put)
    while True:
        channel.tick()
        messages = channel.receive(wait=not core.has_work)
        for message in messages:
            match message:
                case GenerateRequest(grammar=GrammarSpec()):
                    grammars.start(message)
                case GenerateRequest():
                    core.add(message)
                case _Compiled():
                    grammars.finish(message)
                case AbortRequest():
                    grammars.abort(message.request_id)
                    core.abort(message.request_id)
                case Shutdown():
                    return
        # A message without work is an abort of the last request: the server's gauges must fall back to zero.
        if core.has_work or messages:
            result = core.step()
            if not result.is_empty or result.stats != sent_stats:
                channel.send(result)
                sent_stats = result.stats


def _leave_signals_to_server() -> None:
    for number in PARENT_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    # The server blocks them around the start, so that none can strike before this line.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PARENT_SIGNALS)


def _exit_without_server() -> NoReturn:
    # Not sys.exit: this may be the reading thread, and the main thread may be deep inside a step.
    os._exit(1)


def _fail(channel: _Channel, error: Exception, what: str) -> NoReturn:
    """Report ``error`` in one line and exit with 1; one that was not foreseen leaves its traceback on stderr too."""
    line = " ".join(str(error).split())
    if not _is_for_the_user(error):
        traceback.print_exception(error)
        line = f"{what}: {type(error).__name__}: {line} (the traceback is in the log)"
    channel.send(EngineFailed(line))
    _exit(1)


def _exit(status: int) -> NoReturn:
    """End at once, with everything sent and written: taking torch apart takes a second, and a device may hang in it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _is_for_the_user(error: Exception) -> bool:
    return any(f"{kind.__module__}.{kind.__qualname__}" in _ERRORS_FOR_THE_USER for kind in type(error).__mro__)
