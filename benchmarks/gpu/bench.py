"""What every section is given: the device, how to record and time on it, the models, the sizes, and what ran before."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import record
from benchmarks.gpu.shapes import ACCEPTANCE, MODELS, TINY
from benchmarks.gpu.timing import MeteredCapture, kernel_ms, recorder, timer
from engine.config import ModelConfig
from kernels.backend import Kernels, select_kernels
from kernels.linear.choice import ChoiceTable

GEMM = "gemm"
"""The section whose records tell which linear layers were chosen."""


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What this device was measured to reach, in bytes and floating-point operations per second."""

    bytes_per_second: float
    flops_per_second: float


class Bench:
    """One run. ``is_dry``: everything is tiny and runs on the CPU, so that every line of a section is executed."""

    def __init__(self, out: Path, is_dry: bool = False, peers: Path | None = None) -> None:
        self.out, self.is_dry, self.peers = out, is_dry, peers
        self.device = torch.device("cpu" if is_dry else "cuda")
        self.dtype = torch.float32 if is_dry else torch.bfloat16
        self.timer = timer(self.device)
        self.deadline = math.inf
        """When the part that runs now is cut, by ``time.perf_counter``."""

    @property
    def seconds_left(self) -> float:
        """Of the part that runs now."""
        return self.deadline - time.perf_counter()

    @property
    def capture(self) -> MeteredCapture:
        """A recorder, always a new one: each engine has a pool of memory of its own for its graphs, which ends with them.

        Torch cannot reopen a pool whose graphs are gone.
        """
        return MeteredCapture(self.device, recorder(self.device))

    def pick(self, full: Sequence[Any], tiny: Sequence[Any]) -> Sequence[Any]:
        """A list of sizes, or what a dry run has in its place."""
        return tiny if self.is_dry else full

    def size(self, full: int, tiny: int) -> int:
        """A size, or what a dry run has in its place."""
        return tiny if self.is_dry else full

    def config(self, model: str) -> ModelConfig:
        """The shape of a model by its name."""
        return TINY if self.is_dry else MODELS[model]

    def acceptance(self, model: str) -> float:
        """The chance that is imposed on a draft of this model."""
        return ACCEPTANCE[model]

    @property
    def kernel_names(self) -> tuple[str, ...]:
        """The implementations to compare, ours first."""
        return ("reference",) if self.is_dry else ("triton", "reference")

    def kernels(self, choice: str, model: str) -> Kernels:
        """The kernels by name. Linear layers that an earlier part of this run has chosen are not measured again."""
        kernels = select_kernels(choice, self.device, self.dtype, self.config(model).num_kv_heads)
        table = self.linear_choices(model)
        if table is None or not hasattr(kernels.linear, "table"):
            return kernels
        kernels.linear.table = table
        return replace(kernels, prepare_linear=lambda *ignored: table)

    def linear_choices(self, model: str) -> ChoiceTable | None:
        """What the section on linear layers has measured for a model on this machine, if it has."""
        found = record.read(self.out, f"{GEMM}.{model}")
        if found is None or found.machine.get("device") != self.device_name:
            return None
        measured = [cell["choice"] for cell in found.cells if "choice" in cell]
        return ChoiceTable.of_plain(measured) if measured else None

    @cached_property
    def device_name(self) -> str:
        """As provenance has it."""
        return str(record.machine(self.device)["device"])

    @cached_property
    def ceilings(self) -> Ceilings:
        """Those that the section on the machine has measured on this kind of device, or measured now."""
        found = record.read(self.out, "machine")
        known = found.cells if found is not None and found.machine.get("device") == self.device_name else []
        values = [next((c[key] for c in known if key in c), None) for key in ("bytes_per_second", "flops_per_second")]
        return self.measure_ceilings() if None in values else Ceilings(*values)

    def measure_ceilings(self) -> Ceilings:
        """Copy a buffer far larger than the L2 cache, counting what is read and written; multiply two square matrices."""
        size = self.size(2**31, 2**16)
        source = torch.empty(size, dtype=torch.uint8, device=self.device).random_()
        target = torch.empty_like(source)
        copy_ms = self.timer(lambda: target.copy_(source))
        width = self.size(8192, 64)
        a, b = (torch.randn(width, width, dtype=self.dtype, device=self.device) for _ in range(2))
        matmul_ms = self.timer(lambda: torch.mm(a, b))
        return Ceilings(2 * size / copy_ms * 1e3, 2 * width**3 / matmul_ms * 1e3)

    def kernel_ms(self, run: Callable[[int], object], calls: int = 1) -> float:
        """Milliseconds of one call among ``calls`` different ones in one graph."""
        return kernel_ms(self.capture, self.timer, run, calls)

    def copies(self, num_bytes: int) -> int:
        """How many copies of something are too large for the L2 cache together."""
        return self.size(max(2, min(64, -(-(256 << 20) // max(1, num_bytes)))), 2)

    def release(self) -> None:
        """Give memory of what is gone back to the device."""
        gc.collect()  # an engine's parts refer to each other
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
