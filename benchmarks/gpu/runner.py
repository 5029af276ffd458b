"""Runs parts one after the other, each in a process of its own, and keeps what they find.

A process of its own: a kernel that breaks the device's context, or hangs, takes only its part along, and memory is free again
afterwards. A part that has a record is skipped, so that a run goes on where the last one stopped; one that was under
way then is begun anew.
"""

from __future__ import annotations

import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from benchmarks.gpu import record
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.processes import run_group
from benchmarks.gpu.record import Record
from benchmarks.gpu.report import write_report
from benchmarks.gpu.sections import SECTIONS
from benchmarks.gpu.sections.base import Section
from benchmarks.gpu.sections.checks import CHECKS, warnings
from benchmarks.report import ROOT

REPORT = "report"
"""Named as a section, it runs nothing, and the report is written all the same."""

GRACE_SECONDS = 90.0
"""For one cell under way, beyond a part's own time; a short part has as much again."""

LATE_SECONDS = 20.0
"""How much later than its minutes a run may end, the time apart that a process gets to end when it is asked to."""

LEAST_SECONDS = 40.0
"""With less than this no part is worth beginning, unless it is meant to be shorter."""


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a section."""

    section: Section
    part: str

    @property
    def name(self) -> str:
        """Of its record."""
        return Record(self.section.name, self.part).name


def all_parts(models: Sequence[str], names: Sequence[str] = ()) -> list[Part]:
    """The parts to run, in order; ``names`` are those of sections or of parts, none: all. Raises ValueError for others."""
    parts = [Part(section, part) for section in SECTIONS for part in section.parts(list(models))]
    unknown = set(names) - {part.name for part in parts} - {part.section.name for part in parts} - {REPORT}
    if unknown:
        raise ValueError(f"unknown sections {sorted(unknown)}: use {', '.join(s.name for s in SECTIONS)} or a part of one")
    return [part for part in parts if not names or part.name in names or part.section.name in names]


def run_part(bench: Bench, part: Part, seconds: float | None = None) -> Record:
    """Run a part here, for so many seconds (None: as many as its section wants), and write its record after every cell.

    A record of before is kept until there are as many cells again, or the part is done: a second try that is cut shorter costs
    nothing.
    """
    section, begun = part.section, time.perf_counter()
    bound = section.seconds if seconds is None else min(seconds, section.seconds)
    before = record.read(bench.out, part.name)
    found = Record(section.name, part.part, command=record.command_line(), bound=bound)
    bench.deadline = begun + bound

    def keep() -> None:
        found.seconds = time.perf_counter() - begun
        if before is None or found.status == "done" or len(found.cells) >= len(before.cells):
            record.write(bench.out, found)

    try:
        found.machine = record.provenance(bench.device) | {"is_dry_run": bench.is_dry}
        if section.name not in CHECKS:
            found.warnings = warnings(record.read(bench.out, "checks"))
        with torch.inference_mode():
            for cell in section.run(bench, part.part):
                found.cells.append(cell)
                keep()
                if found.seconds > bound:
                    found.status = "cut"
                    break
        found.status = "done" if found.status == "running" else found.status
    except Exception:
        found.status, found.error = "failed", traceback.format_exc(limit=12)
    keep()
    return found


def run_apart(
    bench: Bench, part: Part, arguments: Sequence[str], seconds: float | None = None, seconds_left: float = float("inf")
) -> Record:
    """Run a part in a process of its own for so many seconds, imports included; whatever ends it, there is a record afterwards.

    One that is killed because no seconds are left, before its own time is over, is begun anew by the next run. What it has
    started itself, compilers for example, is killed with it.
    """
    bound = part.section.seconds if seconds is None else seconds
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments, "--part", part.name, "--until", f"{time.time() + bound:.1f}"]
    own_limit = bound + min(bound, GRACE_SECONDS)
    limit = min(own_limit, seconds_left)
    problem = ""
    try:
        ended = run_group(command, ROOT, limit)
        if ended:
            problem = f"the process ended with {ended}"
    except subprocess.TimeoutExpired:
        problem = f"killed after {limit:.0f} s" if limit == own_limit else ""
    found = record.read(bench.out, part.name) or Record(part.section.name, part.part, bound=bound)
    if problem and found.status == "running":
        found.status, found.error = "failed", problem
        record.write(bench.out, found)
    return found


def run_all(
    bench: Bench,
    parts: Sequence[Part],
    minutes: float,
    arguments: Sequence[str] | None,
    wanted: Mapping[str, float] | None = None,
    retry: bool = False,
) -> list[Part]:
    """Run what has no record yet, as far as the time allows; returns what is left. ``arguments`` None: all in this process.

    Where the parts want more than there is, all of them are given less: each its share of the time that is left. ``wanted``
    are their seconds by name; what it lacks wants its section's. ``retry``: what failed or was given less is run again.
    """
    begun, waiting = time.perf_counter(), []
    for part in parts:
        found = record.read(bench.out, part.name)
        if found is None or found.status == "running" or (retry and is_short(part, found)):
            waiting.append(part)  # what was under way when a run was broken off is begun anew
        else:
            print(f"{part.name}: there already", flush=True)
    while waiting:
        left = 60 * minutes - (time.perf_counter() - begun)
        needs = [(wanted or {}).get(part.name, part.section.seconds) for part in waiting]
        least = min(LEAST_SECONDS, needs[0])
        if left < least:
            break
        part = waiting.pop(0)
        seconds = min(part.section.seconds, max(least, left * (needs[0] / sum(needs))))
        print(f"{part.name}, {seconds:.0f} s: {part.section.answers}", flush=True)
        if arguments is None:
            found = run_part(bench, part, seconds)
        else:
            found = run_apart(bench, part, arguments, seconds, left + LATE_SECONDS)
        print(f"{part.name}: {found.status}, {len(found.cells)} cells, {found.seconds:.0f} s", flush=True)
        if found.error is not None:
            print(found.error, flush=True)
        write_report(bench.out)
    return waiting


def is_short(part: Part, found: Record) -> bool:
    """Whether a second try may find more."""
    is_red = any(cell.get("is_red") for cell in found.cells)
    return is_red or found.status == "failed" or (found.status == "cut" and found.bound < part.section.seconds)
