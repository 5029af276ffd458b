"""A real server process on the bundled model, shared by the tests of a module."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "server.cli", *arguments]


@contextlib.contextmanager
def serving(*arguments: str):
    """Start ``tidar serve`` on a free port; yields (process, url) once it is ready, and ends it with SIGTERM."""
    process = subprocess.Popen(
        command("serve", *arguments, "--port", "0"), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if match := re.match(r"ready at (\S+)", line):
                yield process, match[1]
                break
        else:
            pytest.fail(f"the server did not start: {''.join(lines)} {process.stderr.read()}")
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)


@pytest.fixture(scope="module")
def url():
    with serving() as (_, url):
        yield url
