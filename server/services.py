"""What the routes of one app share."""

from __future__ import annotations

from dataclasses import dataclass

from engine import Engine
from server.config import ServerConfig
from server.errors import ApiError
from server.fields import UnknownFields
from server.lifecycle import Lifecycle
from server.metrics import ServerMetrics
from server.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Services:
    """Built once by ``create_app`` and handed to each group of routes."""

    engine: Engine
    config: ServerConfig
    tokenizer: Tokenizer
    metrics: ServerMetrics
    lifecycle: Lifecycle
    unknown_fields: UnknownFields

    def resolve_model(self, name: str | None) -> str:
        """The served name to answer with. Raises a 404 for a name that is not served."""
        if not name:
            return self.config.model_name
        if name in self.config.served_model_names:
            return name
        served = ", ".join(self.config.served_model_names)
        raise ApiError(
            404,
            f"the model {name[:100]!r} is not served here; this server has: {served}",
            code="model_not_found",
            param="model",
        )
