"""How kernels on rows are launched: plain data, so that alternatives can be measured beside what a step uses."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WarpSettings:
    """Of a kernel whose program holds a tile at once: a warp for so many elements, up to a number of warps."""

    elements_per_warp: int
    max_warps: int

    def num_warps(self, elements: int) -> int:
        """For a tile of so many elements, a power of two."""
        return min(self.max_warps, max(1, elements // self.elements_per_warp))


@dataclass(frozen=True, slots=True)
class BlockSettings:
    """Of a kernel whose programs share a row: elements of a block, a power of two, and warps of a program."""

    block: int
    num_warps: int
