"""A step with eight-bit weights beside the same step with bfloat16 ones."""

from __future__ import annotations

import torch

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.engines import AR, PAGE, ROOM, Limits, StepRig, plan_name, tidar
from benchmarks.gpu.random_model import quantized, random_model
from benchmarks.gpu.record import Cell, Record
from benchmarks.gpu.sections.base import Cells, Section, attempt, tabulate
from kernels.backend import Kernels, select_kernels

PLANS, BATCHES = (AR, tidar(16, 7), tidar(16, 1), tidar(4, 1)), (1, 8, 32)


def run(bench: Bench, model: str) -> Cells:
    """bfloat16 first; then e4m3, for whose shapes the linear layers are chosen here."""
    plain: dict[tuple[int, str], float] = {}
    for weights in ("as they are", "fp8"):
        name = bench.kernel_names[0]
        fresh = select_kernels(name, bench.device, bench.dtype, bench.config(model).num_kv_heads)
        rig = _rig(bench, model, bench.kernels(name, model) if weights != "fp8" else fresh, weights == "fp8")
        for batch in bench.pick(BATCHES, (1,)):
            for plan in bench.pick(PLANS, (AR,)):
                cell: Cell = {"model": model, "weights": weights, "batch": batch, "plan": plan_name(plan)}
                found = attempt(cell, lambda r=rig, b=batch, p=plan: {"ms": r.ms(b, p, bench.size(1024, 64))[0]})
                key = (batch, cell["plan"])
                if weights != "fp8" and "ms" in found:
                    plain[key] = found["ms"]
                elif key in plain and "ms" in found:
                    found["gain"] = plain[key] / found["ms"]
                yield found
        del rig
        bench.release()


def _rig(bench: Bench, model: str, kernels: Kernels, is_fp8: bool) -> StepRig:
    network = random_model(bench.config(model), bench.dtype, bench.device, kernels)
    if is_fp8:
        network = quantized(network)
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
    most = bench.size(32, 1)
    return StepRig(bench, network, Limits(most, bench.size(16_384, 512), 1 + most * (1024 + ROOM) // PAGE))


def show(records: list[Record]) -> str:
    """Milliseconds, and how many times faster eight bits are."""
    columns = (("weights", "weights", ""), ("batch", "batch", "d"), ("plan", "plan", ""), ("ms", "ms", ".3f"),
               ("times faster", "gain", ".2f"))  # fmt: skip
    return tabulate(records, columns)


SECTION = Section("fp8", "what do eight-bit weights gain?", run, show, 200.0, per_model=True)
