"""Which launch settings are tried, and which of those that were measured are recommended."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks.gpu import tuning
from benchmarks.gpu.sections import tune
from kernels.launch import SWIGLU, BlockSettings
from kernels.paged_attention.settings import ATTENTION, TileSettings

HEAD_DIM = 128
COMPILED = {
    TileSettings(16, 64, 4, 2): 38_912,
    TileSettings(16, 64, 4, 3): 71_680,
    TileSettings(16, 128, 8, 4): 204_800,
    TileSettings(64, 64, 4, 3): 114_688,
    TileSettings(64, 128, 8, 3): 212_992,
    TileSettings(128, 64, 8, 4): 163_840,
    TileSettings(128, 128, 8, 2): 163_840,
}
"""Bytes of shared memory that the compiler takes."""

IN_THE_LOOP = (
    TileSettings(64, 64, 4, 3, 3),
    TileSettings(64, 128, 8, 2, 2),
    TileSettings(128, 64, 4, 2),
    TileSettings(128, 64, 8, 2, 2),
    TileSettings(128, 128, 4, 2),
)
"""Those of which the compiler was seen to spill registers for every block of keys."""


def test_shared_memory_is_what_the_compiler_takes():
    for tile, compiled in COMPILED.items():
        assert tuning.shared_bytes(tile, HEAD_DIM) == compiled, tile


def test_what_spills_in_the_loop_or_needs_too_much_memory_is_left_out():
    for tile in IN_THE_LOOP:
        assert tuning.registers(tile, HEAD_DIM) > (tile.max_registers or 255), tile
    assert not tuning.fits(TileSettings(128, 128, 8, 4), HEAD_DIM), "one program has 227 KiB"
    assert not tuning.fits(TileSettings(64, 64, 4, 4, 2), HEAD_DIM), "a processor has 228 KiB"
    assert tuning.fits(TileSettings(128, 128, 8, 3), HEAD_DIM)


@pytest.mark.parametrize(
    ("packed", "heights"), [(4, {16, 64}), (64, {16, 64}), (68, {64, 128}), (288, {64, 128}), (2048, {64, 128})]
)
def test_candidates(packed, heights):
    tiles = list(tuning.attention_tiles(packed, HEAD_DIM))
    assert len(tiles) == len(set(tiles))
    assert {tile.block_m for tile in tiles} == heights
    assert {tile.block_n for tile in tiles} == {64, 128}
    assert {tile.num_stages for tile in tiles} == {2, 3, 4}
    assert tuning.by_height(packed, ATTENTION.tiles) in tiles, "the present one"
    for tile in tiles:
        assert tuning.fits(tile, HEAD_DIM), tile
        assert tile.block_m == 16 or tile.num_warps >= 4, tile
        more = [dataclasses.replace(tile, programs_per_processor=tile.programs_per_processor + n) for n in (1, 2)]
        assert sum(tuning.fits(m, HEAD_DIM) for m in more) <= 1, "as many programs as fit, or one less"


def test_a_compiled_kernel_may_be_objected_to():
    tile = TileSettings(64, 64, 4, 3, 2)
    assert tuning.objection(tile, 8, 114_688) == ""
    assert "spilled" in tuning.objection(tile, 240, 114_688)
    assert "too many for 2 programs" in tuning.objection(tile, 0, 120_000)


def test_the_best_settings_are_best_for_all_sizes_together():
    times = {"a": {"x": 10.0, "y": 12.0, "z": 9.0}, "b": {"x": 10.0, "y": 8.0}}
    settings, cost = tuning.best(times)
    assert settings == "y", "z did not run everywhere"
    assert cost == pytest.approx((12 / 9 * 8 / 8) ** 0.5)
    assert tuning.best({"a": {"x": 1.0}, "b": {"y": 1.0}}) is None


def test_heights_are_chosen_with_their_tiles():
    low, tall, taller = TileSettings(16), TileSettings(64), TileSettings(128, num_warps=8)
    other = dataclasses.replace(tall, num_stages=2)
    packed = {"few": 4, "some": 68, "many": 512}
    times = {
        "few": {low: 5.0, tall: 4.0, other: 6.0},
        "some": {tall: 9.0, other: 8.0, taller: 7.0},
        "many": {tall: 20.0, other: 18.0, taller: 12.0},
    }
    assert tuning.choose_tiles(times, packed) == (tall, taller)
    times["few"][low] = 2.0
    assert tuning.choose_tiles(times, packed) == (low, taller)
    times["many"] = {other: 18.0}
    assert tuning.choose_tiles(times, packed) == (low, other), "what did not run at a size is not taken for it"
    assert tuning.choose_tiles({"few": {}}, packed) == ()


def cell(size: str, settings: BlockSettings, us: float | None, of: int = 2) -> dict:
    found = {"kernel": "swiglu", "size": size, "settings": dataclasses.asdict(settings), "text": str(settings), "of": of}
    return found | {"is_now": settings == SWIGLU} | ({"error": "it differs"} if us is None else {"us": us})


def test_the_source_is_told_what_to_say():
    other = BlockSettings(2048, 8)
    measured = [cell("a", SWIGLU, 10.0), cell("a", other, 9.0), cell("b", SWIGLU, 10.0), cell("b", other, 8.1)]
    cut = [cell("c", SWIGLU, 1.0, of=3), cell("c", other, 9.0, of=3)]
    (line,) = tune.recommend(measured + cut)
    assert line == f"kernels/launch.py: SWIGLU = {other!r}  # best found: 0.854 of the present time over 2 sizes"
    (line,) = tune.recommend([cell("a", SWIGLU, 10.0), cell("a", other, 9.9)])
    assert f"SWIGLU = {SWIGLU!r}  # best found: 0.990" in line, "too little to change anything"
    (line,) = tune.recommend([cell("a", SWIGLU, None), cell("a", other, 9.9)])
    assert line.endswith(f"{other!r}  # the present ones did not run at a")
    (line,) = tune.recommend([*measured, cell("d", SWIGLU, None), cell("d", other, None)])
    assert line.endswith("over 2 sizes"), "a size where nothing ran says nothing"


def test_failures_are_shown(tmp_path):
    from benchmarks.gpu.record import Record

    text = tune.show([Record("tune", "rows", cells=[cell("a", SWIGLU, 10.0), cell("a", BlockSettings(512, 2), None)])])
    assert "swiglu, BlockSettings(block=512, num_warps=2): it differs" in text
    assert "SWIGLU = " in text.splitlines()[-1]
