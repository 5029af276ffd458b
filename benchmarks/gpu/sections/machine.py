"""What the device reaches at best: the ceilings that every other figure is held against."""

from __future__ import annotations

import torch

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.record import Record
from benchmarks.gpu.sections.base import Cells, Section, attempt, tabulate

CHAIN = 500
"""Tiny kernels in one graph, about as many as a step has."""


def run(bench: Bench, part: str) -> Cells:
    """Copy and matrix product, reading alone, and the price of a kernel in a graph."""
    ceilings = bench.measure_ceilings()
    yield {"what": "copy, read and written", "bytes_per_second": ceilings.bytes_per_second}
    yield {"what": "matrix product, 8192 cubed, bf16", "flops_per_second": ceilings.flops_per_second}
    yield attempt({"what": "reading 2 GiB for a sum"}, lambda: {"read_bytes_per_second": _read(bench)})
    yield attempt({"what": f"one kernel of {CHAIN} in a graph"}, lambda: {"kernel_us": _chain(bench)})
    yield attempt({"what": "replaying an almost empty graph"}, lambda: {"kernel_us": 1000 * bench.kernel_ms(_touch(bench))})


def _read(bench: Bench) -> float:
    size = bench.size(2**30, 2**15)
    source = torch.randn(size, dtype=bench.dtype, device=bench.device)
    return size * source.element_size() / bench.timer(lambda: source.view(-1, 2**10).sum(dim=1)) * 1e3


def _touch(bench: Bench):  # noqa: ANN202
    value = torch.zeros(1, device=bench.device)
    return lambda i: value.add_(1)


def _chain(bench: Bench) -> float:
    return 1000 * bench.kernel_ms(_touch(bench), bench.size(CHAIN, 3))


def show(records: list[Record]) -> str:
    """Terabytes and teraflops."""
    for cell in (cell for record in records for cell in record.cells):
        rate = cell.get("bytes_per_second", cell.get("read_bytes_per_second"))
        cell["TB/s"] = None if rate is None else rate / 1e12
        cell["TFLOP/s"] = cell["flops_per_second"] / 1e12 if "flops_per_second" in cell else None
    columns = (("what", "what", ""), ("TB/s", "TB/s", ".2f"), ("TFLOP/s", "TFLOP/s", ".0f"), ("us", "kernel_us", ".2f"))
    return tabulate(records, columns)


SECTION = Section("machine", "how much can this device copy and multiply?", run, show, 60.0)
