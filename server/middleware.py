"""What happens to every request before a route sees it: its id, its log line, its key, its size.

Plain ASGI, so that streams pass through untouched and a route still hears when its client leaves.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import Sequence
from contextvars import ContextVar

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import ApiError, internal

logger = logging.getLogger(__name__)

REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="-")
"""The id of the request that the running task serves."""

_REQUEST_ID_PATTERN = re.compile(r"[\x21-\x7e]{1,128}")
_OPEN_PATHS = re.compile(r"/health(/.*)?|/metrics")


class RequestIdFilter(logging.Filter):
    """Gives every log record the ``request_id`` of the task that wrote it."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Add the field; drop nothing."""
        record.request_id = REQUEST_ID.get()
        return True


class RequestLog:
    """Outermost: echoes or makes ``x-request-id``, writes one log line per request, and turns a bug into a 500."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID_PATTERN.fullmatch(given) else uuid.uuid4().hex
        REQUEST_ID.set(request_id)
        begun = time.monotonic()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            logger.exception("the request failed")
            if not status:
                await internal().response()(scope, receive, send_with_id)
        finally:
            path = scope["path"]
            level = logging.DEBUG if _OPEN_PATHS.fullmatch(path) else logging.INFO
            seconds = time.monotonic() - begun
            outcome = str(status) if status else "no answer"
            logger.log(level, "%s %.200r %s in %.3f s", scope["method"], path, outcome, seconds)


class ApiKeys:
    """Lets requests through that carry one of the keys; health and metrics are open."""

    def __init__(self, app: ASGIApp, api_keys: Sequence[str]) -> None:
        self._app = app
        # Digests have one length, so comparing them tells nothing about the keys'.
        self._digests = tuple(_digest(key) for key in api_keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or answer it with a 401."""
        if scope["type"] != "http" or _OPEN_PATHS.fullmatch(scope["path"]):
            await self._app(scope, receive, send)
            return
        key = _presented_key(Headers(scope=scope))
        digest = _digest(key)
        # All are compared, whichever matches: the time must not tell which.
        if sum(hmac.compare_digest(digest, known) for known in self._digests) == 0:
            message = "a valid API key is needed: send it as 'Authorization: Bearer KEY'"
            headers = {"WWW-Authenticate": "Bearer"}
            error = ApiError(401, message, code="invalid_api_key", type="authentication_error", headers=headers)
            await error.response()(scope, receive, send)
            return
        scope.setdefault("state", {})["api_key"] = key
        await self._app(scope, receive, send)


class BodyLimit:
    """Refuses bodies over ``max_bytes``, by their announced length or, without one, as they come in."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or answer it with a 413."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        message = f"the body is larger than {self._max_bytes} bytes; send less in one request"
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdecimal() and int(announced[:20]) > self._max_bytes:
            error = ApiError(413, message, code="request_too_large")
            await error.response()(scope, receive, send)
            return
        received = 0

        async def receive_limited() -> Message:
            nonlocal received
            event = await receive()
            received += len(event.get("body", b""))
            if received > self._max_bytes:
                raise HTTPException(413, message)
            return event

        await self._app(scope, receive_limited, send)


def _presented_key(headers: Headers) -> str:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
