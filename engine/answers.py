"""What a judged step has to say: columns for the many requests that gained tokens, messages for the few with more to tell."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from engine.judged import JudgedStep
from engine.messages import FinishReason, RequestOutput, RequestTimes, TokenColumns, TokenLogprobs
from engine.request import Request
from engine.request_table import RequestTable
from engine.step import BoolArray, StepResult
from engine.stopping import Emitted


@dataclass(frozen=True, slots=True)
class Answers:
    """The outputs of a step, and the requests that it ends."""

    others: list[RequestOutput]
    tokens: TokenColumns
    finished: list[Request]


@dataclass(frozen=True, slots=True)
class _Gain:
    """What one request gained: its tokens, why they are the last ones, if so, and log-probabilities."""

    token_ids: tuple[int, ...]
    reason: FinishReason | None
    logprobs: tuple[TokenLogprobs, ...]
    prompt_logprobs: tuple[TokenLogprobs, ...]


class AnswerWriter:
    """Turns judged steps into outputs, once the table has their tokens."""

    def __init__(self, table: RequestTable) -> None:
        self._table = table

    def write(self, step: JudgedStep, result: StepResult, emitted: Emitted, is_first_N: BoolArray) -> Answers:
        """``is_first`` marks requests that had emitted nothing before."""
        logprobs, prompt_logprobs = step.by_row(result.logprobs), step.by_row(result.prompt_logprobs)
        errors = step.by_row(result.errors)
        has_tokens_N = emitted.counts_N > 0
        is_rare_N = has_tokens_N & (is_first_N | emitted.is_stopped_N | emitted.is_last_N)
        for row in (*logprobs, *prompt_logprobs, *errors):
            is_rare_N[row] = True
        others, finished = [], []
        for row in np.flatnonzero(is_rare_N).tolist():
            request = self._table.requests[step.slots_N[row]]
            assert request is not None, "a request that left is answered"
            reason = FinishReason.ERROR if row in errors else _reason(emitted, row)
            if reason is not None:
                finished.append(request)
            if row in errors:
                others.append(error_output(request.request_id, errors[row]))
                continue
            of_prompt = _unsent(request, prompt_logprobs.get(row, ()), int(step.max_computed_N[row]))
            gain = _Gain(emitted.of(row), reason, logprobs.get(row, ()), of_prompt)
            if gain.token_ids or gain.prompt_logprobs:
                others.append(self._output(request, gain))
        return Answers(others, self._columns(step, emitted, has_tokens_N & ~is_rare_N), finished)

    def _columns(self, step: JudgedStep, emitted: Emitted, rows_N: BoolArray) -> TokenColumns:
        slots_N, counts_N, token_ids, names = step.slots_N, emitted.counts_N, emitted.token_ids, self._table.request_ids
        if not rows_N.all():
            slots_N, counts_N, token_ids = slots_N[rows_N], counts_N[rows_N], token_ids[np.repeat(rows_N, counts_N)]
        request_ids = tuple([names[slot] for slot in slots_N.tolist()])
        return TokenColumns(request_ids, counts_N, token_ids, self._table.speculation_S4.T.take(slots_N, axis=1).T)

    def _output(self, request: Request, gain: _Gain) -> RequestOutput:
        now, sampling = time.monotonic(), request.message.sampling
        if gain.token_ids:
            request.first_token_at = request.first_token_at or now
        times = None
        if gain.reason is not None:
            times = RequestTimes(request.message.arrival, request.scheduled_at, request.first_token_at, now)
        return RequestOutput(
            request.request_id,
            gain.token_ids,
            gain.reason,
            stop_token_id=gain.token_ids[-1] if gain.reason is FinishReason.STOP else None,
            num_cached_tokens=request.num_cached_tokens,
            speculation=self._table.speculation_of(request.slot),
            times=times,
            logprobs=_cut(gain.logprobs[: len(gain.token_ids)], sampling.logprobs),
            prompt_logprobs=_cut(gain.prompt_logprobs, sampling.prompt_logprobs),
        )


def error_output(request_id: str, problem: str) -> RequestOutput:
    """The last output of a request that cannot be served."""
    return RequestOutput(request_id, (), FinishReason.ERROR, error=problem)


def _reason(emitted: Emitted, row: int) -> FinishReason | None:
    if emitted.is_stopped_N[row]:
        return FinishReason.STOP
    return FinishReason.LENGTH if emitted.is_last_N[row] else None


def _unsent(request: Request, prompt_logprobs: tuple[TokenLogprobs, ...], start: int) -> tuple[TokenLogprobs, ...]:
    """Those behind position ``start`` that were not sent before; a preempted request computes some of them again."""
    new = prompt_logprobs[max(0, request.num_prompt_logprobs - start) :]
    request.num_prompt_logprobs += len(new)
    return new


def _cut(logprobs: Sequence[TokenLogprobs], num_top: int | None) -> tuple[TokenLogprobs, ...]:
    """What one request asked for, of rows that were computed for the most demanding one of their step."""
    return () if num_top is None else tuple(replace(p, top=p.top[:num_top]) for p in logprobs)
