"""A judged step on its way to the host."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice

import numpy as np
from torch import Tensor

from engine.decode.logprobs import Logprobs
from engine.download import Download
from engine.input_batch import HostColumns
from engine.messages import TokenLogprobs
from engine.step import IntArray, StepPlan, StepResult


class PendingResult:
    """A judged step that the host has not read yet. ``read`` waits for the device.

    ``packed`` [N, 4 + K]: emitted, verified, held and committed counts of each request, then its tokens; None for a step of
    prefill chunks alone. It may have more rows than the plan has requests. ``logprobs`` are those of all verifying rows of the
    requests that want them, ``prompt_logprobs`` of all prompt targets, in the plan's order.
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
        self._plan, self._errors = plan, errors or {}
        self._packed = None if packed is None else Download(packed)
        self._logprobs, self._prompt_logprobs = (
            None if part is None else Download(*part) for part in (logprobs, prompt_logprobs)
        )
        # Whose they are: a slot may have another request when the step is read.
        self._wants_logprobs = np.flatnonzero(host.num_logprobs_S[plan.slots] >= 0).tolist()

    def wait(self) -> None:
        """Wait for the device; ``read`` does, too."""
        for download in (self._packed, self._logprobs, self._prompt_logprobs):
            if download is not None:
                download.wait()

    def read(self) -> StepResult:
        """The result as plain data."""
        plan = self._plan
        if self._packed is None:
            nothing = np.tile(np.array([[0, 0, 1, 0]]), (len(plan.slots), 1))
            return StepResult(plan.step_id, nothing, np.zeros((len(plan.slots), 0), dtype=np.int64))
        packed: IntArray = self._packed.read()[0].numpy()[: len(plan.slots)]
        counts, tokens = packed[:, :4], packed[:, 4:]
        return StepResult(plan.step_id, counts, tokens, self._verifying(counts), self._of_prompts(), self._errors)

    def _verifying(self, counts: IntArray) -> dict[int, tuple[TokenLogprobs, ...]]:
        if self._logprobs is None:
            return {}
        entries = Logprobs(*self._logprobs.read()).rows()
        verified = {i: tuple(islice(entries, int(self._plan.num_drafts[i]))) for i in self._wants_logprobs}
        return {i: of_request[: int(counts[i, 0])] for i, of_request in verified.items()}

    def _of_prompts(self) -> dict[int, tuple[TokenLogprobs, ...]]:
        if self._prompt_logprobs is None:
            return {}
        entries = Logprobs(*self._prompt_logprobs.read()).rows()
        return {i: tuple(islice(entries, count)) for i, count in enumerate(self._plan.num_prompt_targets.tolist()) if count}
