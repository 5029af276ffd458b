"""Which implementation computes a linear layer of a shape at a number of rows: the library, or a tile of the Triton kernel.

Measured once, before the first step is captured, and fixed from then on. Pure but for the timer, so it needs no GPU to test.
"""

from __future__ import annotations

import bisect
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kernels.linear.weight import QuantizedWeight, Weight

ROW_BUCKETS = (16, 32, 48, 64, 96, 128, 160, 192, 256)
"""Rows at which a choice is measured; it holds for all row counts above the bucket before."""

MAX_SECONDS = 60.0
"""Time for all measurements, compilation included; cells that it does not reach are left to the library."""

_GAIN = 0.97
"""A tile is taken when it needs at most this part of the library's time: less of a gain is noise."""

_LARGEST_HEIGHT, _LARGEST_SPLIT = 128, 8
_MIN_SPLIT_STEPS = 4
"""Iterations that a piece of the inner dimension must have, so that its loads overlap."""


@dataclass(frozen=True, slots=True)
class Tile:
    """One configuration: rows, outputs and inputs of a tile, pieces of the inner dimension, warps and pipeline stages."""

    block_m: int
    block_n: int
    block_k: int
    split_k: int = 1
    num_warps: int = 4
    num_stages: int = 4

    def __str__(self) -> str:
        return f"{self.block_m}x{self.block_n}x{self.block_k}/{self.split_k}"


_SHAPES = (
    Tile(16, 64, 64, num_warps=4, num_stages=6),
    Tile(16, 64, 128, num_warps=4, num_stages=4),
    Tile(16, 128, 64, num_warps=4, num_stages=4),
    Tile(16, 128, 128, num_warps=8, num_stages=3),
)
"""What the candidates are made of, at heights and splits that fit the layer."""


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What a choice depends on besides the rows. ``element_size`` is that of the weight, 1 for an eight-bit one."""

    width_out: int
    width_in: int
    element_size: int

    @classmethod
    def of(cls, weight: Weight) -> LayerShape:
        """The shape of a weight."""
        values = weight.values if isinstance(weight, QuantizedWeight) else weight
        return cls(values.shape[0], values.shape[1], values.element_size())

    def buckets(self, max_rows: int) -> tuple[int, ...]:
        """The rows to measure at. Beyond the last bucket only eight-bit weights gain from a kernel of their own."""
        buckets = [*ROW_BUCKETS]
        while self.element_size == 1 and buckets[-1] < max_rows:
            buckets.append(2 * buckets[-1])
        return tuple(rows for before, rows in zip((0, *buckets), buckets, strict=False) if before < max_rows)


def invariant_tile(width_out: int) -> Tile:
    """The one tile of a weight where the bits of a row must not depend on how many there are: a compromise for all row counts.

    Weights with few outputs are split, to fill a device; the choice depends on nothing else.
    """
    return Tile(64, 64, 128, split_k=4 if width_out <= 8192 else 1, num_warps=4, num_stages=4)


@dataclass(frozen=True, slots=True)
class Measurement:
    """One cell: seconds of a call by the library and by the best tile, infinite if none ran. ``tile`` None: the library won."""

    shape: LayerShape
    rows: int
    library_seconds: float
    tile_seconds: float
    tile: Tile | None

    @property
    def seconds(self) -> float:
        """Of the choice."""
        return self.library_seconds if self.tile is None else self.tile_seconds

    @property
    def bytes_per_second(self) -> float:
        """At which the choice streams the weight."""
        return self.shape.width_out * self.shape.width_in * self.shape.element_size / self.seconds


Timer = Callable[[LayerShape, int, Tile | None], float]
"""Seconds of one call at so many rows, by a tile or (None) by the library; infinite for a tile that does not run here."""


Keep = Callable[[Callable[[], "ChoiceTable"]], "ChoiceTable"]
"""Gives what an earlier start has measured, or else what the function measures."""


def measured_anew(measure: Callable[[], ChoiceTable]) -> ChoiceTable:
    """What is given where nothing is kept."""
    return measure()


class ChoiceTable:
    """The choices that were measured. A row count belongs to the smallest bucket that holds it.

    ``is_complete``: the time sufficed for every cell and candidate.
    """

    def __init__(self, measurements: Sequence[Measurement] = (), is_complete: bool = True) -> None:
        self.measurements, self.is_complete = tuple(measurements), is_complete
        self._cells: dict[LayerShape, tuple[list[int], list[Tile | None]]] = {}
        for m in sorted(self.measurements, key=lambda m: m.rows):
            rows, tiles = self._cells.setdefault(m.shape, ([], []))
            rows.append(m.rows)
            tiles.append(m.tile)

    def tile(self, shape: LayerShape, rows: int) -> Tile | None:
        """What computes so many rows; None is the library. Beyond the last bucket eight-bit weights keep its choice."""
        buckets, tiles = self._cells.get(shape, ((), ()))
        place = bisect.bisect_left(buckets, rows)
        if place < len(tiles):
            return tiles[place]
        return tiles[-1] if tiles and shape.element_size == 1 else None

    def to_plain(self) -> list[dict[str, Any]]:
        """The measurements as JSON can hold them; ``of_plain`` reads them."""
        return [
            asdict(m) | {"tile_seconds": m.tile_seconds if math.isfinite(m.tile_seconds) else None} for m in self.measurements
        ]

    @staticmethod
    def of_plain(measurements: Sequence[Mapping[str, Any]]) -> ChoiceTable:
        """From plain data. Raises KeyError or TypeError for other fields."""
        return ChoiceTable([_measurement(values) for values in measurements])

    def lines(self) -> Iterator[str]:
        """The table for a terminal, a line a cell."""
        for m in self.measurements:
            shape = f"{m.shape.width_out} x {m.shape.width_in}, {m.shape.element_size} B"
            yield (
                f"{shape:24} {m.rows:5} rows  library {1e6 * m.library_seconds:8.1f} us  tile {1e6 * m.tile_seconds:8.1f} us  "
                f"{m.bytes_per_second / 1e12:5.2f} TB/s  {m.tile or 'library'}"
            )

    def records(self) -> list[dict[str, Any]]:
        """The table as plain data, for a benchmark's JSON."""
        return [
            {
                "width_out": m.shape.width_out,
                "width_in": m.shape.width_in,
                "element_size": m.shape.element_size,
                "rows": m.rows,
                "library_seconds": m.library_seconds,
                "tile_seconds": m.tile_seconds if math.isfinite(m.tile_seconds) else None,
                "choice": str(m.tile or "library"),
                "bytes_per_second": m.bytes_per_second,
            }
            for m in self.measurements
        ]

    def __str__(self) -> str:
        tiles = sum(m.tile is not None for m in self.measurements)
        return f"Triton at {tiles} of {len(self.measurements)} shapes and row counts"


