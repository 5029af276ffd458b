"""Processes with a bound on their time, which take along what they have started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

ASKED_SECONDS = 10.0
"""What a process has to write down what it knows, once it is told that its time is over."""


def run_group(
    command: Sequence[str], cwd: Path, seconds: float, output: Path | None = None, ask: signal.Signals = signal.SIGTERM
) -> int:
    """Run a command; returns how it ended. Raises subprocess.TimeoutExpired once it and its children are gone.

    ``output`` takes what it prints. ``ask`` asks it to end, before it is killed.
    """
    options = {} if output is None else {"stdout": output.open("w"), "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command, cwd=cwd, start_new_session=True, **options)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(ask)
        _wait(process, ASKED_SECONDS)
        raise
    finally:
        _kill(process)
        if output is not None:
            options["stdout"].close()


def end_when_asked() -> None:
    """Have SIGTERM end this process as ``sys.exit`` does, so that what it runs in groups of their own ends, too."""

    def end(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, end)


def _wait(process: subprocess.Popen[bytes], seconds: float) -> None:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return


def _kill(process: subprocess.Popen[bytes]) -> None:
    """What is left of the process's session."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    finally:
        process.wait()
