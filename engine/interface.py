"""What the server needs of an engine, and the errors it may meet. Imports neither torch nor a model."""

from __future__ import annotations

from collections.abc import AsyncIterable
from typing import Protocol

from engine.messages import EngineInfo, EngineStats, GenerateRequest, RequestOutput


class QueueFullError(Exception):
    """The bounded queue has no room; nothing was sent to the engine, so that a retry is safe."""


class EngineDeadError(Exception):
    """The engine process is gone or cannot start; the message is one clear line."""


class Outputs(AsyncIterable[RequestOutput], Protocol):
    """The outputs of one request. They end after the one with a ``finish_reason``."""

    async def __anext__(self) -> RequestOutput:
        """The next output."""
        ...

    async def aclose(self) -> None:
        """Abort the request unless it has finished. Idempotent."""
        ...


class Engine(Protocol):
    """What the server needs of an engine. ``AsyncEngine`` is the real one; API tests use a fake."""

    @property
    def info(self) -> EngineInfo:
        """The loaded model. Valid once ``start`` has returned."""
        ...

    @property
    def is_alive(self) -> bool:
        """Whether the engine can take and finish requests."""
        ...

    @property
    def heartbeat_age(self) -> float:
        """Seconds since the engine last stepped or ticked."""
        ...

    def stats(self) -> EngineStats:
        """The newest snapshot that the engine sent."""
        ...

    def generate(self, request: GenerateRequest) -> Outputs:
        """Queue a request and iterate over its outputs; closing them early aborts the request.

        Raises QueueFullError at the call, before anything is sent, and EngineDeadError at the call or while iterating.
        """
        ...

    async def start(self) -> None:
        """Load the model and wait until it is ready. Raises EngineDeadError with what to do."""
        ...

    async def shutdown(self) -> None:
        """End the engine. Idempotent."""
        ...

    async def wait_closed(self) -> str | None:
        """Wait until the engine is gone: why, in one line that says what happened; None after an orderly shutdown."""
        ...
