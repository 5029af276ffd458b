"""The engine as a process of its own, seen from the server. Imports neither torch nor a model.

Three parties share the work, and each has one job: the event loop owns all state of this module; the sending thread writes
to the pipe, so that a busy engine never blocks the loop; the reading thread reads the pipe, hands each message to the loop
and, when the pipe ends, reaps the process and releases everything.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import multiprocessing
import queue
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from ctypes import c_double
from dataclasses import replace
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

from engine.config import EngineConfig
from engine.interface import EngineDeadError, QueueFullError
from engine.messages import (
    AbortRequest,
    EngineFailed,
    EngineInfo,
    EngineReady,
    EngineStats,
    FinishReason,
    GenerateRequest,
    Progress,
    RequestOutput,
    Shutdown,
    SpeculationStats,
    StepOutputs,
    TokenLogprobs,
)
from engine.worker import PARENT_SIGNALS, REAL_CORE, FromEngine, ToEngine, run_engine

SHUTDOWN_SECONDS = 10.0
"""How long the engine process may take to end by itself before it is killed."""

SHUT_DOWN = "the engine was shut down"


class _Inbox:
    """A request's outputs that nobody has read yet, merged into one, so that a slow reader holds at most one."""

    def __init__(self, request_id: str, num_prompt_tokens: int) -> None:
        self.num_prompt_tokens = num_prompt_tokens
        self.has_started = False
        self._nothing = RequestOutput(request_id, ())
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._prompt_logprobs: list[TokenLogprobs] = []
        self._latest = self._nothing
        self._speculation: list[int] | None = None
        self._death: str | None = None
        self._is_empty = True
        self._changed = asyncio.Event()

    def put(self, output: RequestOutput) -> None:
        """Append the tokens; the fields that tell of the end are those of the later output."""
        cached = max(output.num_cached_tokens, self._latest.num_cached_tokens)
        self._logprobs.extend(output.logprobs)
        self._prompt_logprobs.extend(output.prompt_logprobs)
        self._latest = replace(output, num_cached_tokens=cached)
        self.put_tokens(output.token_ids, None)

    def put_tokens(self, token_ids: Sequence[int], speculation: list[int] | None) -> None:
        """Append tokens that have nothing else with them than the request's ``SpeculationStats`` so far, in their order."""
        self._token_ids.extend(token_ids)
        self._speculation = speculation
        self._is_empty, self.has_started = False, True
        self._changed.set()

    def fail(self, message: str) -> None:
        """Let the reader have what is here, and then raise EngineDeadError."""
        self._death = message
        self._changed.set()

    async def get(self) -> RequestOutput:
        """Everything since the last call, as one output; waits for some."""
        while self._is_empty:
            if self._death is not None:
                raise EngineDeadError(self._death)
            self._changed.clear()
            await self._changed.wait()
        latest = self._latest
        output = replace(
            latest,
            token_ids=tuple(self._token_ids),
            speculation=latest.speculation if self._speculation is None else SpeculationStats(*self._speculation),
            logprobs=tuple(self._logprobs),
            prompt_logprobs=tuple(self._prompt_logprobs),
        )
        self._latest, self._is_empty = self._nothing, True
        for gathered in (self._token_ids, self._logprobs, self._prompt_logprobs):
            gathered.clear()
        return output


class OutputStream(AsyncIterator[RequestOutput]):
    """The outputs of one request. It ends after the output with a ``finish_reason``.

    Closing it before aborts the request; so does cancelling the task that waits in it, and dropping it. A class and not an
    async generator, since a generator that was never started runs no clean-up when it is closed.
    """

    def __init__(self, inbox: _Inbox, abandon: Callable[[], None], loop: asyncio.AbstractEventLoop) -> None:
        self._inbox = inbox
        self._abandon = abandon
        self._loop = loop
        self._closed = False

    async def __anext__(self) -> RequestOutput:
        """Raises EngineDeadError when the engine died before the request's end."""
        if self._closed:
            raise StopAsyncIteration
        try:
            output = await self._inbox.get()
        except BaseException:
            self._close()
            raise
        self._closed = output.finish_reason is not None
        return output

    async def aclose(self) -> None:
        """Abort the request unless it has finished. Idempotent."""
        self._close()

    def _close(self) -> None:
        if not self._closed:
            self._closed = True
            self._abandon()

    def __del__(self) -> None:
        if not self._closed:
            # The collector may run in any thread.
            _call_in_loop(self._loop, self._abandon)


