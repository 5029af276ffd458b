"""AR tokens per second of one request beside what others have, on the same machine in the same run."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.engines import PAGE, Limits, build_core, engine_config
from benchmarks.gpu.loop import drain, make_requests
from benchmarks.gpu.peers import continuous_batching, gpt_fast, mini_sglang, transformers_generate
from benchmarks.gpu.peers.base import Peer, run_peer
from benchmarks.gpu.processes import run_group
from benchmarks.gpu.random_model import random_model
from benchmarks.gpu.record import Cell, Record
from benchmarks.gpu.sections.base import Cells, Section, attempt, tabulate
from benchmarks.report import ROOT
from engine.config import DecodeConfig
from engine.sampling_params import DecodingMode

PROGRAMS = {
    "transformers_generate": transformers_generate.measure,
    "gpt_fast": gpt_fast.measure,
    "mini_sglang": mini_sglang.measure,
    "continuous_batching": continuous_batching.measure,
}
SECONDS = 300.0


def run(bench: Bench, part: str) -> Cells:
    """One peer a part; ours is the first."""
    model, kind = part.rsplit(".", 1)
    cell: Cell = {"model": model, "who": kind}
    if kind == "ours":
        yield attempt(cell, lambda: _ours(bench, model))
    else:
        yield attempt(cell, lambda: _theirs(bench, model, kind))


def _ours(bench: Bench, model: str) -> Cell:
    network = random_model(bench.config(model), bench.dtype, bench.device, bench.kernels(bench.kernel_names[0], model))
    limits = Limits(1, bench.size(4096, 64), 1 + bench.size(4096, 64) // PAGE, bench.size(2048, 64))
    config = engine_config(bench, network.config, limits, DecodeConfig(DecodingMode.AR))
    core = build_core(config, network, limits.max_model_len, bench.capture)
    peer = Peer(["--model", model, *(["--dry-run"] if bench.is_dry else [])])

    def generate(count: int) -> None:
        for request in make_requests(1, len(peer.prompt()), count, DecodingMode.AR, time.monotonic_ns() % 1000, 0):
            core.add(request)
        assert drain(core) == count

    return {"tokens_per_second": peer.rate(generate)}


def _theirs(bench: Bench, model: str, kind: str) -> Cell:
    arguments = ["--model", model, *(["--peers", str(bench.peers)] if bench.peers is not None else [])]
    if bench.is_dry:
        with torch.inference_mode(False):
            return run_peer(PROGRAMS[kind], [*arguments, "--dry-run"])
    command = [sys.executable, "-m", f"benchmarks.gpu.peers.{kind}", *arguments]
    seconds = max(1.0, bench.seconds_left)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output.txt"
        try:
            code = run_group(command, ROOT, seconds, output)
        except subprocess.TimeoutExpired:
            return {"error": f"not finished after {seconds:.0f} s"}
        text = output.read_text(errors="replace").strip()
    found = [line for line in text.splitlines() if line.startswith("{")]
    if code or not found:
        return {"error": f"ended with {code}: {' '.join(text.split())[-400:]}"}
    return dict(json.loads(found[-1]))


def show(records: list[Record]) -> str:
    """The rate of each, over ours too."""
    ours = {
        c["model"]: c["tokens_per_second"] for r in records for c in r.cells if c["who"] == "ours" and "tokens_per_second" in c
    }
    for cell in (cell for record in records for cell in record.cells):
        if "tokens_per_second" in cell and cell["model"] in ours:
            cell["ours_over"] = ours[cell["model"]] / cell["tokens_per_second"]
    columns = (("who", "who", ""), ("tokens/s", "tokens_per_second", ".1f"), ("ours over it", "ours_over", ".2f"),
               ("version", "version", ""), ("absent", "absent", ""))  # fmt: skip
    return tabulate(records, columns)


SECTION = Section(
    "peers",
    "how fast is one request, without drafting, beside other implementations?",
    run,
    show,
    SECONDS,
    per_model=True,
    kinds=("ours", *PROGRAMS),
)
