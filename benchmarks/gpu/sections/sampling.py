"""From logits to the next step's drafts: processing, noise, argmax, acceptance, and the gather of the branch that was hit."""

from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.engines import AR, Limits, StepRig, linear, plan_name, tidar
from benchmarks.gpu.random_model import random_model
from benchmarks.gpu.record import Cell, Record
from benchmarks.gpu.sections.base import Cells, Section, attempt, tabulate
from engine.cuda_graphs import ALL_NEEDS, GREEDY, SAMPLED, TRUNCATED
from engine.input_batch import SamplingNeeds
from engine.step import DraftPlan

NEEDS = {"greedy": GREEDY, "noise": SAMPLED, "noise, top-k, top-p, min-p": TRUNCATED, "all, with penalties": ALL_NEEDS}
PLANS, BATCHES = (AR, tidar(16, 7), linear(16)), (1, 8, 32, 128)
MAX_LOGIT_ROWS = 1024


def run(bench: Bench, model: str) -> Cells:
    """The whole chain as a step has it, on random logits over the real vocabulary."""
    # The model itself is not run, so it may be thin; what is sampled from is as wide as it is.
    config = replace(bench.config(model), num_layers=1, hidden_size=64, intermediate_size=64)
    batches = bench.pick(BATCHES, (2,))
    for choice in bench.kernel_names:
        kernels = replace(bench.kernels(choice, model), prepare_linear=lambda *ignored: None)
        network = random_model(config, bench.dtype, bench.device, kernels)
        rig = StepRig(bench, network, Limits(max(batches), 2048, 1 + max(batches) * 24, max_rows=4096))
        rig.core.decoder.batch.make_counts()
        for name, needs in NEEDS.items():
            for batch in batches:
                for plan in bench.pick(PLANS, (AR, tidar(4, 2))):
                    rows = batch * (plan.num_rows - plan.num_branches)
                    cell = {"kernels": choice, "needs": name, "batch": batch, "plan": plan_name(plan), "logit_rows": rows}
                    if rows <= MAX_LOGIT_ROWS:
                        yield attempt(cell, lambda p=plan, b=batch, n=needs, r=rig: _measure(bench, r, b, p, n))
                        bench.release()


def _measure(bench: Bench, rig: StepRig, batch: int, plan: DraftPlan, needs: SamplingNeeds) -> Cell:
    context, decoder = bench.size(1024, 64), rig.core.decoder
    rig.admit(batch, context, temperature=float(needs.noise))
    rig.hold(batch, plan, context)
    inputs = replace(decoder.lay_out(rig.step(batch, plan, context)), needs=needs)
    layout = inputs.layout
    num_logits = layout.num_rows if layout.logit_rows is None else len(layout.logit_rows)
    logits = torch.randn(num_logits, decoder.batch.vocab_size, dtype=bench.dtype, device=bench.device)
    ms = bench.kernel_ms(lambda i: decoder.verify(inputs, logits))
    return {"us": 1000 * ms, "of_bandwidth": logits.nbytes / ms * 1e3 / bench.ceilings.bytes_per_second}


def show(records: list[Record]) -> str:
    """Microseconds, and how close the chain comes to reading the logits once."""
    columns = (("kernels", "kernels", ""), ("needs", "needs", ""), ("batch", "batch", "d"), ("plan", "plan", ""),
               ("logit rows", "logit_rows", "d"), ("us", "us", ".1f"), ("/ bandwidth", "of_bandwidth", ".2f"))  # fmt: skip
    return tabulate(records, columns)


SECTION = Section("sampling", "what do sampling, verification and the next drafts cost?", run, show, 90.0, per_model=True)
