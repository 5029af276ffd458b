"""A process whose time is over takes along what it has started."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from benchmarks.gpu import processes
from benchmarks.gpu.processes import run_group

CHILD = "import subprocess, sys; print(subprocess.Popen(['sleep', '60']).pid, flush=True); "


def is_running(number: int) -> bool:
    try:
        with open(f"/proc/{number}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_process_that_ends_leaves_nothing_behind(tmp_path):
    output = tmp_path / "output.txt"
    assert run_group([sys.executable, "-c", CHILD + "sys.exit(3)"], tmp_path, 30.0, output) == 3
    time.sleep(0.1)
    assert not is_running(int(output.read_text()))


def test_one_that_hangs_is_asked_and_then_killed_with_its_children(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "ASKED_SECONDS", 0.5)
    output = tmp_path / "output.txt"
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    with pytest.raises(subprocess.TimeoutExpired):
        run_group([sys.executable, "-c", CHILD + deaf], tmp_path, 1.0, output)
    time.sleep(0.1)
    assert not is_running(int(output.read_text()))


def test_one_that_is_asked_may_say_what_it_knows(tmp_path):
    output = tmp_path / "output.txt"
    code = "import time\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('known', flush=True)"
    with pytest.raises(subprocess.TimeoutExpired):
        run_group([sys.executable, "-c", code], tmp_path, 1.0, output, signal.SIGINT)
    assert output.read_text() == "known\n"
