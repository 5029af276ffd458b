"""Measured step costs, kept between starts: one JSON file for each machine, checkpoint and configuration.

The time of a step depends on the device and the code as well, so that both are part of the key: another GPU, another version
of torch or another source of the engine or its kernels is measured anew. A file that cannot be read or written costs a
measurement, never a start.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engine.decode.goodput import CostTable


def cached_costs(folder: Path | None, key: Mapping[str, str], measure: Callable[[], CostTable]) -> CostTable:
    """The costs kept under this key in ``folder``, or else measured and kept. None: nothing is kept."""
    if folder is None:
        return measure()
    name = hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()[:32]
    file = folder / f"costs-{name}.json"
    kept = _read(file, key)
    if kept is not None:
        return kept
    costs = measure()
    _write(file, {"key": dict(key), "costs": asdict(costs)})
    return costs


def _read(file: Path, key: Mapping[str, str]) -> CostTable | None:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return costs_from(content["costs"]) if content["key"] == dict(key) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def costs_from(values: Mapping[str, Any]) -> CostTable:
    """The table of a JSON object. Raises TypeError for one with other fields."""
    return CostTable(**{name: _as_tuples(value) for name, value in values.items()})


def _as_tuples(value: Any) -> Any:
    return tuple(_as_tuples(v) for v in value) if isinstance(value, list) else value


def _write(file: Path, content: Mapping[str, Any]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # Written aside and moved: two servers that start at once never read half a file.
        with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".tmp", delete=False, encoding="utf-8") as aside:
            json.dump(content, aside)
        os.replace(aside.name, file)
    except OSError:
        return
