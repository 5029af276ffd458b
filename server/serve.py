"""``tidar serve``: one process from the first line on the terminal to the exit status."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator

import uvicorn

from engine import AsyncEngine, Engine, EngineDeadError
from server.app import create_app
from server.lifecycle import Lifecycle
from server.middleware import RequestIdFilter
from server.options import BUNDLED_MODEL, ServeOptions, resolved_lines
from server.tokenizer import Tokenizer, TokenizerError, load_tokenizer, torch_hidden
from server.version import version

FAILURE_SECONDS = 5.0
"""How long requests get to tell their clients that the engine is gone."""

BACKLOG = 2048


class StartError(Exception):
    """The server cannot start; the message is one line that says what to do."""


def serve(options: ServeOptions) -> int:
    """Serve until a signal or the engine's end: the exit status."""
    configure_logging(options.log_level)
    say(f"tidar-server {version()}")
    for line in options.lines():
        say(f"  {line}")
    try:
        sock = bind(options.host, options.port)
    except StartError as error:
        return _failed(error)
    return run(
        options, lambda: AsyncEngine(options.engine, lambda message: say(f"  … {message}")), _load_tokenizer(options), sock
    )


def run(options: ServeOptions, make_engine: Callable[[], Engine], load: Callable[[], Tokenizer], sock: socket.socket) -> int:
    """Serve with an engine and a tokenizer of the caller's: the exit status."""

    async def main() -> int:
        return await ServerProcess(options, make_engine(), load, sock).run()

    with contextlib.closing(sock):
        try:
            return asyncio.run(main())
        except (StartError, EngineDeadError, TokenizerError) as error:
            return _failed(error)
        finally:
            # The process ends now: going through a million objects of libraries once more takes longer than all else.
            gc.freeze()


class ServerProcess:
    """Loads, serves, drains, ends."""

    def __init__(
        self, options: ServeOptions, engine: Engine, load_tokenizer: Callable[[], Tokenizer], sock: socket.socket
    ) -> None:
        self._options = options
        self._engine = engine
        self._load_tokenizer = load_tokenizer
        self._socket = sock
        self._lifecycle = Lifecycle(options.server.retry_after)
        self._stop = asyncio.Event()

    async def run(self) -> int:
        """The exit status. Raises StartError, EngineDeadError or TokenizerError when it cannot start."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal, number)
        stopped = asyncio.create_task(self._stop.wait())
        try:
            loading = asyncio.create_task(self._load())
            await asyncio.wait((loading, stopped), return_when=asyncio.FIRST_COMPLETED)
            if not loading.done():
                loading.cancel()
                return 0
            return await self._serve(loading.result(), stopped)
        finally:
            stopped.cancel()
            await self._engine.shutdown()

    async def _load(self) -> Tokenizer:
        _, tokenizer = await asyncio.gather(self._engine.start(), in_daemon_thread(self._load_tokenizer))
        return tokenizer

    async def _serve(self, tokenizer: Tokenizer, stopped: asyncio.Task[bool]) -> int:
        app = create_app(self._engine, self._options.server, tokenizer, lifecycle=self._lifecycle)
        self._listen()
        server = _HttpServer(app, self._announce)
        serving = asyncio.create_task(server.serve(sockets=[self._socket]))
        died = asyncio.create_task(self._engine.wait_closed())
        try:
            await asyncio.wait((serving, stopped, died), return_when=asyncio.FIRST_COMPLETED)
            self._lifecycle.begin_drain()
            if not died.done() and not serving.done():
                await self._drain(died)
            status = await self._report_death(died) if died.done() else 0
            ended_by_itself = serving.done() and not self._stop.is_set()
            server.should_exit = True
            await serving
            return 1 if ended_by_itself else status
        finally:
            died.cancel()

    async def _drain(self, died: asyncio.Task[str | None]) -> None:
        seconds, count = self._options.server.shutdown_timeout, self._lifecycle.num_running
        if count:
            say(f"shutting down: {count} running requests have {seconds:g} s to finish; Ctrl-C again ends at once")
        idle = asyncio.create_task(self._lifecycle.wait_idle(seconds))
        await asyncio.wait((idle, died), return_when=asyncio.FIRST_COMPLETED)
        if not died.done() and not idle.result():
            self._lifecycle.fail_running()
        idle.cancel()

    async def _report_death(self, died: asyncio.Task[str | None]) -> int:
        print(f"tidar serve: {died.result() or 'the engine ended'}", file=sys.stderr, flush=True)
        # The requests learn it from the engine; this only waits until they have told their clients.
        await self._lifecycle.wait_idle(FAILURE_SECONDS)
        return 1

    def _listen(self) -> None:
        # Only now: a port that is open but answers nothing would mislead whatever waits for it.
        try:
            self._socket.listen(BACKLOG)
        except OSError as error:
            raise _bind_error(self._options.host, self._options.port, error) from error

    def _announce(self) -> None:
        host, port = self._socket.getsockname()[:2]
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
        url = f"http://{host}:{port}"
        for line in resolved_lines(self._engine.info):
            say(f"  {line}")
        question = "hello"
        if self._options.engine.model == str(BUNDLED_MODEL):
            question = "What does json.dumps do?"
            say("  a small demonstration model: it can be wrong. It answers questions about the Python standard library:")
            say("    What does os.walk do?  How do I shuffle a list?  Which module has Counter?  What is functools for?")
        key = "-H 'Authorization: Bearer KEY' " if self._options.server.api_keys else ""
        body = f'{{"messages": [{{"role": "user", "content": "{question}"}}]}}'
        say(f"  try: curl {url}/v1/chat/completions {key}-H 'Content-Type: application/json' -d '{body}'")
        say(f"ready at {url}")

    def _on_signal(self, number: signal.Signals) -> None:
        if self._stop.is_set() and number == signal.SIGINT:
            # The engine process sees the end of its pipe and follows.
            os._exit(130)
        self._stop.set()


class _HttpServer(uvicorn.Server):
    """Uvicorn without signal handlers: the drain comes before its own shutdown, which closes the port first."""

    def __init__(self, app: object, on_started: Callable[[], None]) -> None:
        super().__init__(
            uvicorn.Config(
                app,  # type: ignore[arg-type]
                lifespan="on",
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=int(FAILURE_SECONDS),
            )
        )
        self._on_started = on_started

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave them to ServerProcess."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and say so."""
        await super().startup(sockets)
        if self.started:
            self._on_started()


