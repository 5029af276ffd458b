"""What load balancers, supervisors and Prometheus ask: liveness, readiness, metrics, version, load. None generates a token."""

from __future__ import annotations

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4
from starlette.responses import JSONResponse, Response

from server.errors import overloaded
from server.services import Services
from server.version import version


def health_routes(services: Services) -> APIRouter:
    """The routes, bound to their services."""
    router = APIRouter()

    @router.head("/health/live", response_model=None, include_in_schema=False)
    @router.get("/health/live", response_model=None)
    async def live() -> Response:
        """Whether this process is worth keeping: it answers, and its engine gave a sign of life lately."""
        age, deadline = services.engine.heartbeat_age, services.config.heartbeat_deadline
        if not services.engine.is_alive:
            raise overloaded("the engine is not running", services.config.retry_after, code="engine_unavailable")
        if age > deadline:
            message = f"the engine gave no sign of life for {age:.0f} s; {deadline:.0f} s are allowed"
            raise overloaded(message, services.config.retry_after, code="engine_unavailable")
        return JSONResponse({"status": "live"})

    @router.head("/health", response_model=None, include_in_schema=False)
    @router.head("/health/ready", response_model=None, include_in_schema=False)
    @router.get("/health", response_model=None)
    @router.get("/health/ready", response_model=None)
    async def ready() -> Response:
        """Whether new requests should be sent here."""
        services.lifecycle.admit()
        if not services.engine.is_alive:
            raise overloaded("the engine is not running", services.config.retry_after, code="engine_unavailable")
        return JSONResponse({"status": "ready"})

    @router.get("/metrics", response_model=None)
    async def metrics() -> Response:
        """Prometheus' text format."""
        return Response(services.metrics.exposition(), headers={"Content-Type": CONTENT_TYPE_PLAIN_0_0_4})

    @router.get("/version", response_model=None)
    async def show_version() -> Response:
        """The version of the server."""
        return JSONResponse({"version": version()})

    @router.get("/load", response_model=None)
    async def load() -> Response:
        """How many requests are being generated."""
        return JSONResponse({"server_load": services.lifecycle.num_running})

    return router
