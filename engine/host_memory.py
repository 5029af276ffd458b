"""How much more memory this process may take: what the machine has left, and what the limits of its container leave.

A container's limit is that of a control group, of version 1 or 2, and the limits of the groups above it hold as well. The group
of a process is looked for where ``/proc`` says, and at the top, where a container that sees the path outside has its own.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class _GroupFiles:
    """Where groups are, the files of a group, and its page cache that gives way, an entry of ``memory.stat``."""

    top: str
    limit: str
    usage: str
    reclaimable: str


_VERSION_1 = _GroupFiles("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_VERSION_2 = _GroupFiles("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file")


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that this process may still take; ``sys.maxsize`` where the system does not say.

    ``root``: the folder in which ``proc`` and ``sys`` are.
    """
    known = [left for left in (_left_by_machine(root), *_left_by_groups(root)) if left is not None]
    return max(0, min(known, default=sys.maxsize))


def _left_by_machine(root: Path) -> int | None:
    lines = (line.split() for line in _lines(root / "proc/meminfo"))
    return next((1024 * int(words[1]) for words in lines if words[0] == "MemAvailable:"), None)


def _left_by_groups(root: Path) -> Iterator[int | None]:
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if not controllers:
            files = _VERSION_2
        elif "memory" in controllers.split(","):
            files = _VERSION_1
        else:
            continue
        top = root / files.top
        group = top / path.lstrip("/")
        yield from (_left_by_group(folder, files) for folder in (group, *group.parents) if folder.is_relative_to(top))


def _left_by_group(folder: Path, files: _GroupFiles) -> int | None:
    limit, usage = (next(iter(_lines(folder / name)), "max") for name in (files.limit, files.usage))
    if "max" in (limit, usage):  # there is no limit, or no such group
        return None
    entries = (line.split() for line in _lines(folder / "memory.stat"))
    reclaimable = next((int(words[1]) for words in entries if words[0] == files.reclaimable), 0)
    return int(limit) - int(usage) + reclaimable


def _lines(file: Path) -> list[str]:
    """None at all where the file cannot be read."""
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
