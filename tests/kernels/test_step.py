"""The kernels around the model (interpreted where there is no GPU) against their references, over random steps."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kernels.backend import triton_kernels
from tests.kernels.step_cases import StepCase, check_lay_out, check_verify

CASES = [StepCase(seed=seed, num_requests=16, **mode) for seed, mode in enumerate(StepCase.MODES)]
CASES += [replace(case, seed=20 + i, max_drafts=16, num_requests=40) for i, case in enumerate(CASES[3:])]
CASES += [StepCase(seed=40, max_drafts=1), StepCase(seed=41, num_requests=1), StepCase(seed=42, max_drafts=2)]


def name_of(case: StepCase) -> str:
    return f"{case.seed}"


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_rows_are_those_of_the_reference(case: StepCase, device: torch.device) -> None:
    check_lay_out(triton_kernels(8), case, device)


@pytest.mark.parametrize("chance", [None, 0.7])
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_verdict_is_that_of_the_reference(case: StepCase, chance: float | None, device: torch.device) -> None:
    check_verify(triton_kernels(8), case, chance, case.seed % 4 != 1, device)


def test_a_coin_that_always_or_never_accepts(device: torch.device) -> None:
    for chance in (0.0, 1.0):
        check_verify(triton_kernels(8), StepCase(seed=50), chance, True, device)


@pytest.mark.parametrize("count", [0, 1, 5, 300])
def test_gathered_columns_are_those_of_the_reference(count: int, device: torch.device) -> None:
    number = torch.randint(0, 50, (count,), generator=torch.Generator().manual_seed(count)).to(device)
    columns = (torch.arange(50), torch.arange(50).double() / 7, torch.arange(50) % 2 == 1)
    given = triton_kernels(8).gather(tuple(column.to(device) for column in columns), number)
    for column, entries in zip(columns, given, strict=True):
        assert torch.equal(entries.cpu(), column[number.cpu()])


def test_a_server_compiles_them_once_and_needs_no_stack(tmp_path: Path) -> None:
    """The interpreter accepts much that the compiler does not; compiling takes no GPU."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.kernels.compile_step"]
    run = subprocess.run(command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
