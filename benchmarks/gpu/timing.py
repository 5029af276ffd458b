"""How long the device takes: CUDA events around replays, or a plain clock where there is no GPU.

What a step launches is recorded first (``engine.cuda_graphs``), because that is how it runs when it counts: no launch from the
host shows in a time. A dry run has a recorder that runs the operations again; its times mean nothing.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from engine.cuda_graphs import Capture, CudaCapture

MIN_REPEATS, MAX_REPEATS = 10, 80
ENOUGH_MS = 40.0
"""Repeats add up to about this long."""

AHEAD_CYCLES = 20_000_000
"""How long the device is kept busy, about 10 ms, while the host queues the repeats: so it never waits for a launch."""

Result = TypeVar("Result")


def nothing() -> None:
    """Of repeats that need no preparation."""


class Timer(Protocol):
    """Milliseconds that the device takes."""

    def __call__(self, run: Callable[[], object], before: Callable[[], object] = nothing) -> float:
        """Median over repeats of ``run``; ``before`` prepares each of them and is not counted."""
        ...


class CudaTimer:
    """Events on the current stream."""

    def __call__(self, run: Callable[[], object], before: Callable[[], object] = nothing) -> float:
        once = self._measure(run, before, 3)[-1]
        repeats = max(MIN_REPEATS, min(MAX_REPEATS, int(ENOUGH_MS / max(once, 1e-3))))
        self._measure(run, before, repeats)  # pinned memory for as many results under way is made the first time
        return statistics.median(self._measure(run, before, repeats))

    def _measure(self, run: Callable[[], object], before: Callable[[], object], repeats: int) -> list[float]:
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        torch.cuda._sleep(AHEAD_CYCLES)
        kept = []  # results hold pinned memory, which must not go round while copies to it are under way
        for start, end in pairs:
            before()
            start.record()
            kept.append(run())
            end.record()
        torch.cuda.synchronize()
        return [float(start.elapsed_time(end)) for start, end in pairs]


class HostTimer:
    """A clock around one run, for dry runs."""

    def __call__(self, run: Callable[[], object], before: Callable[[], object] = nothing) -> float:
        before()
        begun = time.perf_counter()
        run()
        return 1000 * (time.perf_counter() - begun)


class Rerun:
    """The recorder of a dry run: runs again, and copies the results to where a graph would have them."""

    def __call__(self, run: Callable[[], Result]) -> tuple[Result, Callable[[], None]]:
        first = run()

        def replay() -> None:
            for old, new in zip(_tensors(first), _tensors(run()), strict=True):
                old.copy_(new)

        return first, replay


def _tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    if dataclasses.is_dataclass(result):
        return [t for field in dataclasses.fields(result) for t in _tensors(getattr(result, field.name))]
    return [t for part in result for t in _tensors(part)] if isinstance(result, tuple | list) else []


class MeteredCapture:
    """A recorder that counts its graphs, and the bytes by which free memory fell meanwhile: what graphs and their pool take."""

    def __init__(self, device: torch.device, capture: Capture) -> None:
        self._device, self._capture = device, capture
        self.num_graphs, self.num_bytes = 0, 0

    def __call__(self, run: Callable[[], Result]) -> tuple[Result, Callable[[], None]]:
        before = self._free()
        recorded = self._capture(run)
        self.num_graphs += 1
        self.num_bytes += before - self._free()
        return recorded

    @property
    def figures(self) -> dict[str, int]:
        """As cells have them."""
        return {"graphs": self.num_graphs, "graph_bytes": self.num_bytes}

    def _free(self) -> int:
        return int(torch.cuda.mem_get_info(self._device)[0]) if self._device.type == "cuda" else 0


def recorder(device: torch.device) -> Capture:
    """What records on a device."""
    return CudaCapture(device) if device.type == "cuda" else Rerun()


def timer(device: torch.device) -> Timer:
    """What times on a device."""
    return CudaTimer() if device.type == "cuda" else HostTimer()


def kernel_ms(capture: Capture, timer: Timer, run: Callable[[int], object], calls: int) -> float:
    """Milliseconds of one call among ``calls`` different ones in one graph.

    ``run(i)`` should use another weight or cache for every ``i``, as layers do, so that none is found in the L2 cache.
    """

    def run_all() -> None:
        for i in range(calls):
            run(i)

    _, replay = capture(run_all)
    return timer(replay) / calls
