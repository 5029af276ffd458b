"""What every benchmark prints: a table, then one line of JSON with machine, versions and commit."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from engine.measurement_cache import processor_name

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]

COMMIT_VARIABLE = "TIDAR_COMMIT"
"""The commit of a source tree that is a copy without git's history."""


def machine(device: torch.device) -> dict[str, Any]:
    """The machine and the versions that a number belongs to; ``device`` is the one that the benchmark ran on."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit(),
    }


def commit(root: Path = ROOT) -> str:
    """What git says of the source tree; else ``TIDAR_COMMIT``, else the file ``COMMIT`` in it: a copy may have no history."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=20, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):  # there may be no git at all
        found = ""
    file = root / "COMMIT"
    return found.strip() or os.environ.get(COMMIT_VARIABLE) or (file.read_text().strip() if file.is_file() else "") or "unknown"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned, the first to the left and the others to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        return "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))

    return "\n".join([line(header), "  ".join("-" * w for w in widths), *map(line, rows)])


def finish(name: str, results: Any, out: Path | None, device: torch.device = CPU) -> None:
    """Print the JSON line, and write it to a file if one is wanted."""
    record = json.dumps({"benchmark": name, "machine": machine(device), "results": results})
    print(record)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(record + "\n")
