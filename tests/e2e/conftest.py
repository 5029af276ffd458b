"""A real server process on the bundled model, shared by the tests of a process."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "server.cli", *arguments]


class Server(subprocess.Popen):
    """Its errors go to a file: a pipe that nobody reads fills up, and then the server stands still in a log line."""

    def __init__(self, errors, arguments):
        super().__init__(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True)
        self.errors = errors

    def communicate(self, input=None, timeout=None):
        out, _ = super().communicate(input, timeout)
        self.errors.seek(0)
        return out, self.errors.read()


@contextlib.contextmanager
def serving(*arguments: str):
    """Start ``tidar serve`` on a free port; yields (process, url) once it is ready, and ends it with SIGTERM."""
    with tempfile.TemporaryFile("w+") as errors:
        process = Server(errors, command("serve", *arguments, "--port", "0"))
        try:
            lines = []
            for line in process.stdout:
                lines.append(line)
                if match := re.match(r"ready at (\S+)", line):
                    yield process, match[1]
                    break
            else:
                pytest.fail(f"the server did not start: {''.join(lines)} {process.communicate(timeout=60)[1]}")
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            process.communicate(timeout=60)


@pytest.fixture(scope="session")
def url():
    with serving("--num-threads", "1") as (_, url):
        yield url
