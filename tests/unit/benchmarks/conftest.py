from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.gpu import processes

START_SECONDS = 120.0
"""For a process to be as far as a test wants it, however busy the machine is."""


@pytest.fixture
def time_begins_with(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Given a file: bounds on the time of processes begin to run when the process has written it."""

    def install(ready: Path) -> None:
        class Process(subprocess.Popen):
            def wait(self, timeout: float | None = None) -> int:
                end = time.monotonic() + START_SECONDS
                while timeout is not None and not ready.exists() and self.poll() is None and time.monotonic() < end:
                    time.sleep(0.01)
                return super().wait(timeout)

        monkeypatch.setattr(processes.subprocess, "Popen", Process)
        monkeypatch.setattr(processes, "ASKED_SECONDS", START_SECONDS)

    return install
