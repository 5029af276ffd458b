"""A start's memory on the host is looked at while it loads, and a second copy of the weights shows."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.random_model import random_model
from benchmarks.gpu.sections.start import host_memory
from benchmarks.gpu.shapes import TINY
from engine.models.places import named_tensors
from kernels.backend import REFERENCE

ROOT = Path(__file__).parents[3]
SLACK = 15e6

LARGER = """
from dataclasses import replace
from benchmarks.gpu import bench, host_memory
bench.TINY = replace(bench.TINY, vocab_size=20_000, hidden_size=512, intermediate_size=2048)
"""
"""What is loaded here; a second copy has to stand out from what any process takes."""

SECOND_COPY = """
from safetensors.torch import load_file
load = host_memory.load_model
def load_from_a_copy(folder, *arguments, **options):
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    model = load(folder, *arguments, **options)
    del tensors
    return model
host_memory.load_model = load_from_a_copy
"""
"""A loader that reads all weights first, and gives them up before it ends."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> tuple[Path, int]:
    """A folder with weights, and their bytes."""
    folder = tmp_path_factory.mktemp("checkpoint")
    config = replace(TINY, vocab_size=20_000, hidden_size=512, intermediate_size=2048)
    tensors = named_tensors(random_model(config, torch.float32, torch.device("cpu"), REFERENCE))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder, sum(tensor.nbytes for tensor in tensors.values())


def load_apart(folder: Path, code: str = "") -> dict[str, int]:
    code = f"{LARGER}{code}\nhost_memory.main([{str(folder)!r}, '--model', '8b', '--dry-run'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_a_loader_holds_the_weights_once(checkpoint):
    """On a CPU they stay, so that they are what the memory grows by; on a GPU it should be next to nothing."""
    folder, size = checkpoint
    assert size > 90e6
    assert size - SLACK < load_apart(folder)["peak_grew_by"] < size + SLACK


def test_a_second_copy_shows_although_it_is_gone_at_the_end(checkpoint):
    folder, size = checkpoint
    found = load_apart(folder, SECOND_COPY)
    assert found["peak_grew_by"] > 2 * size - SLACK
    assert found["after"] - found["before"] < size + SLACK


def test_a_start_tells_what_loading_took(checkpoint, tmp_path):
    bench = Bench(tmp_path, is_dry=True)
    network = random_model(bench.config("8b"), bench.dtype, bench.device, REFERENCE)
    save_file({name: t.contiguous() for name, t in named_tensors(network).items()}, tmp_path / "model.safetensors")
    found = host_memory(bench, "8b", tmp_path)
    assert "error" not in found
    assert 0 < found["host_kept"] <= found["host_peak_grew_by"] < 50e6
    assert host_memory(bench, "8b", tmp_path / "nowhere")["error"].startswith("host memory: ")
