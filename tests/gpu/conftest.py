"""The GPU that these tests run on, and which of them are a first look: ``-m smoke``."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

MOST_TUNING_SECONDS, MOST_CAPTURE_SECONDS = 10.0, 20.0


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip these tests without a GPU, and mark as ``smoke`` what ``smoke_where`` names: one of a test's many combinations."""
    for item in items:
        if Path(__file__).parent in item.path.parents and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        where, call = item.get_closest_marker("smoke_where"), getattr(item, "callspec", None)
        if where is not None and call is not None and all(_is(call.params[name], v) for name, v in where.kwargs.items()):
            item.add_marker(pytest.mark.smoke)


def _is(value: object, wanted: object) -> bool:
    """Whether a parameter is the one that is wanted, or one of a list of them. 0 is not False."""
    if isinstance(wanted, list):
        return any(_is(value, one) for one in wanted)
    return type(value) is type(wanted) and value == wanted


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda")


@pytest.fixture
def short_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines take less time to start: some linear layers stay the library's, and some steps may not be captured."""
    shorten_starts(monkeypatch)


def shorten_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bound what a start measures and captures."""
    import engine.build
    from kernels.linear import tuned

    monkeypatch.setattr(tuned, "measure", functools.partial(tuned.measure, max_seconds=MOST_TUNING_SECONDS))
    capture_steps = functools.partial(engine.build.capture_steps, seconds=MOST_CAPTURE_SECONDS)
    monkeypatch.setattr(engine.build, "capture_steps", capture_steps)
