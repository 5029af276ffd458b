"""The files of a run: one JSON a part, written after every cell, and all of them in one file that alone is enough to go on.

Writing is atomic: a reader finds the file of before or the whole new one. A part that was killed leaves what it had.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import machine

ALL = "results.json"

Cell = dict[str, Any]
"""One line of a result: what was measured, under which names, in plain numbers and strings."""


@dataclass(slots=True)
class Record:
    """What a part has found. ``status``: ``running``, ``done``, ``cut`` (its time was over) or ``failed`` (see ``error``)."""

    section: str
    part: str
    status: str = "running"
    error: str | None = None
    seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)
    command: str = ""
    machine: dict[str, Any] = field(default_factory=dict)
    cells: list[Cell] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Of the file."""
        return f"{self.section}.{self.part}".rstrip(".")


def path_of(out: Path, name: str) -> Path:
    """The file of a part."""
    return out / f"{name}.json"


def write_text(path: Path, text: str) -> None:
    """Write a file at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def write(out: Path, record: Record) -> None:
    """Write a part's file."""
    write_text(path_of(out, record.name), json.dumps(asdict(record), indent=1) + "\n")


def read(out: Path, name: str) -> Record | None:
    """A part's record, None where there is none."""
    path = path_of(out, name)
    return Record(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def read_all(out: Path) -> dict[str, Record]:
    """All records by name."""
    names = sorted(path.stem for path in out.glob("*.json") if path.name != ALL)
    return {name: record for name in names if (record := read(out, name)) is not None}


def bundle(out: Path) -> None:
    """Gather all parts in one file."""
    records = {name: asdict(record) for name, record in read_all(out).items()}
    write_text(out / ALL, json.dumps({"benchmark": "gpu", "parts": records}) + "\n")


def unbundle(out: Path) -> None:
    """Write the parts of the gathered file that have no file of their own: those of a run on another machine."""
    if (out / ALL).exists():
        for name, values in json.loads((out / ALL).read_text(encoding="utf-8"))["parts"].items():
            if not path_of(out, name).exists():
                write(out, Record(**values))


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
