"""How many KV pages there are: on a GPU what weights and the largest step leave, on a CPU a share of what is free.

A GPU's memory holds, in this order: weights, whatever else is there already, what the largest step needs beside its inputs and
outputs (twice where steps are captured, whose pool is their own), and pages. The largest step is not computed but run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from engine.config import CacheConfig, ConfigError, SchedulerConfig
from engine.decode.pending import PendingResult
from engine.decode.tidar import TidarDecoder
from engine.sampling_params import DecodingMode, SamplingParams
from engine.step import NO_DRAFTS, Admission, DraftPlan, ScheduledRequest, StepPlan

GIB = 2**30
CPU_BYTES = 2 * GIB
"""Pages on a CPU take no more than this, unless a number is asked for or one request needs more."""

CPU_SHARE = 0.5
"""Of the memory that is free on a CPU, what pages may take unless a number is asked for: a guess at what steps leave."""

Launch = Callable[[StepPlan], PendingResult]
"""Puts a step on the device."""


class DeviceMemory(Protocol):
    """What a device says of its memory, in bytes."""

    @property
    def total(self) -> int:
        """All there is."""
        ...

    def free(self) -> int:
        """What nobody holds now."""
        ...

    def peak(self, run: Callable[[], None]) -> int:
        """The most that ``run`` held at once beyond what it leaves behind."""
        ...


class CudaMemory:
    """A GPU's memory, as the driver and torch's allocator know it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @property
    def total(self) -> int:
        return torch.cuda.mem_get_info(self.device)[1]

    def free(self) -> int:
        torch.cuda.synchronize(self.device)
        # Blocks that the allocator keeps for later count as free.
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)[0]

    def peak(self, run: Callable[[], None]) -> int:
        torch.cuda.reset_peak_memory_stats(self.device)
        run()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - torch.cuda.memory_allocated(self.device)


@dataclass(frozen=True, slots=True)
class PageNeeds:
    """Bytes of a page of so many tokens, the longest request in tokens and in pages, and the pages that are asked for."""

    page_size: int
    page_bytes: int
    max_model_len: int
    wanted: int | None

    @staticmethod
    def of(cache: CacheConfig, page_bytes: int, max_model_len: int) -> PageNeeds:
        """From the configuration."""
        return PageNeeds(cache.page_size, page_bytes, max_model_len, cache.num_pages)

    @property
    def per_sequence(self) -> int:
        """Pages of the longest request."""
        return -(-self.max_model_len // self.page_size)

    def size_of(self, num_pages: int) -> str:
        """What so many pages take, in words."""
        each, total = self.page_bytes / 2**20, num_pages * self.page_bytes / GIB
        return f"{num_pages} KV pages of {self.page_size} tokens ({each:.2f} MiB each) take {total:.2f} GiB"


@dataclass(frozen=True, slots=True)
class GpuBudget:
    """Bytes: all memory, the share that may be used, what is held before there are pages, and what the largest step needs."""

    total: int
    utilization: float
    held: int
    activations: int
    max_rows: int

    @property
    def for_pages(self) -> int:
        """What is left; negative where already too much is held."""
        return int(self.total * self.utilization) - self.held - self.activations

    def __str__(self) -> str:
        total, usable = self.total / GIB, self.total * self.utilization / GIB
        return (
            f"of {total:.2f} GiB, gpu_memory_utilization {self.utilization:g} gives {usable:.2f}; weights and what else is "
            f"there hold {self.held / GIB:.2f}, a step of {self.max_rows} rows needs {self.activations / GIB:.2f}"
        )


def measure_budget(
    memory: DeviceMemory, utilization: float, run_largest_step: Callable[[], None], max_rows: int, has_graphs: bool
) -> GpuBudget:
    """Run the largest step and see what it needs. Raises ConfigError when it does not fit beside the weights."""
    before = memory.free()
    try:
        activations = memory.peak(run_largest_step)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"a step of max_num_batched_tokens {max_rows} rows does not fit into the {before / GIB:.2f} GiB that the weights "
            "leave: lower --max-num-batched-tokens or --max-num-seqs, or use --quantization fp8"
        ) from error
    held = memory.total - memory.free()
    return GpuBudget(memory.total, utilization, held, activations * (1 + has_graphs), max_rows)


def pages_on_gpu(needs: PageNeeds, budget: GpuBudget) -> int:
    """Pages to allocate, the null page included. Raises ConfigError, with the numbers, when they do not fit or suffice."""
    affordable = max(0, budget.for_pages) // needs.page_bytes
    remedies = "raise --gpu-memory-utilization, lower --max-num-batched-tokens or use --quantization fp8"
    if needs.wanted is not None and needs.wanted > affordable:
        size = needs.wanted * needs.page_bytes / GIB
        raise ConfigError(
            f"{needs.wanted} KV pages take {size:.2f} GiB, but there is room for {affordable}: {budget}. Ways out: lower "
            f"--num-pages to {affordable}, {remedies}"
        )
    num_pages = affordable if needs.wanted is None else needs.wanted
    if num_pages - 1 < needs.per_sequence:
        raise ConfigError(f"{_too_few(needs, num_pages)}: {budget}. Ways out: {_shorter(needs, num_pages)}{remedies}")
    return num_pages


