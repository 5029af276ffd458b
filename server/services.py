"""What the routes of one app share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from engine import Engine, QueueFullError
from server.config import ServerConfig
from server.errors import ApiError, invalid
from server.fields import UnknownFields
from server.lifecycle import Lifecycle
from server.metrics import ServerMetrics
from server.parsers import ReasoningFormat, ToolFormat
from server.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Services:
    """Built once by ``create_app`` and handed to each group of routes.

    ``tool_format``, ``reasoning_format``: how the model writes tool calls and thinking; None where that is not known.
    """

    engine: Engine
    config: ServerConfig
    tokenizer: Tokenizer
    metrics: ServerMetrics
    lifecycle: Lifecycle
    unknown_fields: UnknownFields
    tool_format: ToolFormat | None = None
    reasoning_format: ReasoningFormat | None = None

    def admit(self, num_choices: int, texts: Iterable[str]) -> None:
        """Refuse, before the work of encoding, what will be refused anyway. Raises a 503, a 400 or QueueFullError."""
        self.lifecycle.admit()
        limits, num_running = self.config.limits, self.lifecycle.num_choices
        if num_running + num_choices > limits.max_num_seqs + limits.max_waiting_requests:
            raise QueueFullError(f"{num_running} requests are running or waiting already; retry later")
        self._check_length(texts)

    def _check_length(self, texts: Iterable[str]) -> None:
        # A text can't have fewer tokens than if all of it were the longest one.
        max_model_len = self.engine.info.max_model_len
        longest = max((len(text) for text in texts), default=0)
        if longest > max_model_len * self.tokenizer.max_token_chars:
            raise invalid(
                f"the prompt has {longest} characters, which no context of {max_model_len} tokens can hold; shorten it",
                code="context_length_exceeded",
            )

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
