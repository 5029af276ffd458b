"""Elementwise operations against their formulas, written plainly in float64."""

from __future__ import annotations

import pytest
import torch

from kernels.backend import REFERENCE
from tests.kernels.checks import check_add_rms_norm, check_rms_norm, check_rope, check_swiglu

CPU = torch.device("cpu")
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("check", [check_rms_norm, check_add_rms_norm, check_rope, check_swiglu])
def test_reference(check, dtype):
    check(REFERENCE, dtype, CPU)


def test_rope_scores_depend_on_the_distance_only():
    """The point of the rotation (arXiv 2104.09864, section 3.2)."""
    angles = torch.outer(
        torch.arange(40.0, dtype=torch.float64), 10000.0 ** -(torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    )
    cos, sin = torch.cat((angles.cos(),) * 2, -1), torch.cat((-angles.sin(), angles.sin()), -1)
    q, k = torch.randn(2, 1, 1, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).expand(2, 40, 1, 16)
    scores = REFERENCE.rope(q, cos, sin)[:, 0] @ REFERENCE.rope(k, cos, sin)[:, 0].T
    torch.testing.assert_close(scores[:-7, :-7], scores[7:, 7:])
    assert (scores[0, :5].diff().abs() > 1e-3).any()