class AsyncEngine:
    """The ``Engine`` whose core runs in a child process.

    ``on_progress`` gets each start-up step, in the event loop. ``core_factory`` names an ``engine.worker.CoreFactory`` as
    ``module:function``. The process is spawned, not forked, so a program's main module is imported there once more: it
    should do its work under ``if __name__ == "__main__"``.
    """

    def __init__(
        self, config: EngineConfig, on_progress: Callable[[str], None] | None = None, core_factory: str = REAL_CORE
    ) -> None:
        self._config = config
        self._on_progress = on_progress
        self._core_factory = core_factory
        self._process: SpawnProcess | None = None
        self._reader: threading.Thread | None = None
        self._outbox: queue.SimpleQueue[ToEngine | None] = queue.SimpleQueue()
        self._heartbeat: c_double | None = None
        self._info: EngineInfo | None = None
        self._stats = EngineStats()
        self._inboxes: dict[str, _Inbox] = {}
        self._num_waiting_tokens = 0
        self._shutting_down = False
        self._failure: str | None = None
        self._decided = asyncio.Event()  # ready, or closed before it was
        self._closed = asyncio.Event()

    @property
    def info(self) -> EngineInfo:
        """The loaded model. Raises EngineDeadError before ``start`` has returned."""
        if self._info is None:
            raise EngineDeadError(self._failure or "the engine has not started yet")
        return self._info

    @property
    def is_alive(self) -> bool:
        """Whether the engine can take and finish requests."""
        return self._info is not None and not self._shutting_down and self._failure is None

    @property
    def pid(self) -> int | None:
        """The id of the engine process; None before ``start``."""
        return self._process.pid if self._process else None

    @property
    def heartbeat_age(self) -> float:
        """Seconds since the engine last stepped, ticked or reported progress; 0 before ``start``."""
        return time.monotonic() - self._heartbeat.value if self._heartbeat else 0.0

    def stats(self) -> EngineStats:
        """The newest snapshot that the engine sent."""
        return self._stats

    def generate(self, request: GenerateRequest) -> OutputStream:
        """Queue a request and iterate over its outputs; closing the iterator early aborts the request.

        Outputs that wait for a slow reader are merged. Ids must not be used twice. Raises QueueFullError at the call, before
        anything is sent, and EngineDeadError at the call or while iterating.
        """
        loop = asyncio.get_running_loop()
        if not self.is_alive:
            raise EngineDeadError(self._failure or (SHUT_DOWN if self._shutting_down else "the engine has not started yet"))
        if request.request_id in self._inboxes:
            raise ValueError(f"request {request.request_id!r} is already running")
        self._check_room(request)
        inbox = _Inbox(request.request_id, len(request.prompt_token_ids))
        stream = OutputStream(inbox, lambda: self._abandon(request.request_id), loop)
        self._inboxes[request.request_id] = inbox
        self._num_waiting_tokens += inbox.num_prompt_tokens
        self._outbox.put(request)
        return stream

    async def start(self) -> None:
        """Load the model and wait until it is ready. Raises EngineDeadError with what to do."""
        if self._process is not None or self._shutting_down:
            raise RuntimeError("an engine starts once; make another one")
        self._launch(asyncio.get_running_loop())
        await self._decided.wait()
        if self._info is None or self._failure is not None:
            raise EngineDeadError(self._failure or SHUT_DOWN)

    async def shutdown(self) -> None:
        """End the engine process; requests still running raise EngineDeadError. Idempotent.

        Waits SHUTDOWN_SECONDS at most before it kills the process; one that is still loading has nothing to lose.
        """
        self._shutting_down = True
        if self._process is None or self._reader is None:
            self._decided.set()
            self._closed.set()
            return
        if self._info is None:
            self._process.kill()
        self._outbox.put(Shutdown())
        try:
            async with asyncio.timeout(SHUTDOWN_SECONDS):
                await self._closed.wait()
        except TimeoutError:
            self._process.kill()
            await self._closed.wait()
        await asyncio.to_thread(self._reader.join)

    async def wait_closed(self) -> str | None:
        """Wait until the engine process is gone: why, in one line; None after an orderly shutdown."""
        await self._closed.wait()
        return self._failure

    def _check_room(self, request: GenerateRequest) -> None:
        limits = self._config.scheduler
        num_waiting = len(self._inboxes) - limits.max_num_seqs
        if num_waiting >= limits.max_waiting_requests:
            raise QueueFullError(f"{num_waiting} requests are waiting already; retry later")
        # Tokens wait until their request's first output. A prompt that waits alone is let in, whatever its length:
        # refusing it as "full" would have its client retry for ever.
        num_tokens = self._num_waiting_tokens
        if num_tokens and num_tokens + len(request.prompt_token_ids) > limits.max_waiting_tokens:
            raise QueueFullError(f"{num_tokens} prompt tokens are waiting already; retry later")

    def _launch(self, loop: asyncio.AbstractEventLoop) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        heartbeat: c_double = context.RawValue("d", time.monotonic())
        arguments = (self._config, theirs, heartbeat, self._core_factory)
        process = context.Process(target=run_engine, args=arguments, name="tidar-engine", daemon=True)
        # The tracker, a helper of multiprocessing that starts with the first process, unblocks these signals itself.
        resource_tracker.ensure_running()
        previous = signal.pthread_sigmask(signal.SIG_BLOCK, PARENT_SIGNALS)
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, previous)
            theirs.close()  # with this copy open, the pipe would not end with the engine
        # Without a shutdown, multiprocessing would wait at exit for a process that ignores its SIGTERM.
        atexit.register(process.kill)
        sender = threading.Thread(target=self._send, args=(ours, loop), name="engine-sender", daemon=True)
        everything = (ours, process, sender, loop)
        self._reader = threading.Thread(target=self._read, args=everything, name="engine-reader", daemon=True)
        self._heartbeat, self._process = heartbeat, process
        sender.start()
        self._reader.start()

    def _read(
        self, connection: Connection, process: SpawnProcess, sender: threading.Thread, loop: asyncio.AbstractEventLoop
    ) -> None:
        while True:
            try:
                message = connection.recv()
            except (EOFError, OSError):
                break
            except Exception as error:  # from unpickling; this thread must live to reap the process
                _call_in_loop(loop, self._receive, EngineFailed(f"the engine sent what cannot be read: {_one_line(error)}"))
                process.kill()
                break
            _call_in_loop(loop, self._receive, message)
        process.join(SHUTDOWN_SECONDS)
        if process.exitcode is None:  # its end of the pipe is closed, so it can never serve again
            process.kill()
            process.join()
        atexit.unregister(process.kill)
        self._outbox.put(None)
        sender.join()
        connection.close()
        _call_in_loop(loop, self._on_exit, process.exitcode)

    def _send(self, connection: Connection, loop: asyncio.AbstractEventLoop) -> None:
        """Write to the pipe until None comes or the engine is gone; the reading thread sees the latter too and reports it."""
        while (message := self._outbox.get()) is not None:
            try:
                connection.send(message)
            except OSError:
                return
            except Exception as error:  # from pickling, before anything is written: the message alone is lost
                if isinstance(message, GenerateRequest):
                    text = f"the request cannot be sent to the engine: {_one_line(error)}"
                    output = RequestOutput(message.request_id, (), FinishReason.ERROR, error=text)
                    _call_in_loop(loop, self._deliver, output)

    def _receive(self, message: FromEngine) -> None:
        match message:
            case StepOutputs():
                self._stats = message.stats
                for output in message.others:
                    self._deliver(output)
                for request_id, token_ids, speculation in message.tokens.rows():
                    inbox = self._started(request_id)
                    if inbox is not None:
                        inbox.put_tokens(token_ids, speculation)
            case Progress():
                if self._on_progress is not None:
                    self._on_progress(message.message)
            case EngineReady():
                self._info = message.info
                self._decided.set()
            case EngineFailed():
                self._failure = message.message

    def _deliver(self, output: RequestOutput) -> None:
        inbox = self._started(output.request_id)
        if inbox is None:
            return
        inbox.put(output)
        if output.finish_reason is not None:
            del self._inboxes[output.request_id]

    def _started(self, request_id: str) -> _Inbox | None:
        """The inbox of a request that has an output now; None if it was aborted, and the engine had not heard of it yet."""
        inbox = self._inboxes.get(request_id)
        if inbox is not None and not inbox.has_started:
            self._num_waiting_tokens -= inbox.num_prompt_tokens
        return inbox

    def _abandon(self, request_id: str) -> None:
        inbox = self._inboxes.pop(request_id, None)
        if inbox is None:
            return
        if not inbox.has_started:
            self._num_waiting_tokens -= inbox.num_prompt_tokens
        if self.is_alive:
            self._outbox.put(AbortRequest(request_id))

    def _on_exit(self, exit_code: int | None) -> None:
        if self._failure is None and not self._shutting_down:
            self._failure = _describe_exit(exit_code)
        for inbox in self._inboxes.values():
            inbox.fail(self._failure or SHUT_DOWN)
        self._inboxes.clear()
        self._decided.set()
        self._closed.set()


def _call_in_loop(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *arguments: Any) -> None:
    # RuntimeError: the loop is closed, and nobody is left who could care.
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(function, *arguments)


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _describe_exit(exit_code: int | None) -> str:
    if exit_code is None or exit_code >= 0:
        return f"the engine process ended with exit code {exit_code}; what it wrote to the log may say why"
    try:
        name = signal.Signals(-exit_code).name
    except ValueError:
        name = f"signal {-exit_code}"
    hint = "; the kernel does that when memory runs out" if name == "SIGKILL" else ""
    return f"the engine process was killed by {name}{hint}"
