"""Settings of the whole test run."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

# Without a GPU, kernels run in Triton's interpreter; the variable has to be set before anything imports triton.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# No deadline: a machine may be busy. A failing example is printed with the line that repeats it.
settings.register_profile("tidar", deadline=None, print_blob=True)
settings.load_profile("tidar")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny models are fastest on one thread, and a test run should not fight for the cores."""
    torch.set_num_threads(1)
