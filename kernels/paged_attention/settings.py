"""How the Triton attention is launched: plain data, so that alternatives can be measured beside what a step uses."""

from __future__ import annotations

from dataclasses import dataclass

import torch

PROCESSOR_REGISTERS, MOST_REGISTERS = 64 * 1024, 255
"""Registers of a processor, and the most that a thread can have."""


@dataclass(frozen=True, slots=True)
class TileSettings:
    """How tiles of one height run.

    ``block_m``: query vectors of a tile. ``block_n``: keys of a block. ``num_stages``: blocks that are loaded or used at once.
    ``programs_per_processor``: size of the persistent grid over that of the device. Registers are shared out by it; shared
    memory, which follows from the other fields, has to suffice.
    """

    block_m: int
    block_n: int = 64
    num_warps: int = 4
    num_stages: int = 3
    programs_per_processor: int = 1

    @property
    def max_registers(self) -> int | None:
        """That a thread may have so that all programs fit a processor; None: as many as there are."""
        share = PROCESSOR_REGISTERS // (self.programs_per_processor * self.num_warps * 32) // 8 * 8
        return share if share < MOST_REGISTERS else None

    def __str__(self) -> str:
        launch = f"{self.num_warps} warps, {self.num_stages} stages, {self.programs_per_processor} a processor"
        return f"{self.block_m}x{self.block_n}, {launch}"


@dataclass(frozen=True, slots=True)
class AttentionSettings:
    """``tiles``: the heights to choose from, the lowest first. ``min_split``: tokens of context below which a program of its
    own does not pay. ``split_size``: positions of a segment in the batch-invariant setting, whose bits depend on it and on the
    tile; otherwise 0. ``num_programs``: size of the grid, None: what the device holds at once.
    """

    tiles: tuple[TileSettings, ...]
    min_split: int = 256
    split_size: int = 0
    num_programs: int | None = None


ATTENTION = AttentionSettings(
    (
        TileSettings(16, programs_per_processor=3),
        TileSettings(64, programs_per_processor=2),
        TileSettings(128, num_warps=8),
    )
)
"""As many programs as a Hopper processor holds at head size 128, which ``tests/kernels/compile_for_gpu.py`` checks."""

INVARIANT = AttentionSettings((TileSettings(64, programs_per_processor=2),), split_size=1024)

FLOAT32 = AttentionSettings((TileSettings(16, 32, num_stages=2, programs_per_processor=3), TileSettings(32, 32, num_stages=2)))
INVARIANT_FLOAT32 = AttentionSettings((TileSettings(32, 32, num_stages=2),), split_size=1024)
"""For tests."""


def settings_for(dtype: torch.dtype, batch_invariant: bool = False) -> AttentionSettings:
    """What a step uses."""
    if dtype == torch.float32:
        return INVARIANT_FLOAT32 if batch_invariant else FLOAT32
    return INVARIANT if batch_invariant else ATTENTION
