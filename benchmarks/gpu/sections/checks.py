"""Correctness first: the tests that need a GPU. Speed of a wrong result counts nothing.

``checks`` runs those that are marked ``smoke``: every kernel once in bfloat16, an engine with captured steps, a mode at both
depths, and that nothing waits for the device. ``checks-all`` runs the rest.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.processes import run_group
from benchmarks.gpu.record import Cell, Record
from benchmarks.gpu.sections.base import Cells, Section, tabulate
from benchmarks.report import ROOT

TESTS = "tests/gpu"
CHECKS = ("checks", "checks-all")
MARGIN_SECONDS = 15.0
"""Before the section's own end, for tests that are interrupted to report what they know."""


def run(bench: Bench, part: str) -> Cells:
    """The smoke tests, all files at once: most of the time is that of compiling, which every process does on its own core."""
    files = sorted((ROOT / TESTS).glob("test_*.py"))
    yield from run_files(files, bench.deadline - MARGIN_SECONDS, len(files), ["-m", "smoke"])


def run_files(files: Sequence[Path], deadline: float, at_a_time: int, options: Sequence[str]) -> Cells:
    """One cell a test file, and one a failed test. Every file has a process of its own, so that none breaks the others."""
    if not files:
        return
    with ThreadPoolExecutor(at_a_time) as pool:
        runs = [pool.submit(_run_file, file, deadline, options) for file in files]
        for done in as_completed(runs):
            yield from done.result()


def _run_file(file: Path, deadline: float, options: Sequence[str]) -> list[Cell]:
    """Warnings are none of this machine's business: other versions of libraries have other ones. So they are no errors."""
    seconds = deadline - time.perf_counter()
    if seconds <= 0:
        return [{"file": file.name, "is_red": True, "error": "not begun: the time is over"}]
    with tempfile.TemporaryDirectory() as folder:
        report, output = Path(folder) / "junit.xml", Path(folder) / "output.txt"
        command = [sys.executable, "-m", "pytest", str(file), "-q", "-W", "default", "-p", "no:cacheprovider", *options]
        problem, code = {}, 0
        try:
            code = run_group([*command, f"--junitxml={report}"], ROOT, seconds, output, signal.SIGINT)
        except subprocess.TimeoutExpired:
            problem, code = {"error": f"not finished after {seconds:.0f} s"}, -1
        if not report.exists():
            text = f"pytest ended with {code}: {output.read_text(errors='replace')[-300:]}"
            return [{"file": file.name, "is_red": True, "error": text} | problem]
        first, *failures = _cells(file.name, ElementTree.parse(report).getroot(), code)
        return [first | problem, *failures]


def _cells(file: str, suite: ElementTree.Element, returncode: int) -> Cells:
    counts: Cell = {"file": file, "passed": 0, "failed": 0, "skipped": 0, "seconds": 0.0, "ties": 0}
    failures: list[Cell] = []
    last = "the start"
    for case in suite.iter("testcase"):
        problem = next((found for kind in ("failure", "error") if (found := case.find(kind)) is not None), None)
        if case.get("name") is None:  # pytest was interrupted before it wrote who this is
            counts["failed"] += 1
            failures.append({"test": f"{file}, after {last}", "message": "under way when the time was over"})
            continue
        last = str(case.get("name"))
        outcome = "failed" if problem is not None else "skipped" if case.find("skipped") is not None else "passed"
        counts[outcome] += 1
        counts["seconds"] += float(case.get("time") or 0.0)
        counts["ties"] += sum(int(p.get("value", "0")) for p in case.iter("property") if p.get("name") == "ties")
        if problem is not None:
            text = " ".join((problem.get("message") or problem.text or "").split())
            failures.append({"test": f"{file}::{case.get('name')}", "message": text[:400]})
    yield counts | {"is_red": returncode not in (0, 5)}
    yield from failures


def warnings(record: Record | None) -> list[str]:
    """What a speed has to carry with it."""
    if record is None:
        return ["tests/gpu has not been run on this machine"]
    if record.status != "done" or any(cell.get("is_red") for cell in record.cells):
        return ["tests/gpu was red: see the section checks"]
    if not any(cell.get("passed") for cell in record.cells):
        return ["tests/gpu has run no test"]
    return []


def show(records: list[Record]) -> str:
    """The counts, then the failed tests."""
    columns = (("file", "file", ""), ("passed", "passed", "d"), ("failed", "failed", "d"), ("skipped", "skipped", "d"),
               ("ties", "ties", "d"), ("seconds", "seconds", ".1f"))  # fmt: skip
    failed = [f"FAILED {cell['test']}: {cell['message']}" for record in records for cell in record.cells if "test" in cell]
    return "\n".join([tabulate(records, columns), *failed])


SECTION = Section("checks", "do the kernels and the engine compute what they must on this GPU?", run, show, 150.0)
