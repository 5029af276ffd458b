"""What machine code for a GPU tells: registers, stack, and the instructions of a loop."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter

from triton import knobs

_LABEL = re.compile(r"^\s*(\.L_x_\d+):")
_BRANCH = re.compile(r"\bBRA\b.*`\((\.L_x_\d+)\)")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)")
PRODUCTS = ("HGMMA", "HMMA")
"""Tensor-core instructions: asynchronous ones of a group of four warps, and those of one warp."""


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and its bytes of stack: what did not fit them."""
    report = _inspect(cubin, knobs.nvidia.cuobjdump.path, "--dump-resource-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+)", report)
    assert found, report
    return int(found[1]), int(found[2])


def disassembled(cubin: bytes) -> str:
    """The instructions as text."""
    return _inspect(cubin, knobs.nvidia.nvdisasm.path, "--print-code")


def loops_with_products(code: str) -> list[Counter[str]]:
    """Instructions by name of every innermost loop that multiplies matrices, in the order of the code."""
    lines, places, spans = code.splitlines(), {}, []
    for number, line in enumerate(lines):
        if label := _LABEL.match(line):
            places[label[1]] = number
        elif (branch := _BRANCH.search(line)) and branch[1] in places:
            spans.append((places[branch[1]], number))
    innermost = [(a, b) for a, b in spans if not any(a < first and last < b for first, last in spans)]
    counts = [Counter(m[1] for m in map(_INSTRUCTION.search, lines[a : b + 1]) if m) for a, b in sorted(innermost)]
    return [count for count in counts if any(count[name] for name in PRODUCTS)]


def _inspect(cubin: bytes, *command: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([*command, file.name], check=True, capture_output=True, text=True).stdout
