"""The server's own settings, frozen once at start-up. Those of the engine are in ``engine.EngineConfig``."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine import SchedulerConfig


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """How the HTTP side behaves. Durations are in seconds, sizes in bytes.

    ``served_model_names``: the ids that clients may ask for; the first is the one that answers and metrics carry.
    ``model_root``: where the checkpoint came from, shown by ``/v1/models``. ``api_keys``: empty turns authentication off.
    ``cors_origins``: empty sends no CORS header. ``keepalive_interval``: silence after which a stream gets a comment line.
    ``slow_reader_timeout``: how long one write to a client may take before its request is aborted.
    ``heartbeat_deadline``: age of the engine's heartbeat at which ``/health/live`` fails; long on purpose, since a first
    compile or a long prompt on a CPU may take minutes. ``retry_after``: what a 503 asks clients to wait. ``limits``: those of
    the engine's queue, to refuse what could never fit. ``tool_call_parser``, ``reasoning_parser``: a format's name, ``auto``
    for what the chat template shows, or ``none``.
    """

    served_model_names: tuple[str, ...] = ("tidar",)
    model_root: str = ""
    api_keys: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    max_body_bytes: int = 16 * 2**20
    max_choices: int = 128
    keepalive_interval: float = 15.0
    slow_reader_timeout: float = 60.0
    heartbeat_deadline: float = 600.0
    shutdown_timeout: float = 30.0
    retry_after: int = 1
    tool_call_parser: str = "auto"
    reasoning_parser: str = "auto"
    limits: SchedulerConfig = field(default_factory=SchedulerConfig)

    def __post_init__(self) -> None:
        """Raise ValueError when a model has no name to be served under."""
        if not self.served_model_names or not all(self.served_model_names):
            raise ValueError("served_model_names needs at least one name, and none of them empty")

    @property
    def model_name(self) -> str:
        """The name in answers to requests that name no model, and in metric labels."""
        return self.served_model_names[0]
