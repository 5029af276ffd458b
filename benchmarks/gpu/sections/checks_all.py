"""The tests for a GPU that ``checks`` leaves out, where time is left."""

from __future__ import annotations

import importlib.util
import os
import re
import time

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.sections import checks
from benchmarks.gpu.sections.base import Cells, Section
from benchmarks.gpu.sections.checks import MARGIN_SECONDS, run_files, show
from benchmarks.report import ROOT

AT_A_TIME = 4
_ENGINE = re.compile(r"^from (tests\.)?engine\b", re.MULTILINE)


def run(bench: Bench, part: str) -> Cells:
    """Engines, which take the memory that is free, come first and one by one; then kernels, together."""
    files, rest = sorted((ROOT / checks.TESTS).glob("test_*.py")), ["-m", "not smoke"]
    engines = [file for file in files if _ENGINE.search(file.read_text())]
    deadline = bench.deadline - MARGIN_SECONDS
    for place, file in enumerate(engines):
        now = time.perf_counter()
        share = (deadline - now) / (len(engines) - place + 1)  # the kernels have a share, too
        yield from run_files([file], now + share, 1, rest)
    kernels = [file for file in files if file not in engines]
    yield from run_files(kernels, deadline, AT_A_TIME, [*rest, *_workers()])


def _workers() -> list[str]:
    """The tests of one file on several cores, where pytest-xdist is there: kernels are compiled side by side."""
    count = (os.cpu_count() or 1) // AT_A_TIME
    return ["-n", str(count)] if count > 1 and importlib.util.find_spec("xdist") is not None else []


SECTION = Section("checks-all", "what do the other tests for a GPU say?", run, show, 480.0)
