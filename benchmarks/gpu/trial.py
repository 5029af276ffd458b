"""One way to run an operation: checked against what it must compute, then timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.record import Cell

MOST_DIFFERENCE = 0.02
"""Of the norms of numbers, and the share of integers that differ: several roundings of bfloat16, less than a lost block."""


def nothing_to_see() -> Cell:
    """Of runs that have no compiled kernel to look at."""
    return {}


@dataclass(frozen=True, slots=True)
class Run:
    """``call(i)`` is one call, of ``calls`` different ones that are timed together; ``inspect`` compiles it and tells what is
    known of it then, or raises ValueError where that says enough.
    """

    call: Callable[[int], Tensor | Sequence[Tensor]]
    calls: int
    inspect: Callable[[], Cell] = nothing_to_see


def tensors(result: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """What a call returns, as a list."""
    return [result] if isinstance(result, Tensor) else [*result]


def difference(out: Tensor, expected: Tensor) -> float:
    """How far a result is from what is expected, relative to its size; NaN where the result has a NaN."""
    if not out.is_floating_point():
        return float((out != expected).float().mean())
    expected = expected.float()
    return float((out.float() - expected).norm() / expected.norm().clamp(min=1e-30))


def measure(bench: Bench, run: Run, expected: Sequence[Tensor]) -> Cell:
    """Microseconds of a call. Raises ValueError where its first one does not compute what is expected."""
    found = run.inspect()
    given = tensors(run.call(0))
    worst = max((difference(a, b) for a, b in zip(given, expected, strict=True)), key=lambda d: (d != d, d))
    if not worst <= MOST_DIFFERENCE:
        raise ValueError(f"differs from what is expected by {worst:.1%}")
    return found | {"difference": worst, "us": 1000 * bench.kernel_ms(run.call, run.calls)}
