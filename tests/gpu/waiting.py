"""A block of code that must not wait for the device."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PROTOTYPE = "Synchronization debug mode is a prototype feature"
"""What torch warns of when the mode is set for the first time in a process. It has set it by then, so that a test run which
turns warnings into errors would go on in that mode."""


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever makes the host wait for the device raises RuntimeError in here."""
    before = torch.cuda.get_sync_debug_mode()
    try:
        _set_mode("error")
        yield
    finally:
        _set_mode(before)


def _set_mode(mode: int | str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=PROTOTYPE, category=UserWarning)
        torch.cuda.set_sync_debug_mode(mode)
