"""The application: routes, middleware and error handling around one engine."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from starlette.middleware.cors import CORSMiddleware

from engine import Engine
from server.chat import chat_routes
from server.completions import completion_routes
from server.config import ServerConfig
from server.errors import install_error_handlers
from server.fields import UnknownFields
from server.health import health_routes
from server.lifecycle import Lifecycle
from server.metrics import ServerMetrics
from server.middleware import ApiKeys, BodyLimit, RequestLog
from server.models import model_routes
from server.parsers import reasoning_format, tool_format
from server.services import Services
from server.tokenize import tokenize_routes
from server.tokenizer import Tokenizer
from server.version import version


def create_app(
    engine: Engine,
    config: ServerConfig,
    tokenizer: Tokenizer,
    *,
    registry: CollectorRegistry | None = None,
    lifecycle: Lifecycle | None = None,
) -> FastAPI:
    """The app of a started engine, which it shuts down at the end of its lifespan.

    Metrics go to ``registry``, or to one of the app's own. ``lifecycle`` lets the caller begin a drain.
    """
    services = Services(
        engine=engine,
        config=config,
        tokenizer=tokenizer,
        metrics=ServerMetrics(registry or CollectorRegistry(), engine, config.model_name),
        lifecycle=lifecycle or Lifecycle(config.retry_after),
        unknown_fields=UnknownFields(),
        tool_format=tool_format(config.tool_call_parser, tokenizer.chat_template),
        reasoning_format=reasoning_format(config.reasoning_parser, tokenizer.chat_template),
    )

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        try:
            yield
        finally:
            services.lifecycle.begin_drain()
            services.lifecycle.fail_running()
            await engine.shutdown()

    app = FastAPI(title="tidar-server", version=version(), lifespan=lifespan, docs_url=None, redoc_url=None)
    for routes in (chat_routes, completion_routes, model_routes, tokenize_routes, health_routes):
        app.include_router(routes(services))
    install_error_handlers(app, config.retry_after)
    # The last one added sees a request first.
    app.add_middleware(BodyLimit, max_bytes=config.max_body_bytes)
    if config.api_keys:
        app.add_middleware(ApiKeys, api_keys=config.api_keys)
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(config.cors_origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["x-request-id"],
        )
    app.add_middleware(RequestLog)
    return app
