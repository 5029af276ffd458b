"""What a machine and the limits of a container leave, as the files of Linux tell it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from engine.host_memory import available_memory

MIB = 2**20
MACHINE = {"proc/meminfo": f"MemTotal: {8192 * 1024} kB\nMemFree: 1024 kB\nMemAvailable:    {4096 * 1024} kB\n"}


def group(version: int, folder: str, limit: int | str, usage: int, reclaimable: int = 0) -> dict[str, str]:
    """The files of a control group; numbers are MiB."""
    top, names, entry = {
        1: ("sys/fs/cgroup/memory", ("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_inactive_file"),
        2: ("sys/fs/cgroup", ("memory.max", "memory.current"), "inactive_file"),
    }[version]
    values = (limit if isinstance(limit, str) else str(limit * MIB), str(usage * MIB))
    stat = f"active_file {7 * MIB}\n{entry} {reclaimable * MIB}\n"
    names = (*names, "memory.stat")
    return {f"{top}/{folder}/{name}": f"{value}\n" for name, value in zip(names, (*values, stat), strict=True)}


def available(root: Path, *files: dict[str, str]) -> int:
    for name, content in {name: content for some in files for name, content in some.items()}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return available_memory(root)


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("", {}, 4096),
        ("0::/app\n", group(2, "app", "max", 900), 4096),
        ("0::/app\n", group(2, "app", 1024, 300, 50), 1024 - 300 + 50),
        ("0::/pod/app\n", group(2, "pod", 512, 100) | group(2, "pod/app", 1024, 50), 512 - 100),
        ("0::/\n", group(2, "", 1024, 300), 1024 - 300),
        ("0::/host/path/app\n", group(2, "", 1024, 300), 1024 - 300),
        ("0::/../outside\n", group(2, "", 1024, 300), 1024 - 300),
        ("0::/app\n", group(2, "app", 100_000, 300), 4096),
        ("0::/app\n", group(2, "app", 100, 300), 0),
        ("5:cpu,memory:/app\n0::/\n", group(1, "app", 1024, 300, 50), 1024 - 300 + 50),
        ("5:memory:/docker/app\n", group(1, "", 1024, 300), 1024 - 300),
        ("5:memory:/app\n", group(1, "app", str(2**63 - 4096), 300), 4096),
        ("5:cpu:/app\n", group(1, "app", 1024, 300), 4096),
    ],
    ids=[
        "no container",
        "no limit",
        "a limit",
        "the limit of a group above",
        "a namespace of its own",
        "the path outside",
        "the path of another namespace",
        "a limit beyond the machine",
        "more used than allowed",
        "version 1",
        "version 1, the path outside",
        "version 1, no limit",
        "version 1, another controller",
    ],
)
def test_what_is_left_is_the_least_that_anybody_leaves(
    tmp_path: Path, groups: str, files: dict[str, str], expected: int
) -> None:
    assert available(tmp_path, MACHINE, {"proc/self/cgroup": groups}, files) == expected * MIB


def test_a_system_that_does_not_say_has_no_bound(tmp_path: Path) -> None:
    assert available(tmp_path) == sys.maxsize
