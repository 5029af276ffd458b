"""Costs are measured once for a key, and again where the file is of no use."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.decode.cost_cache import cached_costs
from engine.decode.goodput import CostTable

TABLE = CostTable((1, 4), ((1, 3), (4, 8)), ((1.0, 2.0), (2.0, 3.0)), per_kv_token=0.01, per_row_token=0.001)
KEY = {"device": "one", "checkpoint": "a"}


class Meter:
    def __init__(self) -> None:
        self.num_calls = 0

    def __call__(self) -> CostTable:
        self.num_calls += 1
        return TABLE


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
    assert cached_costs(None, KEY, meter) == TABLE
    assert meter.num_calls == 3
