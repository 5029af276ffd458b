"""Answers as they go over the wire: server-sent events, or one JSON object. A client that leaves ends its request."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Coroutine, Sequence
from typing import Any, Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.errors import as_api_error
from server.generation import Delta, Generation, collect
from server.planning import AnswerOptions
from server.protocol import Completion
from server.services import Services
from server.usage import metrics_of, usage_of

logger = logging.getLogger(__name__)

KEEPALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"


class AnswerWriter(Protocol):
    """The form of one route's answers."""

    options: AnswerOptions

    def opening(self, generation: Generation) -> Sequence[Completion]:
        """Chunks that come before any text."""
        ...

    def chunks(self, delta: Delta, generation: Generation) -> Sequence[Completion]:
        """Chunks for what a choice gained; one that ends the choice comes last and carries nothing else."""
        ...

    def last(self) -> Completion:
        """A chunk without choices, for the usage."""
        ...

    def whole(self, generation: Generation, deltas: Sequence[Sequence[Delta]]) -> Completion:
        """The answer in one piece; ``deltas`` are those of each choice."""
        ...


class _ClientGoneError(Exception):
    """The client cannot be written to; the message says why."""


async def until_disconnect(work: Coroutine[Any, Any, None], receive: Receive) -> bool:
    """Run ``work``, and cancel it when the client leaves; whether it came to its end. Raises what ``work`` raises."""
    working = asyncio.create_task(work)
    listening = asyncio.create_task(_disconnect(receive))
    try:
        await asyncio.wait((working, listening), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
            return True
        return False
    finally:
        for task in (working, listening):
            task.cancel()
        await asyncio.gather(working, listening, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class JsonAnswer(Response):
    """The answer in one piece, after the last token."""

    def __init__(self, services: Services, generation: Generation, writer: AnswerWriter) -> None:
        super().__init__(media_type="application/json")
        self._services = services
        self._generation = generation
        self._writer = writer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises ApiError and the engine's errors; nothing was sent then."""
        if not await until_disconnect(self._generate(), receive):
            logger.info("the client left; its request was aborted")
            return
        seconds = self._services.config.slow_reader_timeout
        try:
            async with asyncio.timeout(seconds):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            logger.warning("the client did not read for %g s; its answer was dropped", seconds)

    async def _generate(self) -> None:
        generation = self._generation
        self._services.lifecycle.admit()
        with self._services.lifecycle.track(generation):
            try:
                deltas = await collect(generation)
            finally:
                await generation.close()
        answer = self._writer.whole(generation, deltas)
        answer.usage = usage_of(generation)
        answer.metrics = metrics_of(generation)
        self.body = answer.json_line().encode()
        self.init_headers()


class EventStream(Response):
    """The answer as server-sent events.

    The headers wait for the first output, or for the first keep-alive: until then a failure can still be an HTTP status. After
    them it is an event with the error envelope and no ``[DONE]``, since a stream that ends well looks complete to a client.
    """

    def __init__(self, services: Services, generation: Generation, writer: AnswerWriter) -> None:
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._services = services
        self._generation = generation
        self._writer = writer
        self._has_begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises ApiError and the engine's errors while nothing was sent."""
        try:
            if not await until_disconnect(self._run(send), receive):
                logger.info("the client left; its request was aborted")
        except _ClientGoneError as error:
            logger.warning("%s; its request was aborted", error)

    async def _run(self, send: Send) -> None:
        services, generation = self._services, self._generation
        services.lifecycle.admit()
        with services.lifecycle.track(generation):
            try:
                await generation.start()
                await self._send_chunks(send)
            except _ClientGoneError:
                raise
            except Exception as error:
                if not self._has_begun:
                    raise
                problem = as_api_error(error, services.config.retry_after)
                if problem.status >= 500:
                    logger.error("the stream failed: %s", problem.message, exc_info=error if problem.status == 500 else None)
                await self._send(send, f"data: {problem.json()}\n\n".encode())
            finally:
                await generation.close()
        await self._send(send, b"", more=False)

    async def _send_chunks(self, send: Send) -> None:
        generation, options = self._generation, self._writer.options
        while not generation.is_finished:
            if not await self._something_came():
                await self._send(send, self._opening() + KEEPALIVE)
                continue
            deltas = generation.take()
            chunks = [chunk for delta in deltas for chunk in self._writer.chunks(delta, generation)]
            if generation.is_finished:
                if options.include_usage:
                    chunks.append(self._writer.last())
                    chunks[-1].usage = usage_of(generation)
                chunks[-1].metrics = metrics_of(generation)
            if chunks:
                await self._send(send, self._opening() + _events(chunks))
        await self._send(send, DONE)

    async def _something_came(self) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._services.config.keepalive_interval):
                await self._generation.wait()
                return True
        return False

    def _opening(self) -> bytes:
        return b"" if self._has_begun else _events(self._writer.opening(self._generation))

    async def _send(self, send: Send, body: bytes, *, more: bool = True) -> None:
        """Write within the deadline; the first write begins the response."""
        seconds = self._services.config.slow_reader_timeout
        try:
            async with asyncio.timeout(seconds):
                if not self._has_begun:
                    self._has_begun = True
                    await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                await send({"type": "http.response.body", "body": body, "more_body": more})
        except TimeoutError as error:
            raise _ClientGoneError(f"the client did not read for {seconds:g} s") from error
        except OSError as error:
            raise _ClientGoneError("the client closed the connection") from error


def _events(chunks: Sequence[Completion]) -> bytes:
    return "".join(f"data: {chunk.json_line()}\n\n" for chunk in chunks).encode()
