"""All sections, the most important first."""

from benchmarks.gpu.sections import (
    attention,
    checks,
    checks_all,
    elementwise,
    fp8,
    gemm,
    invariant,
    machine,
    peers,
    profile,
    sampling,
    start,
    step,
    streams,
    throughput,
    tune,
    yardsticks,
)
from benchmarks.gpu.sections.base import Section

SECTIONS: tuple[Section, ...] = tuple(
    module.SECTION
    for module in (
        checks,
        machine,
        gemm,
        tune,
        attention,
        elementwise,
        sampling,
        step,
        throughput,
        peers,
        yardsticks,
        streams,
        start,
        invariant,
        fp8,
        profile,
        checks_all,
    )
)
"""Linear layers come early: what is chosen for them is reused by every engine behind them."""
