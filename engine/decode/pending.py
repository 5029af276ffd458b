"""A judged step on its way to the host."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from engine.decode.logprobs import Logprobs
from engine.input_batch import HostColumns
from engine.messages import TokenLogprobs
from engine.step import IntArray, StepPlan, StepResult


class PendingResult:
    """A judged step that the host has not read yet. ``read`` waits for the device.

    ``packed`` [N, 4 + K]: emitted, verified, held and committed counts of each request, then its tokens; None for a step of
    prefill chunks alone. ``logprobs`` are those of all verifying rows of the requests that want them, ``prompt_logprobs`` of
    all prompt targets, in the plan's order.
    """

    def __init__(
        self,
        plan: StepPlan,
        host: HostColumns,
        packed: Tensor | None,
        logprobs: Logprobs | None = None,
        prompt_logprobs: Logprobs | None = None,
        errors: Mapping[int, str] | None = None,
    ) -> None:
        self._plan, self._event, self._errors = plan, None, errors or {}
        self._packed: Tensor | None = None
        self._logprobs, self._prompt_logprobs = logprobs, prompt_logprobs
        # Whose they are: a slot may have another request when the step is read.
        self._wants_logprobs = np.flatnonzero(host.num_logprobs_S[plan.slots] >= 0).tolist() if logprobs else []
        if packed is not None:
            # A copy: what a captured step has written is written over by its next replay.
            self._packed = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=packed.is_cuda)
            self._packed.copy_(packed, non_blocking=True)
            if packed.is_cuda:
                self._event = torch.cuda.current_stream(packed.device).record_event()

    def read(self) -> StepResult:
        """The result as plain data."""
        if self._event is not None:
            self._event.synchronize()
        plan = self._plan
        if self._packed is None:
            nothing = np.tile(np.array([[0, 0, 1, 0]]), (len(plan.slots), 1))
            return StepResult(plan.step_id, nothing, np.zeros((len(plan.slots), 0), dtype=np.int64))
        packed: IntArray = self._packed.numpy()[: len(plan.slots)]
        counts, tokens = packed[:, :4], packed[:, 4:]
        return StepResult(plan.step_id, counts, tokens, self._verifying(counts), self._of_prompts(), self._errors)

    def _verifying(self, counts: IntArray) -> dict[int, tuple[TokenLogprobs, ...]]:
        if self._logprobs is None:
            return {}
        entries = self._logprobs.read()
        verified = {i: tuple(islice(entries, int(self._plan.num_drafts[i]))) for i in self._wants_logprobs}
        return {i: of_request[: int(counts[i, 0])] for i, of_request in verified.items()}

    def _of_prompts(self) -> dict[int, tuple[TokenLogprobs, ...]]:
        if self._prompt_logprobs is None:
            return {}
        entries: Iterator[TokenLogprobs] = self._prompt_logprobs.read()
        return {i: tuple(islice(entries, count)) for i, count in enumerate(self._plan.num_prompt_targets.tolist()) if count}
