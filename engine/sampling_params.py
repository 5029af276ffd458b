"""What a client asked for, validated once; the engine reads it and never changes it."""

from __future__ import annotations

import enum
from dataclasses import dataclass

MAX_SEED = 2**64

MIN_TEMPERATURE = 1e-5
"""Below this, logits divided by the temperature overflow float32; such requests are greedy, as they would be in the limit."""


class DecodingMode(enum.Enum):
    """How a request is decoded. Every mode here gives the same tokens; they differ in speed."""

    AUTO = "auto"
    AR = "ar"
    LINEAR = "linear"
    TIDAR = "tidar"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling of one choice.

    ``temperature`` 0 is greedy, and anything below ``MIN_TEMPERATURE`` becomes 0.
    ``top_k`` 0 keeps all tokens. ``seed`` is always set (the server draws one when the client
    sends none): the noise of a token is a pure function of the seed, its position and its id. ``max_tokens`` counts emitted
    tokens. ``stop_token_ids`` end the request like an EOS id, also with ``ignore_eos``.
    """

    max_tokens: int
    seed: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        """Raise ValueError with a message for the client."""
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if not 0.0 <= self.temperature <= 2.0:
            raise ValueError(f"temperature must be between 0 and 2, got {self.temperature}")
        if self.temperature < MIN_TEMPERATURE:
            object.__setattr__(self, "temperature", 0.0)
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be positive, or 0 to keep all tokens, got {self.top_k}")
        if not 0.0 <= self.min_p <= 1.0:
            raise ValueError(f"min_p must be between 0 and 1, got {self.min_p}")
        if not 0 <= self.seed < MAX_SEED:
            raise ValueError(f"seed must be between 0 and 2**64 - 1, got {self.seed}")

    @property
    def greedy(self) -> bool:
        """Whether no noise is used."""
        return self.temperature == 0.0


def choice_seed(seed: int, index: int) -> int:
    """The seed of choice ``index`` of a request: the request's own for the first, SplitMix64 of it for the others."""
    if index == 0:
        return seed
    z = (seed + index * 0x9E3779B97F4A7C15) % MAX_SEED
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % MAX_SEED
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % MAX_SEED
    return z ^ (z >> 31)
