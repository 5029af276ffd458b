"""Errors as clients see them: one envelope for everything that can go wrong, and the place where exceptions become one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from engine import EngineDeadError, QueueFullError

MAX_VALIDATION_ERRORS = 10
MAX_VALIDATION_ERROR_CHARS = 200

ROUTES_OF_V1 = ("chat/completions", "completions", "models")
ROUTES_OF_ROOT = ("tokenize", "detokenize", "health", "health/live", "health/ready", "metrics", "version", "load")

ENDPOINTS = "POST /v1/chat/completions, POST /v1/completions and GET /v1/models"

OTHER_APIS = {
    "responses": "the Responses API is not implemented here",
    "messages": "Anthropic's Messages API is not implemented here",
    "messages/count_tokens": "Anthropic's Messages API is not implemented here, but POST /tokenize counts tokens",
    "assistants": "the Assistants API is not implemented here",
    "threads": "the Assistants API is not implemented here",
    "api": "Ollama's API is not implemented here",
    "tokenizer_info": "/tokenizer_info is not implemented here, but POST /tokenize and POST /detokenize are",
}
"""What other servers have, by where the paths begin behind /v1."""

ALIASES = {"healthz": "health", "ping": "health", "livez": "health/live", "readyz": "health/ready", "server_info": "version"}
"""Other servers' names for what is served here."""

_CODES = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}


class ApiError(Exception):
    """An answer to the client that is not a success.

    ``type`` is OpenAI's class of error, ``param`` the field at fault if there is one, ``code`` a word for programs. The message
    says what to do.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        type: str = "invalid_request_error",
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.type = type
        self.param = param
        self.headers = dict(headers or {})

    def body(self) -> dict[str, dict[str, str | None]]:
        """The envelope as plain data."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def json(self) -> str:
        """The envelope as JSON text on one line."""
        return json.dumps(self.body())

    def response(self) -> Response:
        """The whole HTTP answer."""
        return Response(self.json(), status_code=self.status, headers=self.headers, media_type="application/json")


def invalid(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """A 400: the request cannot be served as it is."""
    return ApiError(400, message, code=code, param=param)


def unsupported(message: str, param: str) -> ApiError:
    """A 400 for a field that would have an effect which this server does not have."""
    return ApiError(400, message, code="unsupported_parameter", param=param)


def overloaded(message: str, retry_after: int, code: str = "server_overloaded") -> ApiError:
    """A 503 that clients retry by themselves: no work was done."""
    return ApiError(503, message, code=code, type="server_error", headers={"Retry-After": str(retry_after)})


def internal() -> ApiError:
    """A 500; the details are in the log, not in the answer."""
    return ApiError(500, "the server failed on this request; its log says why", code="internal_error", type="server_error")


def as_api_error(error: Exception, retry_after: int) -> ApiError:
    """What the client is told about ``error``."""
    match error:
        case ApiError():
            return error
        case QueueFullError():
            return overloaded(f"the server is full: {error}", retry_after)
        case EngineDeadError():
            return overloaded(f"the engine is not running: {error}", retry_after, code="engine_unavailable")
        case HTTPException(status_code=400) if isinstance(error.__cause__, RecursionError):
            return invalid("the body is nested too deeply to be read; simplify it", code="nested_too_deeply")
        case HTTPException(status_code=400) if isinstance(error.__cause__, ValueError):
            # Bytes that are no UTF-8, or an integer of thousands of digits; behind a semicolon Python advises programs.
            return invalid(f"the body is not valid JSON: {str(error.__cause__).partition(';')[0]}", code="invalid_json")
        case HTTPException():
            code = _CODES.get(error.status_code, "invalid_request" if error.status_code < 500 else "internal_error")
            kind = "invalid_request_error" if error.status_code < 500 else "server_error"
            return ApiError(error.status_code, str(error.detail), code=code, type=kind, headers=error.headers)
        case RequestValidationError():
            return _validation_error(error.errors())
    return internal()


def install_error_handlers(app: FastAPI, retry_after: int) -> None:
    """Answer every exception with the envelope: no route, wrong method, invalid body, a full queue, a dead engine."""

    async def answer(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException) and error.status_code in (404, 405):
            error = _routing_error(request, error)
        return as_api_error(error, retry_after).response()

    for kind in (ApiError, QueueFullError, EngineDeadError, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, answer)


def _routing_error(request: Request, error: HTTPException) -> ApiError:
    path = request.url.path[:200]
    if error.status_code == 404:
        return ApiError(404, f"there is no {path}; {_instead_of(path)}", code="not_found")
    allowed = (error.headers or {}).get("Allow", "another method")
    message = f"{path} does not take {request.method}; use {allowed}"
    return ApiError(405, message, code="method_not_allowed", headers=error.headers)


def _instead_of(path: str) -> str:
    """What to send a request to that came to a path that does not exist."""
    route = path.strip("/")
    while route == "v1" or route.startswith("v1/"):
        route = route.removeprefix("v1").strip("/")
    other = OTHER_APIS.get(route) or OTHER_APIS.get(route.partition("/")[0])
    if other is not None:
        return f"{other}; the endpoints are {ENDPOINTS}"
    if route in ROUTES_OF_V1:
        return f"the route is /v1/{route}: let the client's base URL end with /v1, once"
    route = ALIASES.get(route, route)
    if route in ROUTES_OF_ROOT:
        return f"the route is /{route}"
    return f"the endpoints are {ENDPOINTS}"


def _validation_error(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """Name the fields and what they should be, never the values: a prompt may be long or private."""
    lines = [_validation_line(error)[:MAX_VALIDATION_ERROR_CHARS] for error in errors[:MAX_VALIDATION_ERRORS]]
    more = len(errors) - len(lines)
    message = "; ".join(lines) + (f"; and {more} more" if more > 0 else "")
    location = errors[0]["loc"][1:] if errors else ()
    if errors and errors[0]["type"] == "json_invalid":
        return invalid(message, code="invalid_json")
    return invalid(message, str(location[0]) if location else None)


def _validation_line(error: Mapping[str, Any]) -> str:
    where = ".".join(str(part) for part in error["loc"][1:])
    if error["type"] == "json_invalid":
        return f"the body is not valid JSON: {error.get('ctx', {}).get('error', error['msg'])} at character {where}"
    if not where:
        return f"the body must be a JSON object with Content-Type: application/json ({error['msg']})"
    return f"{where}: {error['msg']}"
