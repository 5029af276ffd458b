"""Keys and values land in their slots, and nowhere else."""

from __future__ import annotations

import pytest
import torch

from kernels.backend import REFERENCE
from tests.kernels.checks import check_kv_write


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("page", [4, 16, 64])
def test_reference(page, dtype):
    check_kv_write(REFERENCE, page, dtype, torch.device("cpu"))


def test_no_rows():
    k_cache = torch.ones(2, 1, 4, 8)
    empty = torch.empty(0, 1, 8)
    REFERENCE.kv_write(empty, empty, k_cache, k_cache, torch.empty(0, dtype=torch.long))
    assert (k_cache == 1).all()