def pages_on_cpu(needs: PageNeeds, limits: SchedulerConfig, available: int) -> int:
    """Pages to allocate, the null page included: room for as many full-length requests as fit, and as can run at once.

    ``available`` bytes are free: a number that is asked for may take all of them, any other a share. Raises ConfigError, with
    the numbers, when pages do not fit or suffice.
    """
    room, free = available // needs.page_bytes, f"{available / GIB:.2f} GiB of memory are free"
    if needs.wanted is None:
        most = max(needs.per_sequence, CPU_BYTES // needs.page_bytes)
        num_pages = min(1 + min(limits.max_num_seqs * needs.per_sequence, most), int(room * CPU_SHARE))
        shorter = _shorter(needs, num_pages)
        remedy = f"{free}, and pages take {CPU_SHARE:.0%} of it. Ways out: {shorter}free some, or set --num-pages"
    else:
        num_pages, remedy = needs.wanted, "lower --max-model-len or raise --num-pages"
    if num_pages > room:
        if room - 1 >= needs.per_sequence:
            left_out = " or leave it out" if int(room * CPU_SHARE) - 1 >= needs.per_sequence else ""
            way_out = f"lower --num-pages to {room}{left_out}"
        else:
            length = (room - 1) * needs.page_size
            way_out = f"lower --max-model-len to {length} and --num-pages to {room}" if room > 1 else "free some"
        raise ConfigError(f"{needs.size_of(num_pages)}, but {free}. Ways out: {way_out}")
    if num_pages - 1 < needs.per_sequence:
        raise ConfigError(f"{_too_few(needs, num_pages)}: {remedy}")
    return num_pages


def _too_few(needs: PageNeeds, num_pages: int) -> str:
    return (
        f"the KV cache has room for {max(0, num_pages - 1)} pages of {needs.page_size} tokens "
        f"({needs.page_bytes / 2**20:.2f} MiB each), but one request of max_model_len {needs.max_model_len} needs "
        f"{needs.per_sequence}"
    )


def _shorter(needs: PageNeeds, num_pages: int) -> str:
    """One of the ways out, where a shorter request would fit into so many pages."""
    most = max(0, num_pages - 1) * needs.page_size
    return f"lower --max-model-len to {most}, " if most else ""


def largest_steps(plans: Sequence[DraftPlan], max_num_seqs: int, max_rows: int, max_model_len: int) -> Iterator[StepPlan]:
    """The steps that may need most: one in which every row has logits to be processed, and one of a whole prompt.

    Their requests do not exist: their K/V goes to the null page.
    """
    fitting = [plan for plan in plans if plan.num_rows <= max_rows] or [DraftPlan(1, 0, 1)]
    counts = {plan: min(max_num_seqs, max_rows // plan.num_rows) for plan in fitting}
    plan = max(fitting, key=lambda plan: counts[plan] * plan.num_rows)
    n, context = counts[plan], max(1, max_model_len // counts[plan] - plan.num_rows)
    everything = SamplingParams(
        1 << 20, temperature=1.0, top_k=2, top_p=0.5, min_p=0.1, min_tokens=1, repetition_penalty=1.1, logprobs=20
    )
    yield StepPlan.of(0, [ScheduledRequest(i, (), plan, context) for i in range(n)], _admissions(n, context, everything))
    length = min(max_rows, max_model_len)
    prompt = SamplingParams(1, prompt_logprobs=20)
    rows = ScheduledRequest(0, (0,) * length, NO_DRAFTS, max_model_len - length, prompt_targets=(0,) * length)
    yield StepPlan.of(0, [rows], _admissions(1, max_model_len - length, prompt))


def _admissions(count: int, context: int, sampling: SamplingParams) -> list[Admission]:
    return [Admission(slot, context, (0,), (), DecodingMode.TIDAR, sampling) for slot in range(count)]


def run_steps(launch: Launch, decoder: TidarDecoder, steps: Iterator[StepPlan]) -> None:
    """Run steps of an engine that serves nobody yet. Its slots are written; a later admission resets them."""
    for step in steps:
        num_drafts = int(step.shapes[:, 1].max())
        decoder.admit(step)
        decoder.batch.num_held_S[: len(step.slots)] = max(1, num_drafts)
        launch(StepPlan.of(1, step.requests())).read()
    decoder.survival.reset()
