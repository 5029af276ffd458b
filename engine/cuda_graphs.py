"""Steps that are recorded once and replayed: layout, forward and verdict of a decode step in one CUDA graph.

A graph has fixed shapes and fixed addresses. So a captured step has a *uniform* layout, and a plan is replayed in the smallest
one that covers it (``engine/step_sizes.py``): what the host says of it (slots and bounds) is copied into the step's one input,
requests that are missing are the null slot, which wants nothing, and rows beyond a bound are padding as they are in any step.
Everything else is device state, written by the verdict of the step before: one replay ends with the input of the next, and the
host need not read in between.

Log-probabilities are computed behind a replayed step, from the logits that it leaves. Other steps in which the host has a part
run without a graph: prefill chunks, grammars, diffusion. So do those that no captured step covers, or only one that is much
larger: nothing is captured while requests run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from engine.decode.inputs import bounds_of
from engine.decode.layout import build_layout
from engine.decode.logprobs import verified_logprobs
from engine.decode.pending import PendingResult
from engine.decode.tidar import TidarDecoder
from engine.input_batch import SamplingNeeds
from engine.model_runner import ModelRunner
from engine.step import DraftPlan, IntArray, RequestShape, StepPlan
from engine.step_sizes import StepSize, StepSizes
from engine.upload import upload
from kernels.step_rows.metadata import StepLayout

GREEDY = SamplingNeeds()
SAMPLED = SamplingNeeds(noise=True)
TRUNCATED = replace(SAMPLED, top_k=True, top_p=True, min_p=True)
ALL_NEEDS = replace(TRUNCATED, penalties=True, bias=True, min_tokens=True)
LEVELS = (GREEDY, SAMPLED, TRUNCATED, ALL_NEEDS)
"""A step is captured with one of these, by ``SamplingNeeds.level``. Each does the work of those before it, too: what a request
does not ask for has no effect on it."""

REPLAYED = "replayed"

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
class StepTensors:
    """What a captured step leaves: ``packed`` as ``PendingResult`` has it, the tokens after every draft, and the raw logits."""

    packed: Tensor
    sampled_ND: Tensor
    logits_QV: Tensor


@dataclass(frozen=True, slots=True)
class CapturedStep:
    """A recorded step: its input on the device, [3, N], and its output, whose logits are borrowed.

    ``layout`` is kept because the replay reads its tensors where they are.
    """

    layout: StepLayout
    bounds_3N: Tensor
    output: StepTensors
    replay: Callable[[], None]


class StepGraphs:
    """Captures steps of one engine and replays them.

    ``launches`` counts the plans that were to be launched: ``REPLAYED``, or why they have to run operation by operation.
    """

    def __init__(self, decoder: TidarDecoder, runner: ModelRunner, capture: Capture, max_prefix: int) -> None:
        self._decoder, self._runner, self._capture, self._max_prefix = decoder, runner, capture, max_prefix
        self.sizes = StepSizes(decoder.batch.num_slots)
        self._captured: dict[tuple[StepSize, int], CapturedStep] = {}
        self.launches = Counter[str]()

    @property
    def num_captured(self) -> int:
        """Graphs at hand."""
        return len(self._captured)

    @property
    def num_replays(self) -> int:
        """Steps that were replayed."""
        return self.launches[REPLAYED]

    def prepare(self, num_requests: int, plans: Iterable[DraftPlan], needs: SamplingNeeds = GREEDY) -> None:
        """Capture the steps that serve ``num_requests`` requests with these plans, before they are needed."""
        level = needs.level
        for plan in plans:
            size = self.sizes.size_of(num_requests, plan)
            if (size, level) not in self._captured:
                self._captured[size, level] = self._record(size, level)
                self.sizes.add(size, level)

    def launch(self, plan: StepPlan) -> PendingResult | None:
        """Replay the step of a plan that was admitted. None, and nothing was done, where no captured step can do it."""
        step = self._find(plan)
        if isinstance(step, str):
            self.launches[step] += 1
            return None
        self.launches[REPLAYED] += 1
        host, size = self._decoder.batch.host, step.bounds_3N.shape[1]
        bounds = self._no_bounds(size)
        bounds[:, : len(plan.slots)] = bounds_of(plan)
        step.bounds_3N.copy_(upload(bounds, step.bounds_3N.device), non_blocking=True)
        step.replay()
        output = step.output
        logprobs = verified_logprobs(host, plan, step.layout, output.logits_QV, output.sampled_ND)
        return PendingResult(plan, host, output.packed, logprobs)

    def _find(self, plan: StepPlan) -> CapturedStep | str:
        """The captured step for a plan, or why there is none, in a word."""
        host, plans_N4 = self._decoder.batch.host, plan.shapes[:, 1:5]
        if plan.num_prefill.any():
            return "prefill"
        if host.has_diffusion(plan.slots):
            return "diffusion"
        if self._decoder.grammars.constrained(plan):
            return "grammar"
        level = host.needs(plan.slots).level
        size = self.sizes.find(plans_N4, level)
        if size is not None:
            return next(step for at in range(level, len(LEVELS)) if (step := self._captured.get((size, at))))
        if self.sizes.find(plans_N4) is not None:
            return "options"
        return "size" if self.sizes.covering(plans_N4) is None else "padding"

    def _record(self, size: StepSize, level: int) -> CapturedStep:
        decoder, batch, needs = self._decoder, self._decoder.batch, LEVELS[level]
        if needs == ALL_NEEDS:
            batch.make_counts()
        plan = size.plan
        shape = RequestShape(0, plan.num_drafts, plan.num_branches, plan.block_length, plan.has_anchor)
        layout = build_layout(np.array([shape] * size.num_requests), decoder.first_masks, batch.device)
        bounds_3N = upload(self._no_bounds(size.num_requests), batch.device)
        no_prefill = torch.zeros(0, dtype=torch.long, device=batch.device)
        max_prefix = (self._max_prefix,) * size.num_requests

        def run() -> StepTensors:
            inputs = decoder.rows.build(layout, bounds_3N, no_prefill, max_prefix, needs)
            logits = self._runner.execute(inputs)
            assert logits is not None, "every request of a captured step has a draft"
            verdict = decoder.verify(inputs, logits)
            return StepTensors(verdict.packed, verdict.sampled_ND, logits)

        output, replay = self._capture(run)
        return CapturedStep(layout, bounds_3N, replace(output, logits_QV=borrow(output.logits_QV)), replay)

    def _no_bounds(self, num_requests: int) -> IntArray:
        """The input of a step of nobody but the null slot."""
        bounds = np.zeros((3, num_requests), dtype=np.int64)
        bounds[0] = self._decoder.batch.null_slot
        return bounds


class _Memory:
    """A tensor's place for ``torch.as_tensor``, as integers, since the protocol does not know bfloat16."""

    def __init__(self, tensor: Tensor) -> None:
        self.__cuda_array_interface__ = {
            "version": 2,
            "shape": tuple(tensor.shape),
            "typestr": f"<i{tensor.element_size()}",
            "data": (tensor.data_ptr(), False),
        }


def borrow(tensor: Tensor) -> Tensor:
    """The memory of a captured step's tensor without a claim to it, so that every other captured step may use it, too.

    The pool stays as long as its graphs do, and what the step left there until another one is replayed. With claims, the logits
    of all captured steps would lie side by side.
    """
    if not tensor.is_cuda:
        return tensor
    assert tensor.is_contiguous()
    return torch.as_tensor(_Memory(tensor), device=tensor.device).view(tensor.dtype)
