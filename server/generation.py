"""One client request in the engine: its choices side by side, their outputs turned into text, their aborts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from engine import (
    Engine,
    EngineInfo,
    FinishReason,
    GenerateRequest,
    Outputs,
    RequestOutput,
    SpeculationStats,
    TokenLogprobs,
)
from server.detokenizer import Detokenizer, StopTable
from server.errors import ApiError, internal, invalid
from server.metrics import FinishedChoice, ServerMetrics
from server.planning import ChoicePlan, GenerationPlan
from server.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Delta:
    """What a choice gained since it was last asked. ``completion_tokens`` counts from the choice's beginning.

    ``logprobs``, where asked for, has an entry for each of ``token_ids``; ``prompt_logprobs`` come before the first of them.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    completion_tokens: int
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


class Choice:
    """The state of one choice. What it gains is merged until somebody takes it, so a slow reader holds one delta."""

    def __init__(self, index: int, plan: ChoicePlan, detokenizer: Detokenizer, eos_token_ids: Sequence[int]) -> None:
        self.index = index
        self.plan = plan
        self.completion_tokens = 0
        self.num_cached_tokens = 0
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self.speculation = SpeculationStats()
        self._eos_token_ids = frozenset() if plan.sampling.ignore_eos else frozenset(eos_token_ids)
        self._detokenizer = detokenizer
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._prompt_logprobs: list[TokenLogprobs] = []
        self._end_is_taken = False

    def add(self, output: RequestOutput) -> None:
        """Take an output. A stop string inside it finishes the choice, and what follows it is dropped."""
        self.num_cached_tokens = max(self.num_cached_tokens, output.num_cached_tokens)
        self._prompt_logprobs.extend(output.prompt_logprobs)
        if self.plan.is_prompt_only:
            if output.finish_reason is not None:
                self._finish("length")
            return
        if output.token_ids:
            self.speculation = output.speculation
        has_stop_token = output.stop_token_id is not None
        # A stop token ends the text and is no part of it.
        text_ids = output.token_ids[:-1] if has_stop_token else output.token_ids
        piece = self._detokenizer.append(text_ids)
        self._texts.append(piece.text)
        if piece.stop is not None:
            self._take_tokens(output.token_ids[: piece.num_tokens], output.logprobs)
            self._finish("stop", piece.stop)
            return
        self._take_tokens(output.token_ids, output.logprobs)
        if output.finish_reason is None:
            return
        tail = self._detokenizer.finish()
        self._texts.append(tail.text)
        if tail.stop is not None:
            self._finish("stop", tail.stop)
        elif output.finish_reason is FinishReason.STOP:
            self._finish("stop", None if output.stop_token_id in self._eos_token_ids else output.stop_token_id)
        else:
            self._finish(output.finish_reason.value)

    def take(self) -> Delta | None:
        """The gain since the last call; None when there is none."""
        is_end = self.finish_reason is not None and not self._end_is_taken
        if not (is_end or self._token_ids or self._prompt_logprobs or any(self._texts)):
            return None
        delta = Delta(
            index=self.index,
            text="".join(self._texts),
            token_ids=tuple(self._token_ids),
            completion_tokens=self.completion_tokens,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            logprobs=tuple(self._logprobs),
            prompt_logprobs=tuple(self._prompt_logprobs),
        )
        for gained in (self._texts, self._token_ids, self._logprobs, self._prompt_logprobs):
            gained.clear()
        self._end_is_taken = is_end
        return delta

    def _take_tokens(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> None:
        self._token_ids.extend(token_ids)
        self._logprobs.extend(logprobs[: len(token_ids)])
        self.completion_tokens += len(token_ids)

    def _finish(self, reason: str, stop_reason: str | int | None = None) -> None:
        self.finish_reason, self.stop_reason = reason, stop_reason


class Generation:
    """The running choices of one request. ``wait`` then ``take``, until ``is_finished``; always ``close``."""

    def __init__(
        self, plan: GenerationPlan, engine: Engine, tokenizer: Tokenizer, metrics: ServerMetrics, response_id: str
    ) -> None:
        self.plan = plan
        self.response_id = response_id
        self._engine = engine
        self._metrics = metrics
        info: EngineInfo = engine.info
        stops, skipped_ids = StopTable(plan.stop), _skipped_ids(plan, tokenizer)
        self.choices = tuple(
            Choice(
                index,
                choice,
                Detokenizer(tokenizer, stops, skipped_ids=skipped_ids),
                info.eos_token_ids,
            )
            for index, choice in enumerate(plan.choices)
        )
        self._arrival = time.monotonic()
        self._outputs: list[Outputs] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._error: Exception | None = None
        self._changed = asyncio.Event()

    @property
    def num_unfinished(self) -> int:
        """Choices that the engine still works on."""
        return sum(choice.finish_reason is None for choice in self.choices)

    @property
    def is_finished(self) -> bool:
        """Whether every choice has ended by itself."""
        return not self.num_unfinished

    async def start(self) -> None:
        """Queue all choices or none. Raises QueueFullError or EngineDeadError."""
        try:
            for choice in self.choices:
                self._outputs.append(self._engine.generate(self._request(choice)))
        except BaseException:
            await self.close()
            raise
        for choice, outputs in zip(self.choices, self._outputs, strict=True):
            self._tasks.append(asyncio.create_task(self._pump(choice, outputs)))

    async def wait(self) -> None:
        """Wait until there is something to take."""
        await self._changed.wait()

    def take(self) -> list[Delta]:
        """What the choices gained since the last call: everything, once ``is_finished``.

        Raises what ended the request, after what had come before was taken.
        """
        self._changed.clear()
        deltas = [delta for choice in self.choices if (delta := choice.take()) is not None]
        if self._error is not None and not self.is_finished:
            if not deltas:
                raise self._error
            self._changed.set()
        return deltas

    def fail(self, error: Exception) -> None:
        """End the request with ``error``; the first one counts."""
        self._error = self._error or error
        self._changed.set()

    async def close(self) -> None:
        """Abort what still runs. Idempotent."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        # A task that is cancelled before its first step never gets to close what it was to read.
        for outputs in self._outputs:
            await outputs.aclose()
        self._tasks.clear()
        self._outputs.clear()

    def _request(self, choice: Choice) -> GenerateRequest:
        return GenerateRequest(
            request_id=f"{self.response_id}-{choice.index}",
            prompt_token_ids=choice.plan.prompt_token_ids,
            sampling=choice.plan.sampling,
            decoding=self.plan.decoding,
            cache_salt=self.plan.cache_salt,
            arrival=self._arrival,
            grammar=self.plan.grammar,
        )

    async def _pump(self, choice: Choice, outputs: Outputs) -> None:
        clock = _ChoiceClock(self._metrics, self._arrival)
        last: RequestOutput | None = None
        reason = "abort"
        try:
            async for output in outputs:
                last = output
                _raise_failure(output)
                clock.tick(len(output.token_ids))
                choice.add(output)
                self._changed.set()
                if choice.finish_reason is not None:
                    reason = choice.finish_reason
                    return
            raise internal()  # the engine promises a finish reason
        except Exception as error:
            reason = "error"
            self.fail(error)
        finally:
            await outputs.aclose()
            clock.finish(choice, reason, last)


def _skipped_ids(plan: GenerationPlan, tokenizer: Tokenizer) -> frozenset[int]:
    """The special tokens that are no part of the text."""
    if not plan.skip_special_tokens:
        return frozenset()
    return tokenizer.special_ids - {tokenizer.id_of(token) for token in plan.kept_tokens}


def _raise_failure(output: RequestOutput) -> None:
    if output.finish_reason is FinishReason.ERROR:
        raise invalid(output.error or "the engine refused the request", code="request_rejected")
    if output.finish_reason is FinishReason.ABORT:
        raise ApiError(500, "the engine aborted the request", code="aborted", type="server_error")


class _ChoiceClock:
    """Observes the times of one choice as they pass, on the server's side of the engine."""

    def __init__(self, metrics: ServerMetrics, arrival: float) -> None:
        self._metrics = metrics
        self._arrival = arrival
        self._first: float | None = None
        self._latest = arrival

    def tick(self, num_tokens: int) -> None:
        """An output with ``num_tokens`` tokens came."""
        if not num_tokens:
            return
        now = time.monotonic()
        if self._first is None:
            self._first = now
            self._metrics.observe_first_token(now - self._arrival)
        else:
            self._metrics.observe_step(now - self._latest, num_tokens)
        self._latest = now

    def finish(self, choice: Choice, reason: str, last: RequestOutput | None) -> None:
        """The choice ended, by itself or not."""
        now = time.monotonic()
        self._metrics.observe_finish(
            FinishedChoice(
                reason=reason,
                prompt_tokens=len(choice.plan.prompt_token_ids),
                completion_tokens=choice.completion_tokens,
                seconds=now - self._arrival,
                decode_seconds=None if self._first is None else self._latest - self._first,
                times=last.times if last else None,
                tokens_per_forward=choice.speculation.tokens_per_forward(choice.completion_tokens),
            )
        )


async def collect(generation: Generation) -> list[list[Delta]]:
    """Run to the end: the deltas of each choice. Raises what ended the request; does not close."""
    deltas: list[list[Delta]] = [[] for _ in generation.choices]
    await generation.start()
    while not generation.is_finished:
        await generation.wait()
        for delta in generation.take():
            deltas[delta.index].append(delta)
    return deltas
