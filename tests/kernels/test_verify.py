"""Acceptance and the hit branch: the Triton kernel (interpreted where there is no GPU) against the reference."""

from __future__ import annotations

import pytest

from tests.kernels.checks import check_verify


@pytest.mark.parametrize(
    ("columns", "branches", "block"), [(1, 0, 1), (1, 1, 4), (4, 2, 4), (8, 8, 8), (5, 3, 7), (16, 7, 16), (3, 1, 1), (0, 0, 1)]
)
def test_verify_is_the_reference(columns, branches, block, device):
    check_verify(columns, branches, block, device)
