"""Compiles the kernels around the model for compute capability 9.0 as they are launched, without a GPU: ``python -m`` it.

Needs a process in which Triton is not interpreting. Steps of many shapes are launched, none runs. Asserts that each kernel was
compiled once for all of them, so that a running server never waits for the compiler, and that it needs no stack.
"""

from __future__ import annotations

import torch
from triton.runtime import JITFunction

from kernels.gather import triton as gather
from kernels.step_rows import triton as step_rows
from kernels.verify import triton as verify
from tests.kernels.compile_for_gpu import resources
from tests.kernels.compile_sampling import compile_launches
from tests.kernels.step_cases import MASK, PAGE_SIZE, StepCase, random_step

CPU = torch.device("cpu")
VARIANTS = {"_lay_out_kernel": 1, "_verify_kernel": 2, "_gather_kernel": 2}
"""Outcomes are drawn by lot or by verification; columns are five or three."""


def compile_steps() -> None:
    """Steps of a server: any number of requests, in all modes."""
    cases = [StepCase(num_requests=n, seed=n, **mode) for n in (1, 2, 3, 5, 8, 16, 33, 64, 255) for mode in StepCase.MODES]
    for case in cases:
        step = random_step(case, CPU)
        rows = step_rows.lay_out(step.state, step.layout, step.bounds_3N, step.prefill, PAGE_SIZE, MASK)
        tokens = torch.zeros_like(rows.verify_slot_D)
        requests = step.requests(rows)
        for chance in (None, 0.9):
            verify.verify(step.state, step.layout, requests, tokens, chance, len(tokens) > 1)
        for columns in (5, 3):
            gather.gather((step.state.num_computed_S,) * columns, rows.verify_slot_D)


def check() -> None:
    """Every kernel has as many variants as it should, in registers alone."""
    kernels = {f.__name__: f for m in (step_rows, verify, gather) for f in vars(m).values() if isinstance(f, JITFunction)}
    for name, count in VARIANTS.items():
        variants = list(kernels[name].device_caches[0][0].values())
        for variant in variants:
            registers, stack = resources(variant.asm["cubin"])
            print(f"{name}: {registers} registers, {stack} bytes of stack")
            assert stack == 0
        assert len(variants) == count, f"{name} was compiled {len(variants)} times"


if __name__ == "__main__":
    compile_launches()
    compile_steps()
    check()
