"""The choice between the library and tiles, on times that a table gives."""

from __future__ import annotations

import itertools
import math

import pytest

from kernels.linear.choice import ROW_BUCKETS, ChoiceTable, LayerShape, Measurement, Tile, candidates, measure

DENSE, EIGHT_BIT = LayerShape(4096, 4096, 2), LayerShape(4096, 4096, 1)
LIBRARY, PROCESSORS = 100e-6, 132


def timer(best: dict[int, float]):
    """The library always takes the same; the fastest tile takes ``best`` of its time at the given rows, others longer."""

    def timed(shape: LayerShape, rows: int, tile: Tile | None) -> float:
        if tile is None:
            return LIBRARY
        is_best = tile == list(candidates(shape, rows, PROCESSORS))[2]
        return LIBRARY * (best.get(rows, 2.0) if is_best else 3.0)

    return timed


def test_a_tile_is_taken_where_it_is_clearly_faster():
    table = measure([DENSE], 256, PROCESSORS, timer({16: 0.5, 32: 0.99, 64: 0.9}))
    third = {rows: list(candidates(DENSE, rows, PROCESSORS))[2] for rows in ROW_BUCKETS}
    chosen = {m.rows: m.tile for m in table.measurements}
    assert chosen == {rows: third[rows] if rows in (16, 64) else None for rows in ROW_BUCKETS}
    assert table.measurements[0].seconds == pytest.approx(50e-6)
    assert table.measurements[1].seconds == LIBRARY
    assert str(table) == "Triton at 2 of 9 shapes and row counts"


def test_rows_between_buckets_take_the_choice_of_the_next_one():
    table = measure([DENSE], 1000, PROCESSORS, timer({16: 0.5, 48: 0.5, 256: 0.5}))
    taken = [rows for rows in range(1, 300) if table.tile(DENSE, rows) is not None]
    assert taken == [*range(1, 17), *range(33, 49), *range(193, 257)]
    assert table.tile(LayerShape(8, 8, 2), 1) is None, "an unknown shape is the library's"


def test_only_eight_bit_weights_are_measured_beyond_the_last_bucket():
    table = measure([DENSE, EIGHT_BIT], 1000, PROCESSORS, timer({1024: 0.5}))
    rows = {shape: [m.rows for m in table.measurements if m.shape == shape] for shape in (DENSE, EIGHT_BIT)}
    assert rows == {DENSE: [*ROW_BUCKETS], EIGHT_BIT: [*ROW_BUCKETS, 512, 1024]}
    assert table.tile(EIGHT_BIT, 5000) == table.tile(EIGHT_BIT, 1024) is not None
    assert table.tile(DENSE, 257) is None
    assert DENSE.buckets(40) == (16, 32, 48)


def test_tiles_that_do_not_run_are_never_chosen():
    table = measure([DENSE], 16, PROCESSORS, lambda shape, rows, tile: LIBRARY if tile is None else math.inf)
    assert table.measurements == (Measurement(DENSE, 16, LIBRARY, math.inf, None),)
    assert table.records()[0]["tile_seconds"] is None
    assert len(list(table.lines())) == 1


def test_small_steps_are_measured_first_and_time_is_bounded():
    """Every look at the clock is a second: what the time does not reach is the library's, even in the middle of a cell."""
    clock = itertools.count(0.0, 1.0).__next__
    seen: list[tuple[int, int]] = []

    def timed(shape: LayerShape, rows: int, tile: Tile | None) -> float:
        if tile is None:
            seen.append((rows, shape.width_out))
        return LIBRARY * (1.0 if tile is None else 0.5)

    other = LayerShape(8192, 4096, 2)
    table = measure([DENSE, other], 256, PROCESSORS, timed, max_seconds=25, clock=clock)
    assert seen == sorted(seen)
    assert 1 < len(seen) < 6
    assert [(m.rows, m.shape.width_out) for m in table.measurements] == seen
    assert table.tile(DENSE, 16) is not None
    assert table.tile(DENSE, 256) is None
    assert not table.is_complete
    assert measure([DENSE, other], 256, PROCESSORS, timed).is_complete


@pytest.mark.parametrize("rows", [1, 16, 40, 96, 160, 256])
@pytest.mark.parametrize("shape", [DENSE, LayerShape(2048, 1536, 2), LayerShape(151936, 4096, 2), LayerShape(64, 48, 2)])
def test_candidates_fill_the_device_and_not_more(shape, rows):
    tiles = list(candidates(shape, rows, PROCESSORS))
    assert len(set(tiles)) == len(tiles) < 40
    assert any(t.split_k == 1 for t in tiles)
    for tile in tiles:
        assert tile.block_m >= min(rows, 64)
        programs = -(-rows // tile.block_m) * -(-shape.width_out // tile.block_n)
        if tile.split_k > 1:
            assert programs * tile.split_k < 4 * PROCESSORS
            assert shape.width_in / tile.split_k >= 4 * tile.block_k
    if shape == DENSE and rows <= 128:
        assert max(t.split_k for t in tiles) >= 4, "64 tiles of outputs leave most of the device idle"


def test_an_empty_table_is_the_library():
    assert ChoiceTable().tile(DENSE, 1) is None
