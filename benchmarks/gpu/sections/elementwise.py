"""The operations between matrix products: norms, SwiGLU, rotation with the K/V write; ours and the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.engines import PAGE
from benchmarks.gpu.record import Cell, Record
from benchmarks.gpu.sections.base import Cells, Section, attempt, tabulate
from engine.config import ModelConfig
from engine.models.rope import rope_tables
from kernels.backend import Kernels
from kernels.rope_kv_write.metadata import RopeMetadata

ROWS = (1, 16, 72, 128, 256, 1024)
CALLS = 24


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation on inputs that stay in place, and the bytes that it reads and writes at least."""

    run: Callable[[Kernels], Callable[[int], object]]
    num_bytes: int


def operations(bench: Bench, config: ModelConfig, rows: int) -> dict[str, Operation]:
    """By name, for a step of so many rows."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=bench.dtype, device=bench.device)

    size, width, inner = bench.dtype.itemsize, config.hidden_size, config.intermediate_size
    x, residual, weight, gate_up = random(rows, width), random(rows, width), random(width), random(rows, 2 * inner)
    return {
        "rms_norm": Operation(lambda ops: lambda i: ops.rms_norm(x, weight, 1e-6), size * (2 * rows + 1) * width),
        "add_rms_norm": Operation(
            lambda ops: lambda i: ops.add_rms_norm(x, residual, weight, 1e-6), size * (4 * rows + 1) * width
        ),
        "swiglu": Operation(lambda ops: lambda i: ops.swiglu(gate_up), size * 3 * rows * inner),
        "rope_kv_write": _rope_kv_write(bench, config, rows),
    }


def _rope_kv_write(bench: Bench, config: ModelConfig, rows: int) -> Operation:
    heads, groups, dim = config.num_heads, config.num_kv_heads, config.head_dim
    options = {"dtype": bench.dtype, "device": bench.device}
    qkv, qk_norm = torch.randn(rows, heads + 2 * groups, dim, **options), torch.randn(2, dim, **options)
    cache = tuple(torch.randn(1 + -(-rows // PAGE), groups, PAGE, dim, **options) for _ in range(2))
    cos, sin = rope_tables(config.rope, dim, rows, torch.float32, bench.device)
    positions = torch.arange(rows, device=bench.device)
    metadata = RopeMetadata(cos, sin, None, positions, PAGE + positions, PAGE)

    def prepared(ops: Kernels) -> Callable[[int], object]:
        rope = ops.prepare_rope(metadata, heads, groups, bench.dtype)
        norm = qk_norm if config.qk_norm else None
        return lambda i: ops.rope_kv_write(qkv, norm, 1e-6, rope, cache)

    elements = rows * dim * ((heads + 2 * groups) + heads + groups + 2 * groups)
    return Operation(prepared, bench.dtype.itemsize * elements)


def run(bench: Bench, model: str) -> Cells:
    """Every operation by every implementation. Inputs lie in the L2 cache, as they do in a step."""
    config = bench.config(model)
    for rows in bench.pick(ROWS, (1, 8)):
        for name, operation in operations(bench, config, rows).items():
            for choice in bench.kernel_names:
                kernels = bench.kernels(choice, model)
                cell = {"operation": name, "rows": rows, "kernels": choice, "megabytes": operation.num_bytes / 1e6}
                yield attempt(cell, lambda operation=operation, kernels=kernels: _measure(bench, operation, kernels))


def _measure(bench: Bench, operation: Operation, kernels: Kernels) -> Cell:
    ms = bench.kernel_ms(operation.run(kernels), bench.size(CALLS, 2))
    return {"us": 1000 * ms, "of_bandwidth": operation.num_bytes / ms * 1e3 / bench.ceilings.bytes_per_second}


def show(records: list[Record]) -> str:
    """Microseconds; a fraction of the bandwidth above 1 means that the L2 cache did it."""
    columns = (("operation", "operation", ""), ("rows", "rows", "d"), ("kernels", "kernels", ""), ("MB", "megabytes", ".2f"),
               ("us", "us", ".2f"), ("/ bandwidth", "of_bandwidth", ".2f"))  # fmt: skip
    return tabulate(records, columns)


SECTION = Section("elementwise", "what do the operations between the matrix products cost?", run, show, 60.0, per_model=True)