def _measurement(values: Mapping[str, Any]) -> Measurement:
    seconds, tile = values["tile_seconds"], values["tile"]
    return Measurement(
        LayerShape(**values["shape"]),
        values["rows"],
        values["library_seconds"],
        math.inf if seconds is None else seconds,
        None if tile is None else Tile(**tile),
    )


def candidates(shape: LayerShape, rows: int, num_processors: int) -> Iterator[Tile]:
    """Tiles worth timing: heights that hold the rows, and splits until the programs fill the device about twice."""
    height = min(_LARGEST_HEIGHT, max(16, 1 << (rows - 1).bit_length()))
    for block_m in (height, 64) if rows > _LARGEST_HEIGHT else (height,):
        for base in _SHAPES:
            programs = -(-rows // block_m) * -(-shape.width_out // base.block_n)
            most = shape.width_in // (base.block_k * _MIN_SPLIT_STEPS)
            split = 1
            while split == 1 or (split <= min(most, _LARGEST_SPLIT) and programs * split < 4 * num_processors):
                yield Tile(block_m, base.block_n, base.block_k, split, base.num_warps, base.num_stages)
                split *= 2


def measure(
    shapes: Sequence[LayerShape],
    max_rows: int,
    num_processors: int,
    timer: Timer,
    progress: Callable[[str], None] = lambda message: None,
    max_seconds: float = MAX_SECONDS,
    clock: Callable[[], float] = time.perf_counter,
) -> ChoiceTable:
    """Time the library and the candidates at every bucket, small steps first, until the time is over."""
    deadline = clock() + max_seconds
    cells = sorted((rows, i) for i, shape in enumerate(shapes) for rows in shape.buckets(max_rows))
    measurements = []
    announced = 0
    for rows, i in cells:
        if clock() >= deadline:
            break
        if rows != announced:
            progress(f"timing linear layers at {rows} rows")
            announced = rows
        measurements.append(_measure_cell(shapes[i], rows, num_processors, timer, lambda: clock() >= deadline))
    return ChoiceTable(measurements, clock() < deadline)


def _measure_cell(shape: LayerShape, rows: int, num_processors: int, timer: Timer, is_late: Callable[[], bool]) -> Measurement:
    library, best, best_seconds = timer(shape, rows, None), None, math.inf
    for tile in candidates(shape, rows, num_processors):
        if is_late():
            break
        seconds = timer(shape, rows, tile)
        if seconds < best_seconds:
            best, best_seconds = tile, seconds
    return Measurement(shape, rows, library, best_seconds, best if best_seconds <= _GAIN * library else None)
