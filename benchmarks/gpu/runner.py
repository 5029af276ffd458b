"""Runs parts one after the other, each in a process of its own, and keeps what they find.

A process of its own: a kernel that breaks the device's context, or hangs, takes only its part along, and memory is free again
afterwards. A part whose file exists is skipped, so that a run goes on where the last one stopped; one that was under
way then is begun anew.
"""

from __future__ import annotations

import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.gpu import record
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.record import Record
from benchmarks.gpu.sections import SECTIONS
from benchmarks.gpu.sections.base import Section
from benchmarks.gpu.sections.checks import warnings

ROOT = Path(__file__).parents[2]
REPORT = "report"
"""Named as a section, it runs nothing, and the report is written all the same."""

GRACE_SECONDS = 90.0
"""For imports, a model's weights and one cell under way, beyond a part's own time."""

LATE_SECONDS = 20.0
"""How much later than its minutes a run may end."""


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a section."""

    section: Section
    part: str

    @property
    def name(self) -> str:
        """Of its file."""
        return Record(self.section.name, self.part).name


def all_parts(models: Sequence[str], names: Sequence[str] = ()) -> list[Part]:
    """The parts to run, in order; ``names`` are those of sections or of parts, none: all. Raises ValueError for others."""
    parts = [Part(section, part) for section in SECTIONS for part in section.parts(list(models))]
    unknown = set(names) - {part.name for part in parts} - {part.section.name for part in parts} - {REPORT}
    if unknown:
        raise ValueError(f"unknown sections {sorted(unknown)}: use {', '.join(s.name for s in SECTIONS)} or a part of one")
    return [part for part in parts if not names or part.name in names or part.section.name in names]


def run_part(bench: Bench, part: Part) -> Record:
    """Run a part here, and write its file after every cell."""
    section, begun = part.section, time.perf_counter()
    machine = record.provenance(bench.device) | {"is_dry_run": bench.is_dry}
    found = Record(section.name, part.part, command=record.command_line(), machine=machine)
    if section.name != "checks":
        found.warnings = warnings(record.read(bench.out, "checks"))
    try:
        with torch.inference_mode():
            for cell in section.run(bench, part.part):
                found.cells.append(cell)
                found.seconds = time.perf_counter() - begun
                record.write(bench.out, found)
                if found.seconds > section.seconds:
                    found.status = "cut"
                    break
        found.status = "done" if found.status == "running" else found.status
    except Exception:
        found.status, found.error = "failed", traceback.format_exc(limit=12)
    found.seconds = time.perf_counter() - begun
    record.write(bench.out, found)
    return found


def run_apart(bench: Bench, part: Part, arguments: Sequence[str], seconds_left: float = float("inf")) -> Record:
    """Run a part in a process of its own; whatever ends it, there is a record afterwards.

    One that is killed because no seconds are left, before its own time is over, is begun anew by the next run.
    """
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments, "--part", part.name]
    own_limit = part.section.seconds + GRACE_SECONDS
    limit = min(own_limit, seconds_left)
    record.path_of(bench.out, part.name).unlink(missing_ok=True)
    problem = ""
    try:
        ended = subprocess.run(command, cwd=ROOT, timeout=limit, check=False).returncode
        if ended:
            problem = f"the process ended with {ended}"
    except subprocess.TimeoutExpired:
        problem = f"killed after {limit:.0f} s" if limit == own_limit else ""
    found = record.read(bench.out, part.name) or Record(part.section.name, part.part)
    if problem and found.status == "running":
        found.status, found.error = "failed", problem
        record.write(bench.out, found)
    return found


def run_all(bench: Bench, parts: Sequence[Part], minutes: float, arguments: Sequence[str] | None) -> list[Part]:
    """Run what has no file yet, as far as the time allows; returns what is left. ``arguments`` None: all in this process.

    A part is not begun if it might not end in time; a shorter one behind it may still be.
    """
    begun, left = time.perf_counter(), []
    for part in parts:
        spent = time.perf_counter() - begun
        found = record.read(bench.out, part.name)
        if found is not None and found.status != "running":  # that of a run which was broken off is begun anew
            print(f"{part.name}: there already", flush=True)
            continue
        if spent + part.section.seconds > 60 * minutes:
            left.append(part)
            continue
        print(f"{part.name}: {part.section.answers}", flush=True)
        left_over = 60 * minutes + LATE_SECONDS - spent
        found = run_part(bench, part) if arguments is None else run_apart(bench, part, arguments, left_over)
        print(f"{part.name}: {found.status}, {len(found.cells)} cells, {found.seconds:.0f} s", flush=True)
        if found.error is not None:
            print(found.error, flush=True)
        record.bundle(bench.out)
    return left
