"""Attention by rows a request, batch and context: ours, and the reference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from benchmarks.gpu.attention_case import AttentionCase, attention_case, attention_rig
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.engines import AR, PAGE, linear, plan_name, tidar
from benchmarks.gpu.record import Cell, Record
from benchmarks.gpu.sections.base import Cells, Section, attempt, tabulate
from benchmarks.gpu.shapes import one_layer
from kernels.backend import Kernels

PLANS = (tidar(8, 8), tidar(16, 7), tidar(16, 16), tidar(4, 4), AR, linear(16), linear(8))
"""72, 128, 272, 20, 1, 16 and 8 rows."""

BATCHES, CONTEXTS = (8, 1, 32), (8192, 1024, 32_768)
"""Those of the target first."""

REFERENCE_TOKENS = 65_536
"""The reference gathers the keys of all requests: only so many."""


def cases(bench: Bench, model: str) -> Iterator[tuple[Cell, AttentionCase]]:
    """Every size with its case; those that do not fit the memory are left out."""
    config = one_layer(bench.config(model))
    contexts, batches = bench.pick(CONTEXTS, (128, 64)), bench.pick(BATCHES, (2,))
    rig = attention_rig(bench, config, max(batches), max(contexts), max_rows=272)
    for context in contexts:
        for batch in batches:
            for plan in bench.pick(PLANS, (tidar(4, 2), AR)):
                try:
                    case = attention_case(bench, rig, batch, plan, context)
                except torch.OutOfMemoryError:
                    bench.release()
                    continue
                yield (
                    {
                        "model": model,
                        "rows_each": plan.num_rows,
                        "plan": plan_name(plan),
                        "batch": batch,
                        "context": context,
                    },
                    case,
                )
                del case
                bench.release()


def run(bench: Bench, model: str) -> Cells:
    """Ours and the reference, as far as it reaches."""
    for size, case in cases(bench, model):
        for name in bench.kernel_names:
            if name != "reference" or case.num_requests * case.context <= REFERENCE_TOKENS:
                kernels = bench.kernels(name, model)
                yield attempt(size | {"kernels": name}, lambda kernels=kernels, case=case: _measure(bench, case, kernels))
        del case


def _measure(bench: Bench, case: AttentionCase, kernels: Kernels) -> Cell:
    """One layer's attention, and what all layers of a step share."""

    def prepare(number: int) -> object:
        return kernels.prepare_attention(case.metadata, PAGE, case.group_size, bench.dtype)

    prepared = prepare(0)

    def attend(layer: int) -> torch.Tensor:
        return kernels.paged_attention(case.q, case.k, case.v, *case.caches[layer], prepared, case.scale)

    found = figures(bench, case, bench.kernel_ms(attend, len(case.caches)))
    return attempt(found, lambda: {"prepare_us": 1000 * bench.kernel_ms(prepare)})


def figures(bench: Bench, case: AttentionCase, ms: float) -> Cell:
    """What a time comes to."""
    work, ceilings = case.work, bench.ceilings
    return {
        "us": 1000 * ms,
        "tflops": work.flops / ms / 1e9,
        "of_bandwidth": work.num_bytes / ms * 1e3 / ceilings.bytes_per_second,
        "of_roofline": work.floor_ms(ceilings.bytes_per_second, ceilings.flops_per_second) / ms,
    }


def show(records: list[Record]) -> str:
    """Time, rate, and fraction of bandwidth; what is absent is named behind the table."""
    columns = (
        ("context", "context", "d"),
        ("batch", "batch", "d"),
        ("rows each", "rows_each", "d"),
        ("kernels", "kernels", ""),
        ("us", "us", ".1f"),
        ("TFLOP/s", "tflops", ".0f"),
        ("/ bandwidth", "of_bandwidth", ".2f"),
        ("/ roofline", "of_roofline", ".2f"),
        ("prepare us", "prepare_us", ".1f"),
        ("max error", "max_error", ".1e"),
    )
    absent = {(r.part, cell["absent"]) for r in records for cell in r.cells if "absent" in cell}
    present = [replace(r, cells=[cell for cell in r.cells if "absent" not in cell]) for r in records]
    return "\n".join([tabulate(present, columns), *(f"{part}: absent ({why})" for part, why in sorted(absent))])


SECTION = Section(
    "attention", "how fast is attention with the step's mask, by rows, batch and context?", run, show, 150.0, per_model=True
)
