"""Runs Triton kernels in Triton's CPU interpreter where there is no GPU."""

from __future__ import annotations

import importlib.util
import os
import sys

import pytest
import torch

# Triton reads the variable when it is imported and when a kernel is defined, so it has to be set before both.
_IMPORTED_TOO_EARLY = "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1"
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where Triton kernels run: a GPU, or the interpreter on the CPU. Skips if neither is possible."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if torch.cuda.is_available():
        return torch.device("cuda")
    if _IMPORTED_TOO_EARLY:
        pytest.skip("triton was imported before its interpreter was switched on: set TRITON_INTERPRET=1")
    return torch.device("cpu")
