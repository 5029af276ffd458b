"""The plain messages between the server and the engine. They pickle, hold no tensors and no live objects."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from engine.sampling_params import DecodingMode, SamplingParams


class FinishReason(enum.Enum):
    """Why the engine ended a request. A stop string is found by the server, which then aborts."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Thinking:
    """Where thinking ends, so that a grammar can begin there.

    ``end`` is the token id that closes it. ``begin`` is the one that may open it as the first token of the output, None
    where the model does not do that. ``is_open``: the prompt has opened it.
    """

    end: int
    begin: int | None = None
    is_open: bool = False


@dataclass(frozen=True, slots=True)
class GrammarSpec:
    """What the output must match, as text that llguidance compiles; from its first token on, or from the end of thinking."""

    source: str
    thinking: Thinking | None = None


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One choice to generate. ``arrival`` is ``time.monotonic()`` at the server.

    With a ``grammar``, EOS ends the request whatever ``ignore_eos`` says: nothing may follow what is complete.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    decoding: DecodingMode = DecodingMode.AUTO
    cache_salt: str = ""
    arrival: float = 0.0
    grammar: GrammarSpec | None = None


@dataclass(frozen=True, slots=True)
class AbortRequest:
    """Stop a request within one step. Unknown ids are ignored: the request may just have finished."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Shutdown:
    """End the engine process at once; the server drains before it sends this."""


@dataclass(frozen=True, slots=True)
class SpeculationStats:
    """What drafting did for one request. A step with ``n > 1`` drafts is one draft of ``n - 1`` draft tokens.

    ``num_forwards`` counts the forwards that emitted tokens, the one that gave the first token included.
    """

    num_forwards: int = 0
    num_spec_steps: int = 0
    num_draft_tokens: int = 0
    num_accepted_draft_tokens: int = 0

    def tokens_per_forward(self, completion_tokens: int) -> float | None:
        """``(completion_tokens - 1) / forwards after the first token``; None before there was one."""
        forwards = self.num_forwards - 1
        return (completion_tokens - 1) / forwards if forwards > 0 else None


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural logarithms of the model's own probabilities at one position, before any processing.

    ``rank`` is 1 for the likeliest token. ``top`` are the likeliest ``(token id, logprob)`` pairs, in order; the token itself
    may or may not be among them.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class RequestTimes:
    """Seconds on the engine's monotonic clock; the differences are what metrics observe."""

    arrival: float
    scheduled: float
    first_token: float
    finished: float


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """What one step gave one request. After ``finish_reason`` nothing follows.

    ``stop_token_id`` is the EOS or stop id that ended the request; it is the last of ``token_ids``. ``error`` is a message
    for the client, set with ``FinishReason.ERROR`` only. ``speculation`` is the request's total so far: the server may end
    it at a stop string at any time. ``times`` come with the last output. ``logprobs``, where asked for, has an entry for each
    of ``token_ids``; ``prompt_logprobs`` those of the next prompt tokens in order, the second token's being the first, all of
    them before the first of ``token_ids``.
    """

    request_id: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    error: str | None = None
    num_cached_tokens: int = 0
    speculation: SpeculationStats = SpeculationStats()
    times: RequestTimes | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Gauges of the moment and counters since the engine started, read at scrape time.

    ``host_seconds`` are those of scheduling steps and of their results, ``launch_seconds`` those of putting them on the device,
    which without a GPU are the steps themselves; the rest of ``step_seconds`` the host waits. ``launches``, where steps are
    captured, are how many were replayed, and how many were not, by the reason.
    ``plan`` is the one that ``auto`` follows now, empty where ``auto`` means a fixed plan; ``plan_goodput`` are the tokens per
    second that every plan was expected to give when it was chosen.
    """

    num_running: int = 0
    num_waiting: int = 0
    kv_cache_usage: float = 0.0
    num_steps: int = 0
    num_preemptions: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    accepted_per_position: tuple[int, ...] = ()
    prefill_rows: int = 0
    draft_rows: int = 0
    mask_rows: int = 0
    branch_hits: int = 0
    branch_misses: int = 0
    forwards: int = 0
    step_seconds: float = 0.0
    host_seconds: float = 0.0
    launch_seconds: float = 0.0
    launches: tuple[tuple[str, int], ...] = ()
    plan: str = ""
    plan_goodput: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class TokenColumns:
    """What a step gave the N requests that gained tokens and nothing else: hundreds of them as a few arrays.

    ``counts`` [N] of ``token_ids`` are each request's, one request after the other; ``speculation`` [N, 4] has the fields of
    ``SpeculationStats``, each request's total so far.
    """

    request_ids: tuple[str, ...]
    counts: NDArray[np.int64]
    token_ids: NDArray[np.int64]
    speculation: NDArray[np.int64]

    def rows(self) -> Iterator[tuple[str, list[int], list[int]]]:
        """Of each request: its id, its tokens, and the numbers of its speculation."""
        token_ids, end = self.token_ids.tolist(), 0
        for name, count, speculation in zip(self.request_ids, self.counts.tolist(), self.speculation.tolist(), strict=True):
            yield name, token_ids[end : end + count], speculation
            end += count


NO_TOKENS = TokenColumns((), np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, 4), np.int64))
"""Of a step in which nobody gained tokens alone."""


@dataclass(frozen=True, slots=True, eq=False)
class StepOutputs:
    """Everything one engine step has to say, about each request once.

    ``others`` are the outputs that have more to tell than ``tokens``: the first of a request, its last, log-probabilities,
    errors.
    """

    stats: EngineStats
    others: tuple[RequestOutput, ...] = ()
    tokens: TokenColumns = NO_TOKENS

    @property
    def is_empty(self) -> bool:
        """Whether no request is spoken of."""
        return not self.others and not self.tokens.request_ids

    @property
    def outputs(self) -> tuple[RequestOutput, ...]:
        """All of it request by request."""
        rows = self.tokens.rows()
        plain = (RequestOutput(name, tuple(ids), speculation=SpeculationStats(*counts)) for name, ids, counts in rows)
        return (*self.others, *plain)


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """Sampling of requests that do not say, from the checkpoint's ``generation_config.json``."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What the server needs to know of the loaded model and its resolved configuration.

    ``default_mode`` is what ``auto`` means in a request.
    """

    architecture: str
    num_parameters: int
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    block_length: int | None
    mask_token_id: int | None
    supported_modes: tuple[DecodingMode, ...]
    default_mode: DecodingMode
    num_pages: int
    page_size: int
    dtype: str
    device: str
    sampling_defaults: SamplingDefaults = SamplingDefaults()
    settings: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EngineReady:
    """The engine has loaded its model and takes requests."""

    info: EngineInfo


@dataclass(frozen=True, slots=True)
class EngineFailed:
    """The engine cannot start or go on; ``message`` is one clear line that says what to do."""

    message: str


@dataclass(frozen=True, slots=True)
class Progress:
    """A start-up step for the terminal, such as ``loading weights``."""

    message: str
