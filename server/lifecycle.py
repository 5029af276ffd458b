"""Whether new work is taken, and which generations run: what a shutdown waits for and may end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Protocol

from server.errors import ApiError, overloaded


class Running(Protocol):
    """A generation that can be told to end."""

    @property
    def num_unfinished(self) -> int:
        """Choices that the engine still works on."""
        ...

    def fail(self, error: ApiError) -> None:
        """End it; its client gets ``error``."""
        ...


class Lifecycle:
    """Counts the generations of one app and refuses new ones once it drains."""

    def __init__(self, retry_after: int) -> None:
        self._retry_after = retry_after
        self._running: set[Running] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False

    @property
    def is_draining(self) -> bool:
        """Whether a shutdown has begun."""
        return self._draining

    @property
    def num_running(self) -> int:
        """Requests that are generating."""
        return len(self._running)

    @property
    def num_choices(self) -> int:
        """Choices that are running or waiting in the engine."""
        return sum(generation.num_unfinished for generation in self._running)

    def admit(self) -> None:
        """Raise a 503 while draining: another replica can take the request."""
        if self._draining:
            raise overloaded("the server is shutting down; retry", self._retry_after, code="server_shutting_down")

    @contextlib.contextmanager
    def track(self, generation: Running) -> Iterator[None]:
        """Count ``generation`` as running."""
        self._running.add(generation)
        self._idle.clear()
        try:
            yield
        finally:
            self._running.discard(generation)
            if not self._running:
                self._idle.set()

    def begin_drain(self) -> None:
        """Take no new work from now on. Idempotent."""
        self._draining = True

    async def wait_idle(self, timeout: float) -> bool:  # noqa: ASYNC109 - a drain has a deadline by definition
        """Wait until nothing runs, for ``timeout`` seconds at most; whether that was reached."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._idle.wait()
        return not self._running

    def fail_running(self) -> None:
        """End what still runs, with an error that clients retry."""
        error = overloaded("the server shut down before this answer was complete", self._retry_after, "server_shutting_down")
        for generation in tuple(self._running):
            generation.fail(error)
