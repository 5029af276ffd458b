"""A process whose time is over takes along what it has started."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from benchmarks.gpu import processes
from benchmarks.gpu.processes import run_group

CHILD = "import subprocess, sys; print(subprocess.Popen(['sleep', '600']).pid, flush=True); "


def is_running(number: int) -> bool:
    try:
        with open(f"/proc/{number}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def is_gone(number: int) -> bool:
    """Whether it ends within a time that is long: it was killed, and the kernel takes it away when it gets to it."""
    end = time.monotonic() + 30
    while is_running(number) and time.monotonic() < end:
        time.sleep(0.01)
    return not is_running(number)


def test_a_process_that_ends_leaves_nothing_behind(tmp_path):
    output = tmp_path / "output.txt"
    assert run_group([sys.executable, "-c", CHILD + "sys.exit(3)"], tmp_path, 120.0, output) == 3
    assert is_gone(int(output.read_text()))


def test_one_that_hangs_is_asked_and_then_killed_with_its_children(tmp_path, monkeypatch, time_begins_with):
    output = tmp_path / "output.txt"
    time_begins_with(tmp_path / "ready")
    monkeypatch.setattr(processes, "ASKED_SECONDS", 0.5)
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); open('ready', 'w'); time.sleep(600)"
    with pytest.raises(subprocess.TimeoutExpired):
        run_group([sys.executable, "-c", CHILD + deaf], tmp_path, 0.1, output)
    assert is_gone(int(output.read_text()))


def test_one_that_is_asked_may_say_what_it_knows(tmp_path, time_begins_with):
    output = tmp_path / "output.txt"
    time_begins_with(tmp_path / "ready")
    waits = "import time\ntry:\n    open('ready', 'w')\n    time.sleep(600)\n"
    code = waits + "except KeyboardInterrupt:\n    print('known', flush=True)"
    with pytest.raises(subprocess.TimeoutExpired):
        run_group([sys.executable, "-c", code], tmp_path, 0.1, output, signal.SIGINT)
    assert output.read_text() == "known\n"
