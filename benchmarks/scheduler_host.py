"""Host time of a step: ``schedule`` and ``apply`` at many running requests, with the model replaced by a stub.

Prints microseconds per step for each mode, and ends with one line of JSON. No GPU is needed: this is the work that a GPU waits
for, or that a loop depth of 1 hides behind the step before.

Times are those of the processor, not of the clock, so that other programs on the machine count for little. They still push
this one out of the caches: the lower quartile is what a quiet core takes, and the median is told beside it.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from pathlib import Path

import numpy as np

from benchmarks.report import finish, table
from engine.config import DecodeConfig, SchedulerConfig
from engine.cuda_graphs import ALL_NEEDS
from engine.decode.auto import GoodputPolicy
from engine.decode.costs import CostTable
from engine.decode.goodput import Execution
from engine.decode.policy import Drafting, policies
from engine.kv_cache_manager import KVCacheManager
from engine.messages import GenerateRequest
from engine.page_pool import PagePool
from engine.sampling_params import DecodingMode, SamplingParams
from engine.scheduler import Scheduler
from engine.step import StepPlan, StepResult
from engine.step_sizes import StepSizes
from engine.warm_up import plans_of

MAX_MODEL_LEN, PAGE_SIZE, BLOCK_LENGTH = 16_384, 64, 16
TARGET_US = 300

FREE_ROWS = CostTable((1,), ((1, 100_000),), ((1.0, 1.0),))
"""Rows that cost nothing, so that ``auto`` drafts and learns all the time."""


def make_scheduler(num_requests: int, mode: DecodingMode, prompt_tokens: int) -> Scheduler:
    """A scheduler with this many requests that decode, and pages for all of them to the end."""
    limits = SchedulerConfig(max_num_seqs=num_requests, max_num_batched_tokens=512 * num_requests)
    pages = 1 + num_requests * (MAX_MODEL_LEN // PAGE_SIZE)
    plans = policies(DecodeConfig(mode, None, 1), BLOCK_LENGTH, limits.max_num_batched_tokens)
    drafting, sizes = Drafting(BLOCK_LENGTH, 1), StepSizes(num_requests)
    for plan in plans_of([drafting], is_auto=True):
        sizes.add(sizes.size_of(num_requests, plan), ALL_NEEDS.level)
    plans[DecodingMode.AUTO] = GoodputPolicy(drafting, FREE_ROWS, Execution(sizes))
    kv = KVCacheManager(PagePool(pages), PAGE_SIZE, num_requests)
    scheduler = Scheduler(limits, kv, plans, (0,), MAX_MODEL_LEN)
    rng = random.Random(0)
    for i in range(num_requests):
        # Of different lengths, or all would begin a page in the same step.
        prompt = tuple(rng.randrange(1, 1000) for _ in range(prompt_tokens + i % PAGE_SIZE))
        sampling = SamplingParams(MAX_MODEL_LEN - len(prompt))
        scheduler.add(GenerateRequest(f"chatcmpl-{rng.getrandbits(96):024x}-{i}", prompt, sampling, mode))
    return scheduler


def judge(plan: StepPlan, rng: np.random.Generator) -> StepResult:
    """What a device could answer: any number of the drafts accepted, and mostly a branch hit."""
    drafts, blocks = plan.num_drafts, plan.shapes[:, 3]
    emitted = np.where(drafts > 0, rng.integers(1, np.maximum(drafts, 1), endpoint=True), 0)
    held = np.where((plan.num_branches > 0) & (rng.random(len(drafts)) < 0.8), blocks, 1)
    tokens = rng.integers(1, 1000, (len(drafts), max(1, int(drafts.max()))))
    return StepResult(plan.step_id, np.stack((emitted, drafts, held, emitted), axis=1), tokens)


def measure(scheduler: Scheduler, num_steps: int) -> tuple[list[int], list[int]]:
    """Nanoseconds of ``schedule`` and of ``apply`` in steps whose requests all decode."""
    rng = np.random.default_rng(1)
    schedule_ns: list[int] = []
    apply_ns: list[int] = []
    while len(schedule_ns) < num_steps:
        begun = time.thread_time_ns()
        plan = scheduler.schedule()
        scheduled = time.thread_time_ns()
        assert plan is not None, "nobody is left"
        result = judge(plan, rng)
        judged = time.thread_time_ns()
        scheduler.apply(plan, result)
        applied = time.thread_time_ns()
        if not plan.num_prefill.any():
            schedule_ns.append(scheduled - begun)
            apply_ns.append(applied - judged)
    return schedule_ns, apply_ns


def lower_quartile(nanoseconds: list[int]) -> float:
    """In microseconds."""
    return statistics.quantiles(nanoseconds, n=4)[0] / 1e3


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows, results = [], {}
    for mode in (DecodingMode.AR, DecodingMode.LINEAR, DecodingMode.TIDAR, DecodingMode.AUTO):
        schedule_ns, apply_ns = measure(make_scheduler(arguments.requests, mode, PAGE_SIZE), arguments.steps)
        both_ns = [one + other for one, other in zip(schedule_ns, apply_ns, strict=True)]
        schedule, apply, both = (lower_quartile(ns) for ns in (schedule_ns, apply_ns, both_ns))
        median = statistics.median(both_ns) / 1e3
        rows.append((mode.value, f"{schedule:.0f}", f"{apply:.0f}", f"{both:.0f}", f"{median:.0f}"))
        results[mode.value] = {"schedule_us": schedule, "apply_us": apply, "together_us": both, "together_median_us": median}
    print(table(("mode", "schedule, us", "apply, us", "together, us", "median, us"), rows))
    print(f"{arguments.requests} requests; the target is {TARGET_US} us together")
    finish("scheduler_host", {"requests": arguments.requests, **results}, arguments.out)


if __name__ == "__main__":
    main()
