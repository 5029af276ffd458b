"""Launch settings: which are worth measuring, and which of those that were measured belong into the source.

Pure, so that it needs no GPU to test.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from kernels.launch import BlockSettings, WarpSettings
from kernels.paged_attention.settings import MOST_REGISTERS, TileSettings

PROGRAM_SHARED_MEMORY, PROCESSOR_SHARED_MEMORY, RESERVED = 227 * 1024, 228 * 1024, 1024
"""Bytes that one program can use, that a Hopper processor has, and that it keeps for itself of every program's."""

MOST_SPILLS = 64
"""Words: those of the loops that run once or twice a tile; more are spilled in the loop over the prefix."""

TENSOR_CORE_ROWS = 64
"""From this height on products run asynchronously, straight from shared memory."""

HEIGHTS, KEY_BLOCKS, WARPS, STAGES = (16, 64, 128), (64, 128), (2, 4, 8), (2, 3, 4)
MOST_TILES = 4
"""Tiles that a request may have of the smallest height: it is for requests of few rows."""

MIN_SPLITS = (64, 128, 256, 512, 1024)

NORM_SETTINGS = (WarpSettings(128, 32), *(WarpSettings(elements, 16) for elements in (256, 512, 1024, 2048)))
ROPE_SETTINGS = tuple(WarpSettings(elements, 8) for elements in (64, 128, 256, 512))
SWIGLU_SETTINGS = tuple(BlockSettings(block, warps) for block in (512, 1024, 2048) for warps in (2, 4, 8))
LOGITS_SETTINGS = tuple(
    BlockSettings(block, warps) for block in (1024, 2048, 4096, 8192) for warps in (4, 8, 16) if block <= 1024 * warps
)
"""With more than 32 tokens, a thread that makes their noise spills registers."""


ENOUGH = 0.97
"""Other settings are worth a change when they need at most this part of the time: less of a gain is noise."""

Settings = TypeVar("Settings")
Times = Mapping[str, Mapping[Settings, float]]
"""Microseconds by size and settings."""


def shared_bytes(tile: TileSettings, head_dim: int) -> int:
    """Shared memory of a program, in 16 bits: queries, and keys and values of a block for every stage.

    Products that wait for their operands have a stage less to hold, and exchange the weights.
    """
    is_asynchronous = tile.block_m >= TENSOR_CORE_ROWS
    stages, weights = (tile.num_stages, 0) if is_asynchronous else (tile.num_stages - 1, tile.block_m * tile.block_n)
    return 2 * (head_dim * (tile.block_m + 2 * stages * tile.block_n) + weights)


def registers(tile: TileSettings, head_dim: int) -> float:
    """Registers that a thread needs for a loop without spills, as compiled kernels were found to: the output, scores and
    weights, two and a half for each of its 16-byte loads of a block, and forty.
    """
    threads = 32 * tile.num_warps
    scores, loads = tile.block_m * tile.block_n, 2 * tile.block_n * head_dim / 8
    return (tile.block_m * head_dim + 1.5 * scores + 2.5 * loads) / threads + 40


def fits(tile: TileSettings, head_dim: int) -> bool:
    """Whether a processor has the memory and the registers for so many programs."""
    shared = shared_bytes(tile, head_dim)
    return (
        shared <= PROGRAM_SHARED_MEMORY
        and tile.programs_per_processor * (shared + RESERVED) <= PROCESSOR_SHARED_MEMORY
        and registers(tile, head_dim) <= (tile.max_registers or MOST_REGISTERS)
    )


def objection(tile: TileSettings, num_spills: int, shared: int) -> str:
    """Why a compiled kernel is not worth timing, empty if it is. ``num_spills``: words of a thread that no register holds."""
    if num_spills > MOST_SPILLS:
        return f"{num_spills} words of a thread are spilled"
    if tile.programs_per_processor * (shared + RESERVED) > PROCESSOR_SHARED_MEMORY:
        return f"{shared} bytes of shared memory are too many for {tile.programs_per_processor} programs"
    return ""


def attention_tiles(packed: int, head_dim: int) -> Iterator[TileSettings]:
    """Tiles worth timing where a request has ``packed`` query vectors for a key/value head.

    A processor has as many programs as fit, or one less; two warps are for the smallest height.
    """
    heights = [
        m for m in HEIGHTS if m < 2 * max(packed, TENSOR_CORE_ROWS) and (m >= TENSOR_CORE_ROWS or packed <= MOST_TILES * m)
    ]
    for block_m, block_n, warps, stages in itertools.product(heights, KEY_BLOCKS, WARPS, STAGES):
        tile = TileSettings(block_m, block_n, warps, stages)
        if warps >= 4 or block_m < TENSOR_CORE_ROWS:
            most = max((n for n in range(1, 9) if fits(replace(tile, programs_per_processor=n), head_dim)), default=0)
            for programs in range(most, max(most - 2, 0), -1):
                yield replace(tile, programs_per_processor=programs)


def by_height(packed: int, tiles: Sequence[TileSettings]) -> TileSettings:
    """The tile, of some with ascending heights, that a launch takes for requests of equal size."""
    return next((tile for tile in tiles if tile.block_m >= packed), tiles[-1])


def best(times: Times[Settings]) -> tuple[Settings, float] | None:
    """The settings that are best for all sizes together, and how much longer than each size's own best they take in the mean.

    The mean is that of the logarithms. None: no settings ran at every size.
    """
    common = set.intersection(*(set(found) for found in times.values())) if times else set()
    costs = {settings: excess(times, dict.fromkeys(times, settings)) for settings in common}
    return min(costs.items(), key=lambda item: (item[1], str(item[0]))) if costs else None


def excess(times: Times[Settings], chosen: Mapping[str, Settings]) -> float:
    """The geometric mean, over the sizes, of the time with the chosen settings over the time with the size's own best."""
    logs = [math.log(found[chosen[size]] / min(found.values())) for size, found in times.items()]
    return math.exp(sum(logs) / len(logs))


def choose_tiles(times: Times[TileSettings], packed: Mapping[str, int]) -> tuple[TileSettings, ...]:
    """Heights and their tiles that are best for all sizes together; ``packed`` are the query vectors of each size.

    Every set of heights is tried, with the best tile of each for the sizes that take it. Empty: nothing ran everywhere.
    """
    found: list[tuple[float, int, tuple[TileSettings, ...]]] = []
    for count in range(1, len(HEIGHTS) + 1):
        for heights in itertools.combinations(HEIGHTS, count):
            shares = _shares(times, packed, heights)
            tiles = [best(share) for share in shares]
            chosen = tuple(tile[0] for tile in tiles if tile is not None)
            if chosen and len(chosen) == len(tiles):
                cost = excess(times, {size: by_height(packed[size], chosen) for size in times})
                found.append((cost, count, chosen))
    return min(found, key=lambda item: item[:2])[2] if found else ()


def _shares(
    times: Times[TileSettings], packed: Mapping[str, int], heights: Sequence[int]
) -> list[dict[str, dict[TileSettings, float]]]:
    """The times of each height at the sizes that would take it, the lowest height first."""
    shares: dict[int, dict[str, dict[TileSettings, float]]] = {}
    for size, measured in times.items():
        block_m = by_height(packed[size], [TileSettings(m) for m in heights]).block_m
        same = {settings: us for settings, us in measured.items() if settings.block_m == block_m}
        shares.setdefault(block_m, {})[size] = same
    return [shares[m] for m in sorted(shares)]
