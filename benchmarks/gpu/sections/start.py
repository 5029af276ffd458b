"""What a start costs: weights, linear layers, captured steps, timed plans; and where the memory goes."""

from __future__ import annotations

import functools
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.engines import PAGE, facts
from benchmarks.gpu.random_model import random_model
from benchmarks.gpu.record import Cell, Record
from benchmarks.gpu.sections.base import Cells, Section, attempt, engine_lines, tabulate
from benchmarks.gpu.sections.throughput import start
from benchmarks.report import ROOT
from engine.config import SchedulerConfig
from engine.kv_cache import page_bytes
from engine.memory import CudaMemory
from engine.models.loader import load_model
from engine.models.places import named_tensors
from engine.models.transformer import Transformer

LOAD_SECONDS = 120.0


def run(bench: Bench, model: str) -> Cells:
    """A checkpoint written and loaded, then a whole start, message by message."""
    config = bench.config(model)
    begun, before = time.perf_counter(), _used(bench)
    network = random_model(config, bench.dtype, bench.device, bench.kernels("reference", model))
    _wait(bench)
    yield {"what": "random weights made on the device", "seconds": time.perf_counter() - begun, "bytes": _used(bench) - before}
    yield attempt({"what": "weights loaded from safetensors"}, functools.partial(_load, bench, model, network))
    del network
    bench.release()
    yield from _messages(bench, model)


def _load(bench: Bench, model: str, network: Transformer) -> Cell:
    """Load what was just written, so that the file is in the page cache: the loader's own part of the time."""
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-"))
    try:
        weights = {name: tensor.cpu().contiguous() for name, tensor in named_tensors(network).items()}
        save_file(weights, folder / "model.safetensors")
        del weights
        (folder / "config.json").write_text(json.dumps({}))
        begun = time.perf_counter()
        loaded = load_model(folder, network.config, bench.dtype, bench.device)
        _wait(bench)
        seconds = time.perf_counter() - begun
        size = sum(p.numel() * p.element_size() for p in loaded.parameters())
        is_equal = all(torch.equal(a, b) for a, b in zip(loaded.parameters(), network.parameters(), strict=True))
        del loaded
        return {"seconds": seconds, "bytes": size, "is_equal": is_equal} | host_memory(bench, model, folder)
    finally:
        shutil.rmtree(folder)


def host_memory(bench: Bench, model: str, folder: Path) -> Cell:
    """Load once more in a process of its own. On a GPU nothing should stay on the host, and no second copy be made there."""
    dry = ["--dry-run"] if bench.is_dry else []
    command = [sys.executable, "-m", "benchmarks.gpu.host_memory", str(folder), "--model", model, *dry]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LOAD_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"host memory: not finished after {LOAD_SECONDS:.0f} s"}
    if done.returncode:
        return {"error": f"host memory: {' '.join(done.stderr.split())[-300:]}"}
    found = json.loads(done.stdout.splitlines()[-1])
    return {"host_peak_grew_by": found["peak_grew_by"], "host_kept": found["after"] - found["before"]}


def _messages(bench: Bench, model: str) -> Cells:
    """Seconds between the messages that a start prints, and memory before and after."""
    moments: list[tuple[float, str]] = []
    before, begun = _used(bench), time.perf_counter()
    capture = bench.capture
    core = start(
        bench,
        model,
        bench.size(256, 2),
        bench.size(8192, 256),
        max_rows=SchedulerConfig().max_num_batched_tokens,
        progress=lambda text: moments.append((time.perf_counter(), text)),
        memory=_DryMemory() if bench.is_dry else CudaMemory(bench.device),
        capture=capture,
    )
    _wait(bench)
    ended = time.perf_counter()
    yield {"what": "a whole start, from random weights to ready", "seconds": ended - begun, "bytes": _used(bench) - before}
    moments = [(begun, "making weights"), *moments, (ended, "")]
    spent: dict[str, float] = {}
    for (since, text), (until, _) in itertools.pairwise(moments):
        kind = " ".join("N" if word.isdigit() else word for word in text.split())
        spent[kind] = spent.get(kind, 0.0) + until - since
    for kind, seconds in spent.items():
        yield {"what": f"after: {kind}", "seconds": seconds}
    yield facts(core) | capture.figures
    pages = core.info.num_pages
    size = pages * page_bytes(core.runner.model.config, PAGE, bench.dtype)
    yield {"what": f"KV cache of {pages} pages", "bytes": size}
    yield {"what": f"memory: {core.info.settings.get('memory')}"}
    yield {"what": f"captured steps: {core.info.settings.get('captured steps')}", "settings": dict(core.info.settings)}
    left_out = [text for _, text in moments if "not captured" in text]
    yield {"what": left_out[0] if left_out else "every step size was captured"}


class _DryMemory:
    """What a dry run takes for a device's memory."""

    total = 2**26

    def free(self) -> int:
        return self.total // 2

    def peak(self, run: Callable[[], None]) -> int:
        run()
        return 2**20


def _used(bench: Bench) -> int:
    if bench.device.type != "cuda":
        return 0
    bench.release()
    free, total = torch.cuda.mem_get_info(bench.device)
    return total - free


def _wait(bench: Bench) -> None:
    if bench.device.type == "cuda":
        torch.cuda.synchronize()


def show(records: list[Record]) -> str:
    """Seconds and gibibytes."""
    for cell in (cell for record in records for cell in record.cells):
        cell["GiB"] = cell["bytes"] / 2**30 if "bytes" in cell else None
        cell["host GiB"] = cell["host_peak_grew_by"] / 2**30 if "host_peak_grew_by" in cell else None
    columns = (
        ("seconds", "seconds", ".2f"),
        ("GiB", "GiB", ".2f"),
        ("host peak grew, GiB", "host GiB", ".2f"),
        ("what", "what", ""),
    )
    return "\n".join([tabulate(records, columns), *engine_lines(records)])


SECTION = Section("start", "how long does a start take, and where does the memory go?", run, show, 200.0, per_model=True)
