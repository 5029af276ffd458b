"""Which kernels the time of a step goes to: what explains a target that is missed."""

from __future__ import annotations

from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.engines import AR, PAGE, Limits, StepRig, plan_name, tidar
from benchmarks.gpu.random_model import random_model
from benchmarks.gpu.record import Cell, Record
from benchmarks.gpu.sections.base import Cells, Section, attempt, tabulate
from engine.step import DraftPlan

STEPS, KERNELS = 5, 30
CASES = ((1, AR), (1, tidar(16, 7)), (8, tidar(16, 1)), (256, AR))


def run(bench: Bench, model: str) -> Cells:
    """One table of kernels a case; the report gathers them in a text of their own."""
    context = bench.size(1024, 64)
    kernels = bench.kernels(bench.kernel_names[0], model)
    network = random_model(bench.config(model), bench.dtype, bench.device, kernels)
    most = bench.size(256, 2)
    rig = StepRig(bench, network, Limits(most, bench.size(16_384, 512), 1 + most * (context + 512) // PAGE))
    for batch, plan in bench.pick(CASES, CASES[:1]):
        cell = {"batch": batch, "plan": plan_name(plan), "context": context}
        yield attempt(cell, lambda batch=batch, plan=plan: _profile(bench, rig, batch, plan, context))


def _profile(bench: Bench, rig: StepRig, batch: int, plan: DraftPlan, context: int) -> Cell:
    ms, _ = rig.ms(batch, plan, context)
    step = rig.step(batch, plan, context)
    on_gpu = bench.device.type == "cuda"
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        for _ in range(STEPS):
            rig.hold(batch, plan, context)
            rig.launch(step).read()
    order = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    averages = profiler.key_averages()
    text = averages.table(sort_by=order, row_limit=KERNELS, max_name_column_width=100)
    times = {event.key: getattr(event, order) / STEPS for event in averages if getattr(event, order) > 0}
    top = sorted(times.items(), key=lambda item: -item[1])[:KERNELS]
    return {"ms": ms, "kernels_ms": sum(times.values()) / 1000, "top_us": dict(top), "table": text}


def show(records: list[Record]) -> str:
    """The share of the largest kernels of each case."""
    columns = (("batch", "batch", "d"), ("plan", "plan", ""), ("ms", "ms", ".3f"), ("in kernels, ms", "kernels_ms", ".3f"))
    texts = [tabulate(records, columns)]
    for record in records:
        for cell in record.cells:
            top = list(cell.get("top_us", {}).items())[:12]
            texts += [
                f"{record.part}, {cell['batch']} x {cell['plan']}:",
                *(f"  {us:9.1f} us  {name[:100]}" for name, us in top),
            ]
    return "\n".join(texts)


def tables(records: list[Record]) -> str:
    """The profiler's own tables, whole."""
    cells = [(record.part, cell) for record in records for cell in record.cells if "table" in cell]
    return "\n".join(
        f"{part}: {STEPS} steps of {c['batch']} x {c['plan']} at context {c['context']}\n{c['table']}\n" for part, c in cells
    )


SECTION = Section("profile", "which kernels take the time of a step?", run, show, 120.0, per_model=True)
