"""Norms, SwiGLU, and what stands between projection and attention, against their formulas, written plainly in float64."""

from __future__ import annotations

import pytest
import torch

from kernels.backend import REFERENCE, Kernels, triton_kernels
from kernels.rope_kv_write.metadata import RopeMetadata
from tests.kernels.checks import (
    ROPE_CASES,
    SHAPES,
    check_add_rms_norm,
    check_rms_norm,
    check_rope_kv_write,
    check_swiglu,
)

CPU = torch.device("cpu")
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
INTERPRETED = [torch.float32, torch.float16]
ROW_CHECKS = [check_rms_norm, check_add_rms_norm, check_swiglu]


@pytest.fixture(scope="module")
def triton(device: torch.device) -> Kernels:
    return triton_kernels(num_kv_heads=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("check", ROW_CHECKS)
def test_reference_on_rows(check, shape, dtype):
    check(REFERENCE, shape, dtype, CPU)


@pytest.mark.parametrize("dtype", INTERPRETED)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("check", ROW_CHECKS)
def test_triton_on_rows(triton, check, shape, dtype, device):
    check(triton, shape, dtype, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ROPE_CASES)
def test_reference_rope_kv_write(case, dtype):
    check_rope_kv_write(REFERENCE, ROPE_CASES[case], dtype, CPU)


@pytest.mark.parametrize("dtype", INTERPRETED)
@pytest.mark.parametrize("case", ROPE_CASES)
def test_triton_rope_kv_write(triton, case, dtype, device):
    check_rope_kv_write(triton, ROPE_CASES[case], dtype, device)


def test_rope_scores_depend_on_the_distance_only():
    """The point of the rotation (arXiv 2104.09864, section 3.2)."""
    exponent = torch.arange(0, 16, 2, dtype=torch.float64) / 16
    angles = torch.outer(torch.arange(40, dtype=torch.float64), 10000.0**-exponent)
    cos, sin = torch.cat((angles.cos(),) * 2, -1), torch.cat((-angles.sin(), angles.sin()), -1)
    prepared = REFERENCE.prepare_rope(RopeMetadata(cos, sin, None, torch.arange(40), None, 0), 1, 1, torch.float64)
    qkv = torch.randn(1, 3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).expand(40, 3, 16)
    q, k, _ = REFERENCE.rope_kv_write(qkv, None, 1e-6, prepared, None)
    scores = q[:, 0] @ k[:, 0].T
    torch.testing.assert_close(scores[:-7, :-7], scores[7:, 7:])
    assert (scores[0, :5].diff().abs() > 1e-3).any()


def test_gradients_flow_through_the_reference_without_a_cache():
    """Training runs it: qkv and both norm weights learn."""
    generator = torch.Generator().manual_seed(0)
    qkv, qk_norm, cos, sin = (
        torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((3, 4, 6), (2, 6), (5, 6), (5, 6))
    )
    scale = torch.linspace(1, 2, 5, dtype=torch.float64)
    prepared = REFERENCE.prepare_rope(RopeMetadata(cos, sin, scale, torch.tensor([0, 3, 3]), None, 0), 2, 1, torch.float64)
    assert torch.autograd.gradcheck(
        lambda x, w: REFERENCE.rope_kv_write(x, w, 1e-6, prepared, None), (qkv.requires_grad_(), qk_norm.requires_grad_())
    )


def test_a_cache_without_slots_is_refused(triton):
    tables = torch.ones(4, 8)
    metadata = RopeMetadata(tables, tables, None, torch.zeros(1, dtype=torch.long), None, 0)
    qkv, cache = torch.zeros(1, 3, 8), (torch.zeros(2, 1, 4, 8), torch.zeros(2, 1, 4, 8))
    for kernels in (REFERENCE, triton):
        with pytest.raises(AssertionError, match="slots"):
            kernels.rope_kv_write(qkv, None, 1e-6, kernels.prepare_rope(metadata, 1, 1, torch.float32), cache)
