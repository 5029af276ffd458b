"""Host time of a step: ``schedule`` and ``apply`` at many running requests, with the model replaced by a stub.

Prints microseconds per step for each mode, and ends with one line of JSON. No GPU is needed: this is the work that a GPU waits
for, or that a loop depth of 1 hides behind the step before.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from pathlib import Path

from benchmarks.report import finish, table
from engine.config import DecodeConfig, SchedulerConfig
from engine.decode.policy import policies
from engine.kv_cache_manager import KVCacheManager
from engine.messages import GenerateRequest
from engine.page_pool import PagePool
from engine.sampling_params import DecodingMode, SamplingParams
from engine.scheduler import Scheduler
from engine.step import RequestResult, StepPlan, StepResult

MAX_MODEL_LEN, PAGE_SIZE, BLOCK_LENGTH = 16_384, 64, 16


def make_scheduler(num_requests: int, mode: DecodingMode, prompt_tokens: int) -> Scheduler:
    """A scheduler with this many requests that decode, and pages for all of them to the end."""
    limits = SchedulerConfig(max_num_seqs=num_requests, max_num_batched_tokens=64 * num_requests)
    pages = 1 + num_requests * (MAX_MODEL_LEN // PAGE_SIZE)
    plans = policies(DecodeConfig(mode, None, 1), BLOCK_LENGTH, limits.max_num_batched_tokens)
    scheduler = Scheduler(limits, KVCacheManager(PagePool(pages), PAGE_SIZE), plans, (0,), MAX_MODEL_LEN)
    rng = random.Random(0)
    for i in range(num_requests):
        prompt = tuple(rng.randrange(1, 1000) for _ in range(prompt_tokens))
        sampling = SamplingParams(MAX_MODEL_LEN - prompt_tokens)
        scheduler.add(GenerateRequest(str(i), prompt, sampling, mode))
    return scheduler


def judge(plan: StepPlan, rng: random.Random) -> StepResult:
    """What a device could answer: some of the drafts accepted, and mostly a branch hit."""
    results = []
    for _, drafts, branches, block_length, *_ in plan.shapes.tolist():
        emitted = rng.randint(1, drafts) if drafts else 0
        held = block_length if branches and rng.random() < 0.8 else 1
        results.append(RequestResult(tuple(range(1, emitted + 1)), drafts, held, emitted))
    return StepResult.of(plan.step_id, results)


def measure(scheduler: Scheduler, num_steps: int) -> tuple[list[float], list[float]]:
    """Seconds of ``schedule`` and of ``apply`` in steps whose requests all decode."""
    rng, schedule_seconds, apply_seconds = random.Random(1), [], []
    while len(schedule_seconds) < num_steps:
        begun = time.perf_counter()
        plan = scheduler.schedule()
        scheduled = time.perf_counter()
        assert plan is not None, "nobody is left"
        result = judge(plan, rng)
        judged = time.perf_counter()
        scheduler.apply(plan, result)
        applied = time.perf_counter()
        if not plan.num_prefill.any():
            schedule_seconds.append(scheduled - begun)
            apply_seconds.append(applied - judged)
    return schedule_seconds, apply_seconds


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows, results = [], {}
    for mode in (DecodingMode.AR, DecodingMode.LINEAR, DecodingMode.TIDAR):
        parts = measure(make_scheduler(arguments.requests, mode, 65), arguments.steps)
        schedule, apply = (statistics.median(seconds) * 1e6 for seconds in parts)
        rows.append((mode.value, f"{schedule:.0f}", f"{apply:.0f}", f"{schedule + apply:.0f}"))
        results[mode.value] = {"schedule_us": schedule, "apply_us": apply}
    print(table(("mode", "schedule, us", "apply, us", "together, us"), rows))
    finish("scheduler_host", {"requests": arguments.requests, **results}, arguments.out)


if __name__ == "__main__":
    main()
