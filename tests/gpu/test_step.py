"""The kernels around the model on a GPU, against their references on it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels.backend import triton_kernels
from tests.gpu.waiting import no_waiting
from tests.kernels.step_cases import MASK, PAGE_SIZE, StepCase, check_lay_out, check_verify, random_step

CASES = [StepCase(seed=seed, max_drafts=16, num_requests=100, **mode) for seed, mode in enumerate(StepCase.MODES)]
CASES += [StepCase(seed=20 + seed, **mode) for seed, mode in enumerate(StepCase.MODES)]


@pytest.mark.smoke_where(case=CASES[3])
@pytest.mark.parametrize("case", CASES)
def test_rows_are_those_of_the_reference(case, device):
    check_lay_out(triton_kernels(8), case, device)


@pytest.mark.smoke_where(case=CASES[3])
@pytest.mark.parametrize("chance", [None, 0.7])
@pytest.mark.parametrize("case", CASES)
def test_a_verdict_is_that_of_the_reference(case, chance, device):
    check_verify(triton_kernels(8), case, chance, True, device)


def test_a_verdict_is_the_same_in_every_run(device):
    """Programs of one launch run in any order: none may read what another writes."""
    case = StepCase(seed=3, max_drafts=16, num_requests=250)
    for seed in range(10):
        check_verify(triton_kernels(8), replace(case, seed=seed), None, True, device)


@pytest.mark.smoke
def test_nothing_waits_for_the_device(device):
    kernels, step = triton_kernels(8), random_step(StepCase(), device)

    def run() -> None:
        rows = kernels.lay_out(step.state, step.layout, step.bounds_3N, step.prefill, PAGE_SIZE, MASK)
        kernels.verify(step.state, step.layout, step.requests(rows), torch.zeros_like(rows.verify_slot_D), None, True)
        kernels.gather((step.state.num_computed_S, step.state.wanted_S), rows.verify_slot_D)

    run()  # compiles
    torch.cuda.synchronize()
    with no_waiting():
        run()
