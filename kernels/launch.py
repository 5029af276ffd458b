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


RMS_NORM = WarpSettings(elements_per_warp=256, max_warps=16)
ROPE_KV_WRITE = WarpSettings(elements_per_warp=256, max_warps=8)
SWIGLU = BlockSettings(block=1024, num_warps=4)
LOGITS = BlockSettings(block=4096, num_warps=8)
"""What a step uses. A block of logits, tokens of a chunk, is smaller where the vocabulary is."""
