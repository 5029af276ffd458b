"""``GET /v1/models`` and ``GET /v1/models/{id}``."""

from __future__ import annotations

import time

from fastapi import APIRouter
from starlette.responses import Response

from server.protocol import ModelCard, ModelList
from server.services import Services


def model_routes(services: Services) -> APIRouter:
    """The routes, bound to their services."""
    router = APIRouter()
    created = int(time.time())

    def card(name: str) -> ModelCard:
        root = services.config.model_root or name
        length = services.engine.info.max_model_len
        return ModelCard(
            id=name, object="model", created=created, owned_by="tidar-server", root=root, parent=None, max_model_len=length
        )

    @router.get("/v1/models", response_model=None)
    async def list_models() -> Response:
        """The names that ``model`` may have."""
        cards = [card(name) for name in services.config.served_model_names]
        return Response(ModelList(object="list", data=cards).json_line(), media_type="application/json")

    @router.get("/v1/models/{name:path}", response_model=None)
    async def retrieve_model(name: str) -> Response:
        """One of them."""
        return Response(card(services.resolve_model(name)).json_line(), media_type="application/json")

    return router
