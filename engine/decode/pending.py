"""A judged step on its way to the host."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor

from engine.decode.logprobs import Logprobs
from engine.step import RequestResult, StepPlan, StepResult


class PendingResult:
    """A judged step that the host has not read yet. ``read`` waits for the device.

    ``packed`` [N, 4 + K]: emitted, verified, held and committed counts of each request, then its tokens. ``logprobs`` are
    those of all verifying rows of the requests that want them, ``prompt_logprobs`` of all prompt targets, in the plan's order.
    """

    def __init__(
        self,
        plan: StepPlan,
        packed: Tensor | None,
        logprobs: Logprobs | None = None,
        prompt_logprobs: Logprobs | None = None,
        errors: Sequence[str | None] = (),
    ) -> None:
        self._plan, self._event = plan, None
        self._packed, self._logprobs, self._prompt_logprobs, self._errors = packed, logprobs, prompt_logprobs, errors
        if packed is not None and packed.is_cuda:
            self._packed = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
            self._packed.copy_(packed, non_blocking=True)
            self._event = torch.cuda.current_stream(packed.device).record_event()

    def read(self) -> StepResult:
        """The result as plain data."""
        if self._event is not None:
            self._event.synchronize()
        requests = self._plan.requests
        if self._packed is None:
            nothing = RequestResult((), 0, 1, 0)
            return StepResult(self._plan.step_id, (nothing,) * len(requests))
        logprobs = self._logprobs.read() if self._logprobs else iter(())
        prompt_logprobs = self._prompt_logprobs.read() if self._prompt_logprobs else iter(())
        results = []
        for share, row, error in zip(requests, self._packed.tolist(), self._errors, strict=True):
            emitted, verified, held, committed = row[:4]
            verifying = tuple(islice(logprobs, share.draft_plan.num_drafts)) if share.wants_logprobs else ()
            results.append(
                RequestResult(
                    token_ids=tuple(row[4 : 4 + emitted]),
                    num_drafts=verified,
                    num_held=held,
                    num_committed=committed,
                    logprobs=verifying[:emitted],
                    prompt_logprobs=tuple(islice(prompt_logprobs, len(share.prompt_targets))),
                    error=error,
                )
            )
        return StepResult(self._plan.step_id, tuple(results))
