"""The end of a run: every table, the targets, what is missing, and one line of JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks.gpu import record
from benchmarks.gpu.record import Record
from benchmarks.gpu.sections import SECTIONS, profile
from benchmarks.gpu.sections.base import formatted
from benchmarks.gpu.targets import Outcome, judge
from benchmarks.report import table

FILE, PROFILE = "report.txt", "profile.txt"
KEYS = ("device", "driver", "cuda", "torch", "triton", "transformers", "python", "commit")


def write_report(out: Path) -> str:
    """Write the report and the profiler's tables beside the records, and return the report; its last line is JSON."""
    records = record.read_all(out)
    outcomes = judge(records)
    texts = [_section_text(section.name, section.answers, records, section.show) for section in SECTIONS]
    texts += ["# targets\n\n" + _target_table(outcomes), "# machines\n\n" + "\n".join(_machines(records))]
    line = json.dumps({
        "benchmark": "gpu",
        "machines": _machines(records),
        "parts": {name: found.status for name, found in records.items()},
        "targets": [asdict(outcome) | {"verdict": outcome.verdict} for outcome in outcomes],
    })  # fmt: skip
    text = "\n\n".join([text for text in texts if text]) + f"\n\n{line}\n"
    record.write_text(out / FILE, text)
    kernels = profile.tables([found for found in records.values() if found.section == profile.SECTION.name])
    if kernels:
        record.write_text(out / PROFILE, kernels)
    return text


def _section_text(name: str, answers: str, records: dict[str, Record], show) -> str:  # noqa: ANN001
    mine = [found for found in records.values() if found.section == name]
    if not mine:
        return f"# {name}\n\n{answers}\n\nnot run"
    notes = [f"WARNING: {text}" for found in mine for text in found.warnings]
    for found in mine:
        if found.status != "done":
            notes.append(
                f"{found.name}: {found.status} after {found.seconds:.0f} of {found.bound:.0f} s. {(found.error or '').strip()}"
            )
    try:
        # A copy of the cells, because a table may add columns to them.
        body = show([replace(found, cells=[dict(cell) for cell in found.cells]) for found in mine])
    except Exception as error:  # one table that cannot be made must not cost the others
        body = f"this table cannot be made: {type(error).__name__}: {error}"
    return "\n".join([f"# {name}", "", answers, "", *dict.fromkeys(notes), body])


def _target_table(outcomes: list[Outcome]) -> str:
    rows = [(o.what, formatted(o.wanted, ".4g"), formatted(o.found, ".4g"), o.card or "-", o.verdict) for o in outcomes]
    return table(("target", "wanted", "found", "card", "verdict"), rows)


def _machines(records: dict[str, Record]) -> list[str]:
    """The machines and versions that the records come from; more than one where a run went on elsewhere or later."""
    found = (", ".join(f"{key} {r.machine[key]}" for key in KEYS if key in r.machine) for r in records.values() if r.machine)
    return list(dict.fromkeys(found))
