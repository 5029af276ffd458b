"""The parts of ``tests/gpu`` that a machine without a GPU can prove."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import engine.build
from tests.gpu.conftest import shorten_starts
from tests.gpu.waiting import PROTOTYPE, no_waiting


class Mode:
    """Torch's, with the warning that comes with the first use in a process, after the mode is set."""

    def __init__(self) -> None:
        self.mode: int | str = 0
        self.has_warned = False

    def set(self, mode: int | str) -> None:
        self.mode = mode
        if not self.has_warned:
            self.has_warned = True
            warnings.warn(f"{PROTOTYPE} and does not yet detect all synchronizing operations", UserWarning, stacklevel=2)


@pytest.fixture
def mode(monkeypatch) -> Mode:
    fake = Mode()
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", fake.set)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: fake.mode)
    return fake


def test_the_first_use_of_torchs_check_for_waiting_is_no_error(mode):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with no_waiting():
            assert mode.mode == "error"
    assert mode.has_warned
    assert mode.mode == 0


def test_the_check_for_waiting_ends_with_its_block(mode):
    mode.mode = 1
    with pytest.raises(RuntimeError, match="something waited"), no_waiting():
        raise RuntimeError("something waited")
    assert mode.mode == 1


def test_other_warnings_of_a_block_are_still_errors(mode):
    with pytest.raises(UserWarning, match="another"), no_waiting():
        warnings.warn("another", UserWarning, stacklevel=1)
    assert mode.mode == 0


def test_starts_are_shortened(monkeypatch):
    """By bounds that what is bounded does have."""
    shorten_starts(monkeypatch)
    tuned = importlib.import_module("kernels.linear.tuned")
    assert inspect.signature(tuned.measure).parameters["max_seconds"].default == 10.0
    assert inspect.signature(engine.build.capture_steps).parameters["seconds"].default == 20.0


SMOKE = {
    "test_elementwise.py": [
        "test_a_captured_layer_follows_positions_and_slots",
        "test_nothing_waits_for_the_device",
        "test_rope_kv_write",
        "test_rows",
        "test_rows",
        "test_rows",
    ],
    "test_engine.py": [
        "test_a_mode_gives_the_answers_of_ar_at_both_depths",
        "test_decode_steps_are_replayed_and_nothing_in_them_waits_for_the_device",
    ],
    "test_linear.py": 6 * ["test_the_extremes_of_the_candidates"],
    "test_paged_attention.py": [
        "test_a_captured_step_follows_the_device",
        "test_large",
        "test_large",
        "test_nothing_waits_for_the_device",
    ],
    "test_sampling.py": [
        "test_constrained_rows",
        "test_constrained_rows",
        "test_mixed_rows",
        "test_noise",
        "test_nothing_waits_for_the_device",
    ],
    "test_self_check.py": 2 * ["test_triton_passes_the_check"],
    "test_step.py": [
        "test_a_verdict_is_that_of_the_reference",
        "test_a_verdict_is_that_of_the_reference",
        "test_nothing_waits_for_the_device",
        "test_rows_are_those_of_the_reference",
    ],
}
"""Every kernel, captured steps, an engine's mode at both depths, and what must not wait: few enough for two minutes."""


def test_the_smoke_tests_are_those_that_are_listed():
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-m", "smoke", "--collect-only", "-q", "-o", "addopts="]
    done = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    found: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        if "::" in line:
            file, name = line.split("::")
            found.setdefault(Path(file).name, []).append(name.split("[")[0])
    assert {file: sorted(names) for file, names in found.items()} == SMOKE
