"""The file of a run: what every part has found, written after every cell; it alone is enough to go on with.

Writing is atomic: a reader finds the file of before or the whole new one. A part that was killed leaves what it had.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import machine

FILE = "results.json"

Cell = dict[str, Any]
"""One line of a result: what was measured, under which names, in plain numbers and strings."""


@dataclass(slots=True)
class Record:
    """What a part has found. ``status``: ``running``, ``done``, ``cut`` (its time was over) or ``failed`` (see ``error``).

    ``bound``: the seconds that it was given, which may be fewer than its section wants.
    """

    section: str
    part: str
    status: str = "running"
    error: str | None = None
    seconds: float = 0.0
    bound: float = 0.0
    warnings: list[str] = field(default_factory=list)
    command: str = ""
    machine: dict[str, Any] = field(default_factory=dict)
    cells: list[Cell] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The section's, and the part's behind it."""
        return f"{self.section}.{self.part}".rstrip(".")


def write_text(path: Path, text: str) -> None:
    """Write a file at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def read_all(out: Path) -> dict[str, Record]:
    """All records by name."""
    return {name: Record(**values) for name, values in _parts(out).items()}


def read(out: Path, name: str) -> Record | None:
    """A part's record, None where there is none."""
    values = _parts(out).get(name)
    return None if values is None else Record(**values)


def write(out: Path, record: Record) -> None:
    """Write a part's record among the others. Parts run one after the other, so that nobody else writes meanwhile."""
    parts = _parts(out) | {record.name: asdict(record)}
    write_text(out / FILE, json.dumps({"benchmark": "gpu", "parts": dict(sorted(parts.items()))}) + "\n")


def _parts(out: Path) -> dict[str, dict[str, Any]]:
    path = out / FILE
    return dict(json.loads(path.read_text(encoding="utf-8"))["parts"]) if path.exists() else {}


def provenance(device: torch.device) -> dict[str, Any]:
    """The machine, driver, versions and commit that numbers belong to."""
    found = machine(device) | {"numpy": _version("numpy"), "triton": _version("triton")}
    if device.type == "cuda":
        # Properties alone: asking for free memory would take some, which tests of memory that run beside this would notice.
        total = torch.cuda.get_device_properties(device).total_memory
        found |= {"cuda": torch.version.cuda, "memory": total, "driver": _driver()}
    return found


def command_line() -> str:
    """How this process was started."""
    return " ".join(["python3", "-m", "benchmarks.gpu", *sys.argv[1:]])


def _version(module: str) -> str:
    try:
        return str(__import__(module).__version__)
    except ImportError:
        return "absent"


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip().replace("\n", "; ") or "unknown"
