"""A start that finds what an earlier one has timed takes it over, and one that it does not belong to times anew."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.decode.auto import GoodputPolicy
from engine.decode.costs import CostTable
from engine.sampling_params import DecodingMode
from tests.engine.priced_steps import PricedSteps
from tests.engine.tiny import tiny_engine, tiny_model


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> PricedSteps:
    priced = PricedSteps(step=1.0, row=0.25)
    priced.replace_the_clock(monkeypatch)
    return priced


@pytest.fixture
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def start(folder: Path | None, architecture: str = "qwen3", num_threads: int = 1, **options: Any) -> CostTable:
    """Put an engine together; returns what its ``auto`` knows of steps."""
    torch.set_num_threads(num_threads)
    core = tiny_engine(tiny_model(architecture), mode=DecodingMode.AUTO, cost_cache=folder, **options)
    policy = core.scheduler.planner.policy_of(DecodingMode.AUTO)
    assert isinstance(policy, GoodputPolicy)
    return policy._costs


def test_the_second_start_takes_over_what_the_first_has_timed(tmp_path: Path, steps: PricedSteps) -> None:
    costs = start(tmp_path)
    timed = steps.num_timed
    assert timed > 0
    assert costs.cost(1, 4) == pytest.approx(1.0 + 0.25 * 4)
    steps.row = 99.0
    assert start(tmp_path) == costs
    assert steps.num_timed == timed, "nothing is timed again"


def test_what_stands_in_the_file_is_what_the_engine_goes_by(tmp_path: Path, steps: PricedSteps) -> None:
    start(tmp_path)
    timed, (file,) = steps.num_timed, tmp_path.glob("costs-*.json")
    content = json.loads(file.read_text())
    content["costs"] |= {"num_requests": [1], "rows": [[1, 11]], "seconds": [[5.0, 7.0]]}
    file.write_text(json.dumps(content))
    assert start(tmp_path).cost(1, 6) == pytest.approx(6.0)
    assert steps.num_timed == timed


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize(
    "other",
    [
        {"num_threads": 2},
        {"architecture": "llama"},
        {"max_num_seqs": 4},
        {"budget": 128},
        {"page_size": 4},
        {"num_branches": 2},
        {"block_length": 4},
    ],
    ids=lambda other: next(iter(other)),
)
def test_another_start_times_anew_and_leaves_the_first_one_its_costs(
    tmp_path: Path, steps: PricedSteps, other: dict[str, Any]
) -> None:
    costs, first = start(tmp_path), steps.num_timed
    steps.row = 0.5
    assert start(tmp_path, **other).cost(1, 4) == pytest.approx(1.0 + 0.5 * 4)
    both = steps.num_timed
    assert both > first
    assert start(tmp_path) == costs
    assert start(tmp_path, **other).cost(1, 4) == pytest.approx(1.0 + 0.5 * 4)
    assert steps.num_timed == both, "each has its own file"


def test_on_a_cpu_nothing_is_kept_unless_it_is_asked_for(
    tmp_path: Path, steps: PricedSteps, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    start(None)
    once = steps.num_timed
    start(None)
    assert steps.num_timed == 2 * once
    assert list(tmp_path.iterdir()) == []
