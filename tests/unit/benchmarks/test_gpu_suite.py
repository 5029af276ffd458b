"""The parts of ``tests/gpu`` that a machine without a GPU can prove."""

from __future__ import annotations

import warnings

import pytest
import torch

from tests.gpu.waiting import PROTOTYPE, no_waiting


class Mode:
    """Torch's, with the warning that comes with the first use in a process, after the mode is set."""

    def __init__(self) -> None:
        self.mode: int | str = 0
        self.has_warned = False

    def set(self, mode: int | str) -> None:
        self.mode = mode
        if not self.has_warned:
            self.has_warned = True
            warnings.warn(f"{PROTOTYPE} and does not yet detect all synchronizing operations", UserWarning, stacklevel=2)


@pytest.fixture
def mode(monkeypatch) -> Mode:
    fake = Mode()
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", fake.set)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: fake.mode)
    return fake


def test_the_first_use_of_torchs_check_for_waiting_is_no_error(mode):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with no_waiting():
            assert mode.mode == "error"
    assert mode.has_warned
    assert mode.mode == 0


def test_the_check_for_waiting_ends_with_its_block(mode):
    mode.mode = 1
    with pytest.raises(RuntimeError, match="something waited"), no_waiting():
        raise RuntimeError("something waited")
    assert mode.mode == 1


def test_other_warnings_of_a_block_are_still_errors(mode):
    with pytest.raises(UserWarning, match="another"), no_waiting():
        warnings.warn("another", UserWarning, stacklevel=1)
    assert mode.mode == 0