async def in_daemon_thread(work: Callable[[], Tokenizer]) -> Tokenizer:
    """Run ``work`` in a thread that the end of the process does not wait for, as it would for one of asyncio's."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[Tokenizer] = loop.create_future()

    def settle(tokenizer: Tokenizer | None, error: Exception | None) -> None:
        if result.done():
            return
        if tokenizer is not None:
            result.set_result(tokenizer)
        else:
            result.set_exception(error or StartError("the tokenizer could not be loaded"))

    def run() -> None:
        tokenizer: Tokenizer | None = None
        error: Exception | None = None
        try:
            tokenizer = work()
        except Exception as problem:
            error = problem
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, tokenizer, error)

    threading.Thread(target=run, name="tokenizer-loader", daemon=True).start()
    return await result


def bind(host: str, port: int) -> socket.socket:
    """A socket that has the address but does not listen yet. Raises StartError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise _bind_error(host, port, error) from error
    return sock


def configure_logging(level: str) -> None:
    """Log lines to standard error, each with its request's id."""
    handler = logging.StreamHandler()
    handler.addFilter(RequestIdFilter())
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s [%(request_id)s] %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger("uvicorn").setLevel(max(logging.WARNING, logging.getLevelName(level.upper())))


def say(line: str) -> None:
    """One line for the person at the terminal."""
    print(line, flush=True)


def _load_tokenizer(options: ServeOptions) -> Callable[[], Tokenizer]:
    def load() -> Tokenizer:
        with torch_hidden():
            # A revision is one of the model's repository and means nothing in another.
            is_models = options.tokenizer == options.engine.model
            return load_tokenizer(options.tokenizer, options.engine.revision if is_models else None)

    return load


def _bind_error(host: str, port: int, error: OSError) -> StartError:
    if error.errno == errno.EADDRINUSE:
        return StartError(f"port {port} on {host} is in use; stop what runs there, or choose another with --port")
    return StartError(f"cannot listen on {host}, port {port}: {error.strerror or error}; see --host and --port")


def _failed(error: Exception) -> int:
    print(f"tidar serve: {error}", file=sys.stderr, flush=True)
    return 1
