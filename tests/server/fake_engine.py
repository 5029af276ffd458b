"""An engine that says what a test wrote down, step by step, and remembers what it was asked."""

from __future__ import annotations

import asyncio
import enum
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from engine import (
    DecodingMode,
    EngineDeadError,
    EngineInfo,
    EngineStats,
    FinishReason,
    GenerateRequest,
    QueueFullError,
    RequestOutput,
    RequestTimes,
    SpeculationStats,
    TokenLogprobs,
)

EOS = 4
MASK = 7


class End(enum.Enum):
    """What happens after the last scripted step."""

    EOS = "eos"
    HANG = "hang"
    DIE = "die"
    ERROR = "error"


@dataclass(frozen=True)
class Script:
    """The steps of one request, and what follows them: with ``End.EOS`` an EOS step."""

    steps: Sequence[Sequence[int]] = ()
    end: End = End.EOS
    cached_tokens: int = 0


def tidar_info(**changes: object) -> EngineInfo:
    values: dict[str, object] = {
        "architecture": "Qwen3ForCausalLM",
        "num_parameters": 1000,
        "vocab_size": 400,
        "max_model_len": 256,
        "eos_token_ids": (EOS,),
        "block_length": 8,
        "mask_token_id": MASK,
        "supported_modes": tuple(DecodingMode),
        "default_mode": DecodingMode.TIDAR,
        "num_pages": 16,
        "page_size": 64,
        "dtype": "float32",
        "device": "cpu",
    }
    return EngineInfo(**{**values, **changes})  # type: ignore[arg-type]


def fake_logprobs(token_id: int, place: int, count: int) -> TokenLogprobs:
    """Numbers that tell the token, its place and how many alternatives were asked for; the token is the second likeliest."""
    logprob = -float(place) - token_id / 1000
    top = ((token_id + 1, logprob / 2), (token_id, logprob), *((8 + i, logprob - 1 - i) for i in range(max(count - 2, 0))))
    return TokenLogprobs(token_id, logprob, 2, top[:count])


@dataclass
class FakeEngine:
    """Implements ``engine.Engine``. ``script`` answers a request; ``capacity`` bounds how many may run at once."""

    script: Callable[[GenerateRequest], Script] = lambda request: Script()
    info: EngineInfo = field(default_factory=tidar_info)
    capacity: int = 1000
    is_alive: bool = True
    heartbeat_age: float = 0.0
    snapshot: EngineStats = field(default_factory=EngineStats)
    requests: list[GenerateRequest] = field(default_factory=list)
    running: set[str] = field(default_factory=set)
    aborted: list[str] = field(default_factory=list)
    is_shut_down: bool = False

    def __post_init__(self) -> None:
        self.changed = asyncio.Condition()
        self._closed = asyncio.Event()
        self._death: str | None = None

    def stats(self) -> EngineStats:
        return self.snapshot

    def generate(self, request: GenerateRequest) -> AsyncIterator[RequestOutput]:
        if not self.is_alive:
            raise EngineDeadError("the engine process was killed by SIGKILL")
        if len(self.running) >= self.capacity:
            raise QueueFullError("everybody waits")
        assert request.request_id not in {r.request_id for r in self.requests}, "ids must not be used twice"
        self.requests.append(request)
        self.running.add(request.request_id)
        return _Outputs(self, request, self.script(request))

    async def start(self) -> None:
        pass

    async def shutdown(self) -> None:
        self.is_shut_down = True
        self._closed.set()

    async def wait_closed(self) -> str | None:
        await self._closed.wait()
        return self._death

    def die(self, message: str = "the engine process was killed by SIGKILL") -> None:
        self.is_alive, self._death = False, message
        self._closed.set()

    async def until(self, condition: Callable[[FakeEngine], bool]) -> None:
        """Wait until a request began or ended in a way that makes ``condition`` true."""
        async with asyncio.timeout(10), self.changed:
            await self.changed.wait_for(lambda: condition(self))

    async def notify(self) -> None:
        async with self.changed:
            self.changed.notify_all()


class _Outputs(AsyncIterator[RequestOutput]):
    def __init__(self, engine: FakeEngine, request: GenerateRequest, script: Script) -> None:
        self._engine, self._request, self._script = engine, request, script
        self._steps = [tuple(step) for step in script.steps]
        if script.end is End.EOS:
            self._steps.append((EOS,))
        self._begun = time.monotonic()
        self._emitted = self._forwards = 0
        count = request.sampling.prompt_logprobs
        self._prompt_logprobs = [
            fake_logprobs(token_id, place, count)
            for place, token_id in enumerate(request.prompt_token_ids[1:], start=1)
            if count is not None
        ]
        self._done = False

    async def __anext__(self) -> RequestOutput:
        if self._done:
            raise StopAsyncIteration
        await self._engine.notify()
        if not self._engine.is_alive:
            return await self._die()
        if len(self._prompt_logprobs) > 3:  # a chunk of the prompt
            chunk, self._prompt_logprobs = self._prompt_logprobs[:3], self._prompt_logprobs[3:]
            return RequestOutput(self._request.request_id, (), prompt_logprobs=tuple(chunk))
        if not self._steps:
            return await self._after_last_step()
        return await self._step(self._steps.pop(0))

    async def aclose(self) -> None:
        if not self._done:
            self._done = True
            self._engine.aborted.append(self._request.request_id)
            await self._leave()

    async def _leave(self) -> None:
        self._done = True
        self._engine.running.discard(self._request.request_id)
        await self._engine.notify()

    async def _die(self) -> RequestOutput:
        await self._leave()
        raise EngineDeadError("the engine process was killed by SIGKILL")

    async def _after_last_step(self) -> RequestOutput:
        match self._script.end:
            case End.HANG:
                await self._engine._closed.wait()
                return await self._die()
            case End.DIE:
                return await self._die()
        await self._leave()
        return RequestOutput(self._request.request_id, (), FinishReason.ERROR, error="the engine refuses this")

    async def _step(self, step: tuple[int, ...]) -> RequestOutput:
        sampling = self._request.sampling
        stops = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else set(self._engine.info.eos_token_ids))
        kept: list[int] = []
        reason: FinishReason | None = None
        for token_id in step:
            kept.append(token_id)
            self._emitted += 1
            if token_id in stops:
                reason = FinishReason.STOP
            elif self._emitted == sampling.max_tokens:
                reason = FinishReason.LENGTH
            if reason:
                break
        self._forwards += 1
        first, count = self._emitted - len(kept), sampling.logprobs
        logprobs = [fake_logprobs(i, first + j, count) for j, i in enumerate(kept) if count is not None]
        prompt_logprobs, self._prompt_logprobs = tuple(self._prompt_logprobs), []
        if reason:
            await self._leave()
        now = time.monotonic()
        return RequestOutput(
            self._request.request_id,
            tuple(kept),
            reason,
            stop_token_id=kept[-1] if reason is FinishReason.STOP else None,
            num_cached_tokens=self._script.cached_tokens,
            speculation=SpeculationStats(self._forwards, 2, 10, 5),
            times=RequestTimes(self._request.arrival, self._begun, self._begun, now) if reason else None,
            logprobs=tuple(logprobs),
            prompt_logprobs=prompt_logprobs,
        )
