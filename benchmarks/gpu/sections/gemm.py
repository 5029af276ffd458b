"""Linear layers by shape and rows: the library and the choice of the engine, against the time that the weight's bytes take."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.record import Cell, Record
from benchmarks.gpu.sections.base import Cells, Section, attempt, tabulate
from benchmarks.gpu.shapes import Work, linear_shapes
from kernels.backend import Kernels
from kernels.linear.choice import measured_anew

ROWS = (1, 72, 128, 16, 256, 8, 32, 64, 48, 96, 160, 192, 512, 1024)
"""Those of the steps that the targets are about first."""

CHOSEN_AT = 256
"""Rows above this are the library's."""


def run(bench: Bench, model: str) -> Cells:
    """First what the engine measures at its start, which later parts reuse; then every shape at every number of rows."""
    config = bench.config(model)
    kernels = bench.kernels(bench.kernel_names[0], model)
    weights = {name: _weights(bench, shape) for name, shape in linear_shapes(config).items()}
    flat = [weight for copies in weights.values() for weight in copies]
    chosen = kernels.prepare_linear(flat, bench.dtype, CHOSEN_AT, lambda message: print(message, flush=True), measured_anew)
    for choice in chosen.to_plain() if chosen is not None else ():
        yield {"choice": choice}
    for rows in bench.pick(ROWS, (1, 8)):
        for name, copies in weights.items():
            cell = {"layer": name, "shape": list(copies[0].shape), "rows": rows}
            yield attempt(cell, lambda copies=copies, rows=rows: _measure(bench, kernels, copies, rows))


def _weights(bench: Bench, shape: tuple[int, int]) -> list[torch.Tensor]:
    count = bench.copies(shape[0] * shape[1] * 2)
    return [torch.randn(shape, dtype=bench.dtype, device=bench.device) * 0.02 for _ in range(count)]


def _measure(bench: Bench, kernels: Kernels, copies: list[torch.Tensor], rows: int) -> Cell:
    out, width = copies[0].shape
    x = torch.randn(rows, width, dtype=bench.dtype, device=bench.device)
    size = x.element_size()
    work = Work(size * (out * width + rows * (width + out)), 2.0 * rows * out * width)
    floor = work.floor_ms(bench.ceilings.bytes_per_second, bench.ceilings.flops_per_second)
    library = bench.kernel_ms(lambda i: F.linear(x, copies[i]), len(copies))
    ours = bench.kernel_ms(lambda i: kernels.linear(x, copies[i], None), len(copies))
    return {
        "library_us": 1000 * library,
        "ours_us": 1000 * ours,
        "floor_us": 1000 * floor,
        "library_of_floor": floor / library,
        "ours_of_floor": floor / ours,
        "ours_bytes_per_second": work.num_bytes / ours * 1e3,
    }


def show(records: list[Record]) -> str:
    """Times, and how close they come to the floor."""
    columns = (
        ("layer", "layer", ""),
        ("rows", "rows", "d"),
        ("library us", "library_us", ".1f"),
        ("ours us", "ours_us", ".1f"),
        ("floor us", "floor_us", ".1f"),
        ("library / roofline", "library_of_floor", ".2f"),
        ("ours / roofline", "ours_of_floor", ".2f"),
    )
    return tabulate(records, columns)


SECTION = Section("gemm", "how close do linear layers come to streaming their weights?", run, show, 150.0, per_model=True)
