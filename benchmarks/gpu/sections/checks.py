"""Correctness first: the tests that need a GPU. Speed of a wrong result counts nothing."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.record import Cell, Record
from benchmarks.gpu.sections.base import Cells, Section, tabulate

ROOT = Path(__file__).parents[3]
TESTS, AT_A_TIME = "tests/gpu", 4
_ENGINE = re.compile(r"^from (tests\.)?engine\b", re.MULTILINE)
SECONDS = 480.0


def run(bench: Bench, part: str) -> Cells:
    """One cell a test file, and one a failed test.

    Every file has a process of its own, so that none breaks the others. Those about kernels run together, because most of
    their time is that of compiling; engines, which take the memory that is free, come behind them, one by one.
    """
    deadline = time.monotonic() + SECONDS - 5
    files = sorted((ROOT / TESTS).glob("test_*.py"))
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        runs = [pool.submit(_run_file, file, deadline) for file in files if not _ENGINE.search(file.read_text())]
        for done in as_completed(runs):
            yield from done.result()
    for file in (file for file in files if _ENGINE.search(file.read_text())):
        yield from _run_file(file, deadline)


def _run_file(file: Path, deadline: float) -> list[Cell]:
    return list(_cells_of_file(file, deadline - time.monotonic()))


def _cells_of_file(file: Path, seconds: float) -> Cells:
    if seconds <= 0:
        yield {"file": file.name, "is_red": True, "error": "not begun: the time is over"}
        return
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", str(file), "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False)
        except subprocess.TimeoutExpired:
            yield {"file": file.name, "is_red": True, "error": f"not finished after {seconds:.0f} s"}
            return
        if not report.exists():
            yield {"file": file.name, "is_red": True, "error": f"pytest ended with {done.returncode}: {done.stdout[-300:]}"}
            return
        yield from _cells(file.name, ElementTree.parse(report).getroot(), done.returncode)


def _cells(file: str, suite: ElementTree.Element, returncode: int) -> Cells:
    counts: Cell = {"file": file, "passed": 0, "failed": 0, "skipped": 0, "seconds": 0.0, "ties": 0}
    failures: list[Cell] = []
    for case in suite.iter("testcase"):
        problem = next((found for kind in ("failure", "error") if (found := case.find(kind)) is not None), None)
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


SECTION = Section("checks", "do the kernels and the engine compute what they must on this GPU?", run, show, SECONDS)
