"""What a client asked for, validated once; the engine reads it and never changes it."""

from __future__ import annotations

import enum
from dataclasses import dataclass

MAX_SEED = 2**64

MIN_TEMPERATURE = 1e-5
"""Below this, logits divided by the temperature overflow float32; such requests are greedy, as they would be in the limit."""


MAX_REPETITION_PENALTY = 100.0

MAX_LOGPROBS = 20
"""Most alternatives that may be asked for beside a token's own log-probability."""

MAX_LOGIT_BIAS = 300
"""Most tokens that may have a bias, as in OpenAI's API: the device has room for so many in every slot."""

MAX_STOP_TOKEN_IDS = 256


class DecodingMode(enum.Enum):
    """How a request is decoded. Every mode but ``DIFFUSION`` gives the same tokens; they differ in speed."""

    AUTO = "auto"
    AR = "ar"
    LINEAR = "linear"
    TIDAR = "tidar"
    DIFFUSION = "diffusion"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling of one choice.

    ``temperature`` 0 is greedy, and anything below ``MIN_TEMPERATURE`` becomes 0.
    ``top_k`` 0 keeps all tokens. ``seed`` is always set (the server draws one when the client
    sends none): the noise of a token is a pure function of the seed, its position and its id. ``max_tokens`` counts emitted
    tokens. ``stop_token_ids`` end the request like an EOS id, also with ``ignore_eos``; below ``min_tokens`` neither they nor
    EOS ids can be sampled.

    ``repetition_penalty`` counts the prompt and the output, the other two penalties the output only. ``logit_bias`` holds
    ``(token id, bias)`` pairs. ``logprobs`` and ``prompt_logprobs`` are how many alternatives to report beside the token's
    own log-probability, which is the model's, before any processing; None: none of it.
    """

    max_tokens: int
    seed: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None

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
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise ValueError(f"min_tokens must be between 0 and max_tokens ({self.max_tokens}), got {self.min_tokens}")
        for name in ("frequency_penalty", "presence_penalty"):
            if not -2.0 <= getattr(self, name) <= 2.0:
                raise ValueError(f"{name} must be between -2 and 2, got {getattr(self, name)}")
        if not 0.0 < self.repetition_penalty <= MAX_REPETITION_PENALTY:
            raise ValueError(
                f"repetition_penalty must be above 0 and at most {MAX_REPETITION_PENALTY:g}, got {self.repetition_penalty}"
            )
        for name, most in (("logit_bias", MAX_LOGIT_BIAS), ("stop_token_ids", MAX_STOP_TOKEN_IDS)):
            if len(getattr(self, name)) > most:
                raise ValueError(f"{name} must have at most {most} tokens, got {len(getattr(self, name))}")
        for token, bias in self.logit_bias:
            if not -100.0 <= bias <= 100.0:
                raise ValueError(f"logit_bias must be between -100 and 100, got {bias} for token {token}")
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            if count is not None and not 0 <= count <= MAX_LOGPROBS:
                raise ValueError(f"{name} must be between 0 and {MAX_LOGPROBS}, got {count}")

    @property
    def greedy(self) -> bool:
        """Whether no noise is used."""
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        """Whether what was said before changes the distribution."""
        return self.frequency_penalty != 0.0 or self.presence_penalty != 0.0 or self.repetition_penalty != 1.0


def choice_seed(seed: int, index: int) -> int:
    """The seed of choice ``index`` of a request: the request's own for the first, SplitMix64 of it for the others."""
    if index == 0:
        return seed
    z = (seed + index * 0x9E3779B97F4A7C15) % MAX_SEED
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % MAX_SEED
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % MAX_SEED
    return z ^ (z >> 31)
