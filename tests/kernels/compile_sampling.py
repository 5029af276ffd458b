"""Compiles the sampling kernels for compute capability 9.0 as they are launched, without a GPU: ``python -m`` this module.

Needs a process in which Triton is not interpreting. The code that launches runs on CPU tensors; every launch compiles, as
specialised for its arguments, and nothing runs. Prints the kernels with registers a thread, bytes of stack and shared memory.
"""

from __future__ import annotations

from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction
from triton.runtime.driver import driver

from kernels.philox import triton as philox
from kernels.process_logits import triton as process_logits
from kernels.sampling import triton as sampling
from tests.kernels.machine_code import resources
from tests.kernels.sampling_cases import MIXED, Row, constraints, random_logits, sampling_of

VOCAB_SIZE = 151_936
CPU = torch.device("cpu")


class NoDevice:
    """A driver for compiling alone."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def compile_launches() -> None:
    """From now on, launching compiles."""
    run = JITFunction.run

    def compile_only(self: JITFunction[Any], *args: Any, **options: Any) -> Any:
        kernel = run(self, *args, **options | {"warmup": True})
        registers, stack = resources(kernel.asm["cubin"])
        print(f"{self.fn.__name__}: {registers} registers, {stack} bytes of stack, {kernel.metadata.shared} of shared memory")
        return kernel

    JITFunction.run = compile_only
    driver.set_active(NoDevice())


if __name__ == "__main__":
    compile_launches()
    place = torch.arange(len(MIXED))
    everything = constraints(len(MIXED), VOCAB_SIZE, CPU)
    plain, greedy = (Row(),) * len(MIXED), (Row(temperature=0.0),) * len(MIXED)
    logits = random_logits(len(MIXED), VOCAB_SIZE, torch.bfloat16, CPU)
    for rows, more in ((greedy, {}), (plain, {}), (MIXED, {}), (MIXED, everything["grammar"] | everything["penalties"])):
        asked = sampling_of(rows, CPU, **more)
        sampling.sample_tokens(logits, None, asked, place, 7)
        sampling.sample_drafts(logits, place, asked, place, 7, None)
    sampling.sample_drafts(logits, place, sampling_of(plain, CPU), place, 7, 0.5)
    process_logits.process_logits(logits, sampling_of(MIXED, CPU, **everything["bias"]), 7)
    philox.gumbel(place, place, VOCAB_SIZE, torch.float32)
