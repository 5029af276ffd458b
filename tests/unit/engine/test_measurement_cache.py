"""Costs are measured once for a key, and again where the file is of no use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from engine.config import EngineConfig
from engine.decode.costs import CostTable
from engine.measurement_cache import MeasurementCache
from kernels.linear.choice import ChoiceTable, LayerShape, Measurement, Tile

TABLE = CostTable((1, 4), ((1, 3), (4, 8)), ((1.0, 2.0), (2.0, 3.0)), per_kv_token=0.01, per_row_token=0.001)
KEY = {"device": "one", "checkpoint": "a"}


class Meter:
    def __init__(self) -> None:
        self.num_calls = 0

    def __call__(self) -> CostTable:
        self.num_calls += 1
        return TABLE


def cached_costs(folder: Path | None, key: Mapping[str, str], measure: Meter) -> CostTable:
    return MeasurementCache(folder, key).get("costs", measure, asdict, CostTable.of_plain)


def test_costs_are_measured_once_for_a_key(tmp_path: Path) -> None:
    meter, folder = Meter(), tmp_path / "made" / "when needed"
    assert [cached_costs(folder, KEY, meter) for _ in range(3)] == [TABLE] * 3
    assert meter.num_calls == 1
    assert cached_costs(folder, {**KEY, "device": "two"}, meter) == TABLE
    assert meter.num_calls == 2
    assert len(list(folder.iterdir())) == 2, "nothing is left lying about"


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"key": {}, "costs": {}}', '{"key": {"device": "one", "checkpoint": "a"}}']
)
def test_a_file_that_is_of_no_use_is_replaced(tmp_path: Path, content: str) -> None:
    meter = Meter()
    cached_costs(tmp_path, KEY, meter)
    (file,) = tmp_path.iterdir()
    file.write_text(content)
    assert [cached_costs(tmp_path, KEY, meter) for _ in range(2)] == [TABLE] * 2
    assert meter.num_calls == 2


def test_a_folder_that_cannot_be_written_costs_a_measurement_and_no_more(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    meter = Meter()
    assert [cached_costs(blocked, KEY, meter) for _ in range(2)] == [TABLE] * 2
    said: list[str] = []
    assert MeasurementCache(blocked, KEY, said.append).get("costs", lambda: TABLE, asdict, CostTable.of_plain) == TABLE
    assert "cannot be kept" in said[0]
    assert str(blocked) in said[0]
    assert cached_costs(None, KEY, meter) == TABLE
    assert meter.num_calls == 3


def test_kinds_and_what_else_they_depend_on_are_kept_apart(tmp_path: Path) -> None:
    cache, meter = MeasurementCache(tmp_path, KEY), Meter()
    for more in ("a", "b", "a"):
        assert cache.get("costs", meter, asdict, CostTable.of_plain, more=more) == TABLE
    assert meter.num_calls == 2
    shape = LayerShape(8, 4, 2)
    cells = (Measurement(shape, 16, 2.0, 1.0, Tile(16, 64, 64)), Measurement(shape, 32, 1.0, float("inf"), None))
    for measured in (cells, ()):
        table = cache.get("linear", lambda: ChoiceTable(measured), ChoiceTable.to_plain, ChoiceTable.of_plain)  # noqa: B023
        assert table.measurements == cells


def test_what_should_not_be_kept_is_measured_again(tmp_path: Path) -> None:
    cache, meter = MeasurementCache(tmp_path, KEY), Meter()
    for _ in range(2):
        assert cache.get("costs", meter, lambda table: None, CostTable.of_plain) == TABLE
    assert meter.num_calls == 2
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_kept_where_nobody_has_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", nobody)
    cache = MeasurementCache.of_device(EngineConfig("model", cost_cache="~/kept"), torch.device("cpu"), "reference")
    meter = Meter()
    assert [cache.get("costs", meter, asdict, CostTable.of_plain) for _ in range(2)] == [TABLE] * 2
    assert meter.num_calls == 2
