"""Steps that are recorded once and replayed: layout, forward and verdict of a decode step in one CUDA graph.

A graph has fixed shapes and fixed addresses. So a captured step has a *uniform* layout, and a plan is replayed in the smallest
one that covers it (``engine/step_sizes.py``): what the host says of it (slots and bounds) is copied into the step's one input,
requests that are missing are the null slot, which wants nothing, and rows beyond a bound are padding as they are in any step.
Everything else is device state, written by the verdict of the step before: one replay ends with the input of the next, and the
host need not read in between.

Steps in which the host has a part run without a graph: prefill chunks, grammars, log-probabilities, diffusion. So do those
that no captured step covers, or only one that is much larger: nothing is captured while requests run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from engine.decode.inputs import StepBounds, bounds_of
from engine.decode.layout import StepLayout, build_layout
from engine.decode.pending import PendingResult
from engine.decode.tidar import TidarDecoder, Verdict
from engine.input_batch import SamplingNeeds
from engine.model_runner import ModelRunner
from engine.step import DraftPlan, IntArray, RequestShape, StepPlan
from engine.step_sizes import StepSize, StepSizes
from engine.upload import upload

GREEDY = SamplingNeeds()
SAMPLED = SamplingNeeds(noise=True)
TRUNCATED = dataclasses.replace(SAMPLED, top_k=True, top_p=True, min_p=True)
ALL_NEEDS = dataclasses.replace(TRUNCATED, penalties=True, bias=True, min_tokens=True)
LEVELS = (GREEDY, SAMPLED, TRUNCATED, ALL_NEEDS)
"""A step is captured with one of these, each of which does the work of those before it, too: what a request does not ask for
has no effect on it."""

Result = TypeVar("Result")


class Capture(Protocol):
    """Records device operations."""

    def __call__(self, run: Callable[[], Result]) -> tuple[Result, Callable[[], None]]:
        """Record ``run``; return its tensors, and what computes them anew, in place."""
        ...


class CudaCapture:
    """``torch.cuda.CUDAGraph``. One step runs at a time, so that all graphs share one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self._stream, self._pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Result]) -> tuple[Result, Callable[[], None]]:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            run()  # what is compiled, tuned or allocated once must not be so during the capture
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            result = run()
        return result, graph.replay


@dataclass(frozen=True, slots=True)
class CapturedStep:
    """A recorded step: its input on the device, [3, N], and its output.

    ``layout`` is kept because the replay reads its tensors where they are.
    """

    layout: StepLayout
    bounds_3N: Tensor
    verdict: Verdict
    replay: Callable[[], None]


class StepGraphs:
    """Captures steps of one engine and replays them."""

    def __init__(self, decoder: TidarDecoder, runner: ModelRunner, capture: Capture, max_prefix: int) -> None:
        self._decoder, self._runner, self._capture, self._max_prefix = decoder, runner, capture, max_prefix
        self.sizes = StepSizes(decoder.batch.num_slots)
        self._captured: dict[tuple[StepSize, int], CapturedStep] = {}
        self.num_replays = 0

    @property
    def num_captured(self) -> int:
        """Graphs at hand."""
        return len(self._captured)

    def prepare(self, num_requests: int, plans: Iterable[DraftPlan], needs: SamplingNeeds = GREEDY) -> None:
        """Capture the steps that serve ``num_requests`` requests with these plans, before they are needed."""
        level = _level(needs)
        for plan in plans:
            size = self.sizes.add(num_requests, plan)
            if (size, level) not in self._captured:
                self._captured[size, level] = self._record(size, level)

    def launch(self, plan: StepPlan) -> PendingResult | None:
        """Replay the step of a plan that was admitted. None, and nothing was done, where no captured step can do it."""
        host = self._decoder.batch.host
        if plan.num_prefill.any() or host.has_diffusion(plan.slots) or (host.num_logprobs_S[plan.slots] >= 0).any():
            return None
        size = self.sizes.find(plan.shapes[:, 1:5])
        if size is None or self._decoder.grammars.constrained(plan):
            return None
        levels = range(_level(host.needs(plan.slots)), len(LEVELS))
        step = next((step for level in levels if (step := self._captured.get((size, level)))), None)
        if step is None:
            return None
        bounds = self._no_bounds(size)
        bounds[:, : len(plan.slots)] = bounds_of(plan)
        step.bounds_3N.copy_(upload(bounds, step.bounds_3N.device), non_blocking=True)
        step.replay()
        self.num_replays += 1
        return PendingResult(plan, host, step.verdict.packed)

    def _record(self, size: StepSize, level: int) -> CapturedStep:
        decoder, batch, needs = self._decoder, self._decoder.batch, LEVELS[level]
        if needs == ALL_NEEDS:
            batch.make_tables()
        shape = RequestShape(0, size.num_drafts, size.num_branches, size.block_length, size.has_anchor)
        layout = build_layout(np.array([shape] * size.num_requests), decoder.first_masks, batch.device)
        bounds_3N = upload(self._no_bounds(size), batch.device)
        no_prefill = torch.zeros(0, dtype=torch.long, device=batch.device)
        max_prefix = (self._max_prefix,) * size.num_requests

        def run() -> Verdict:
            inputs = decoder.rows.rows(layout, StepBounds.of(bounds_3N), no_prefill, max_prefix, needs)
            logits = self._runner.execute(inputs)
            assert logits is not None, "every request of a captured step has a draft"
            return decoder.verify(inputs, logits)

        verdict, replay = self._capture(run)
        return CapturedStep(layout, bounds_3N, verdict, replay)

    def _no_bounds(self, size: StepSize) -> IntArray:
        """The input of a step of nobody but the null slot."""
        bounds = np.zeros((3, size.num_requests), dtype=np.int64)
        bounds[0] = self._decoder.batch.null_slot
        return bounds


def _level(needs: SamplingNeeds) -> int:
    """The first of ``LEVELS`` that does what these needs ask for."""
    if needs.penalties or needs.bias or needs.min_tokens:
        return 3
    if needs.top_k or needs.top_p or needs.min_p:
        return 2
    return int(needs.noise)
