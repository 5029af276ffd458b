"""The other operations of a step on the GPU, against the same formulas as on the CPU."""

from __future__ import annotations

import pytest
import torch

from kernels.backend import select_kernels
from kernels.philox.reference import gumbel
from tests.kernels.checks import (
    check_add_rms_norm,
    check_kv_write,
    check_philox,
    check_rms_norm,
    check_rope,
    check_swiglu,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("check", [check_rms_norm, check_add_rms_norm, check_rope, check_swiglu])
def test_selected_kernels(check, dtype, device):
    check(select_kernels("auto", device, dtype, 2), dtype, device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kv_write(dtype, device):
    check_kv_write(select_kernels("auto", device, dtype, 2), 64, dtype, device)


def test_philox_integers_are_those_of_the_cpu(device):
    check_philox(device)


def test_noise_is_that_of_the_cpu_but_for_last_bits(device):
    seeds, positions = torch.tensor([0, -5, 2**62]), torch.tensor([0, 9, 131071])
    here, there = (gumbel(seeds.to(d), positions.to(d), 5001, torch.float32).cpu() for d in (torch.device("cpu"), device))
    upper = here > -2  # below, float32 is coarse and logarithms may round differently
    torch.testing.assert_close(there[upper], here[upper], atol=2e-5, rtol=1e-5)
