"""Requests in the whole engine loop, and what the loop did while all of them were decoding."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

from torch.profiler import ProfilerActivity, profile

from engine.core import EngineCore
from engine.messages import EngineStats, GenerateRequest
from engine.sampling_params import DecodingMode, SamplingParams

STAGGER = 256
"""Prompts differ in length by up to this much, so that requests are not in step with each other."""


@dataclass(frozen=True, slots=True)
class Window:
    """What happened between two moments: seconds on the wall, and differences of the engine's counters."""

    seconds: float
    stats: dict[str, float]
    plan: str

    @property
    def tokens_per_second(self) -> float:
        """Of all requests together."""
        return self.stats["generation_tokens"] / self.seconds

    @property
    def tokens_per_forward(self) -> float:
        """Tokens that a request gets from a step."""
        return self.stats["generation_tokens"] / max(1.0, self.stats["forwards"])

    def per_step_ms(self) -> dict[str, float]:
        """Every time that the engine keeps, in milliseconds a step."""
        steps = max(1.0, self.stats["num_steps"])
        times = {f"{name.removesuffix('_seconds')}_ms": 1000 * value / steps for name, value in self.stats.items()
                 if name.endswith("_seconds")}  # fmt: skip
        return times | {"wall_ms": 1000 * self.seconds / steps}


def together(windows: Sequence[Window]) -> Window:
    """Several windows as one."""
    names = windows[0].stats
    totals = {name: sum(w.stats[name] for w in windows) for name in names}
    return Window(sum(w.seconds for w in windows), totals, windows[-1].plan)


def make_requests(
    count: int, prompt_tokens: int, max_tokens: int, mode: DecodingMode, seed: int, stagger: int = STAGGER
) -> list[GenerateRequest]:
    """Requests with random prompts; the same seed makes the same prompts again, so that their prefixes are found."""
    rng = random.Random(seed)
    made = []
    for i in range(count):
        length = max(1, prompt_tokens - (i * 37) % max(1, min(stagger, prompt_tokens)))
        prompt = tuple(rng.randrange(1, 60) for _ in range(length))
        sampling = SamplingParams(max_tokens, seed=1000 * seed + i, temperature=0.0, ignore_eos=True)
        made.append(GenerateRequest(f"{seed}-{i}", prompt, sampling, mode, arrival=time.monotonic()))
    return made


def decode_window(
    core: EngineCore,
    requests: Sequence[GenerateRequest],
    warm_up_steps: int,
    tokens_each: int,
    max_seconds: float,
    watch: Callable[[EngineCore], None] = lambda core: None,
) -> Window:
    """Run requests until all of them decode and have warmed up; then measure until each has ``tokens_each`` more on average.

    ``watch`` may step on behind that, before the requests are dropped.
    """
    for request in requests:
        core.add(request)
    waiting = {request.request_id for request in requests}
    while waiting:
        waiting -= {output.request_id for output in core.step().outputs if output.token_ids}
    for _ in range(warm_up_steps):
        core.step()
    before, begun = core.scheduler.stats(), time.perf_counter()
    wanted = before.generation_tokens + tokens_each * len(requests)
    while (after := core.scheduler.stats()).generation_tokens < wanted and time.perf_counter() - begun < max_seconds:
        core.step()
    seconds = time.perf_counter() - begun
    watch(core)
    for request in requests:
        core.abort(request.request_id)
    drain(core)
    return Window(seconds, _difference(before, after), after.plan)


def drain(core: EngineCore) -> int:
    """Step until nothing is left; the number of tokens that came."""
    before = core.scheduler.stats().generation_tokens
    while core.has_work:
        core.step()
    return core.scheduler.stats().generation_tokens - before


def device_ms(core: EngineCore, num_steps: int, on_gpu: bool) -> float:
    """Milliseconds a step in which a kernel runs on the device (on a CPU: an operation); the rest of a step it is idle."""
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    time_of = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    with profile(activities=[activity]) as profiler:
        for _ in range(num_steps):
            core.step()
    return float(sum(getattr(event, time_of) for event in profiler.key_averages())) / 1000 / num_steps


def _difference(before: EngineStats, after: EngineStats) -> dict[str, float]:
    names = [f.name for f in fields(EngineStats) if isinstance(getattr(after, f.name), int | float)]
    return {name: float(getattr(after, name) - getattr(before, name)) for name in names}
