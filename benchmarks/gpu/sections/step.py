"""A whole step on the device: layout, forward and verdict, replayed, by batch, context and plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.engines import AR, PAGE, ROOM, Limits, StepRig, facts, linear, plan_name, redraft, tidar
from benchmarks.gpu.random_model import random_model
from benchmarks.gpu.record import Cell, Record
from benchmarks.gpu.sections.base import Cells, Section, attempt, engine_lines, tabulate
from benchmarks.gpu.shapes import step_work
from engine.step import DraftPlan

FIRST = (AR, tidar(8, 8), tidar(16, 7), tidar(16, 1), linear(16))
"""Those of the targets, and those that compete at larger batches: at every size before the others at any."""

PLANS = (
    *FIRST,
    *(tidar(16, branches) for branches in (2, 3, 5, 16)),
    redraft(16),
    *(tidar(8, branches) for branches in (1, 3)),
    linear(8),
    *(tidar(4, branches) for branches in (1, 4)),
    linear(4),
)

BATCHES, CONTEXTS = (1, 8, 32, 128, 256), (1024, 8192)
MAX_ROWS = 2048
SAMPLED_PLANS = (AR, tidar(16, 7))


def order(contexts: Sequence[int], batches: Sequence[int], plans: Sequence[DraftPlan]) -> Iterator[tuple[int, int, DraftPlan]]:
    """The cells, those that matter most first: a part may be cut."""
    for some in ([plan for plan in plans if plan in FIRST], [plan for plan in plans if plan not in FIRST]):
        for context in contexts:
            for batch in batches:
                yield from ((context, batch, plan) for plan in some if batch * plan.num_rows <= MAX_ROWS)


def run(bench: Bench, part: str) -> Cells:
    """Every cell at greedy sampling; a few with noise; a smaller set for the reference kernels."""
    model, kind = part.rsplit(".", 1)
    contexts, batches = bench.pick(CONTEXTS, (64, 128)), bench.pick(BATCHES, (1, 2))
    plans = bench.pick(PLANS, (AR, tidar(8, 2), redraft(16)))
    if kind == "reference":
        # It gathers whole contexts, up to the longest that is allowed: so the longest is the one that is measured.
        contexts, batches, plans = contexts[:1], batches[:3], plans[:3]
    config = bench.config(model)
    network = random_model(config, bench.dtype, bench.device, bench.kernels(kind if not bench.is_dry else "reference", model))
    longest = 2 * contexts[0] if kind == "reference" else bench.size(16_384, 512)
    pages = 1 + max(batches) * (max(contexts) + ROOM) // PAGE
    rig = StepRig(bench, network, Limits(max(batches), longest, pages, MAX_ROWS))
    yield facts(rig.core)
    base: dict[tuple[int, int], float] = {}
    for context, batch, plan in order(contexts, batches, plans):
        cell = _cell(bench, rig, model, kind, batch, plan, context, base.get((context, batch)))
        if plan == AR and "ms" in cell:
            base[context, batch] = cell["ms"]
        yield cell
    for batch in batches[:3]:
        for plan in (plan for plan in SAMPLED_PLANS if kind != "reference"):
            yield _cell(bench, rig, model, kind, batch, plan, contexts[0], None, temperature=1.0)


def _cell(
    bench: Bench,
    rig: StepRig,
    model: str,
    kind: str,
    batch: int,
    plan: DraftPlan,
    context: int,
    base: float | None,
    temperature: float = 0.0,
) -> Cell:
    cell = {"model": model, "kernels": kind, "batch": batch, "context": context, "plan": plan_name(plan),
            "rows": batch * plan.num_rows, "temperature": temperature, "max_model_len": rig.max_model_len}  # fmt: skip

    def measure() -> Cell:
        try:
            ms, is_replayed = rig.ms(batch, plan, context, temperature)
        except torch.OutOfMemoryError:
            bench.release()
            raise
        work = step_work(bench.config(model), batch, plan, context, bench.dtype.itemsize)
        floor = work.floor_ms(bench.ceilings.bytes_per_second, bench.ceilings.flops_per_second)
        return {
            "ms": ms,
            "over_ar": None if base is None or plan == AR else ms / base,
            "floor_ms": floor,
            "of_roofline": floor / ms,
            "of_bandwidth": work.num_bytes / ms * 1e3 / bench.ceilings.bytes_per_second,
            "is_replayed": is_replayed,
            "pages": "own" if rig.has_own_pages(batch, context) else "shared",
            **rig.capture.figures,
        }

    return attempt(cell, measure)


def show(records: list[Record]) -> str:
    """Milliseconds, ratios over the AR step, and fractions of the roofline."""
    columns = (
        ("context", "context", "d"),
        ("batch", "batch", "d"),
        ("plan", "plan", ""),
        ("temperature", "temperature", ".0f"),
        ("rows", "rows", "d"),
        ("ms", "ms", ".3f"),
        ("x ar", "over_ar", ".2f"),
        ("floor ms", "floor_ms", ".3f"),
        ("/ roofline", "of_roofline", ".2f"),
        ("/ bandwidth", "of_bandwidth", ".2f"),
        ("replayed", "is_replayed", ""),
        ("pages", "pages", ""),
    )
    return "\n".join([tabulate(records, columns), *engine_lines(records)])


SECTION = Section(
    "step",
    "what does a step cost by batch, context and plan, and how close is it to the roofline?",
    run,
    show,
    270.0,
    per_model=True,
    kinds=("triton", "reference"),
)
