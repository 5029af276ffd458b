"""Which steps a start captures, in which order, and what it leaves out."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch

from engine import warm_up
from engine.config import SchedulerConfig
from engine.cuda_graphs import ALL_NEEDS, GREEDY
from engine.decode.goodput import Execution
from engine.decode.policy import Drafting
from engine.input_batch import SamplingNeeds
from engine.step import DraftPlan
from engine.step_sizes import StepSizes
from engine.warm_up import capture_steps, follow_goodput

PLANS = [DraftPlan(1, 0, 1), DraftPlan(4, 1, 4)]


class Graphs:
    """Remembers what is captured; steps of more than ``most`` rows find no memory."""

    def __init__(self, most: int = 1 << 20) -> None:
        self.sizes, self.most = StepSizes(8), most
        self.captured: list[tuple[int, int, SamplingNeeds]] = []

    @property
    def num_captured(self) -> int:
        return len(self.captured)

    def prepare(self, num_requests: int, plans: Iterable[DraftPlan], needs: SamplingNeeds = GREEDY) -> None:
        for plan in plans:
            if num_requests * plan.num_rows > self.most:
                raise torch.OutOfMemoryError("no memory")
            self.captured.append((num_requests * plan.num_rows, num_requests, needs))


def capture(graphs: Graphs, seconds: float = 1e6) -> tuple[int, str]:
    said: list[str] = []
    left_out = capture_steps(graphs, PLANS, [GREEDY], 1000, said.append, seconds)  # type: ignore[arg-type]
    return left_out, said[-1]


def test_the_step_that_needs_most_is_captured_first_and_the_others_from_the_cheapest_on() -> None:
    graphs = Graphs()
    assert capture(graphs) == (0, "captured all 16 steps")
    assert graphs.captured[0] == (64, 8, ALL_NEEDS)
    greedy = [rows for rows, _, needs in graphs.captured if needs == GREEDY]
    assert greedy == sorted(greedy)
    assert len(set(graphs.captured)) == len(graphs.captured), "each once"


def test_without_memory_for_large_steps_the_smaller_ones_are_captured() -> None:
    graphs = Graphs(most=20)
    left_out, said = capture(graphs)
    assert said == f"{left_out} of 16 steps are not captured: there is no memory left for them"
    assert {rows for rows, _, _ in graphs.captured} == {1, 2, 4, 8, 16}
    assert left_out == 16 - len(graphs.captured)


def test_without_memory_for_any_step_the_plan_is_chosen_for_uncaptured_ones() -> None:
    timed: list[int] = []

    def timer(num_requests: int, plan: DraftPlan, context: int) -> float:
        timed.append(num_requests)
        return 1.0

    graphs = Graphs(most=0)
    capture(graphs)
    assert graphs.num_captured == 0
    limits = SchedulerConfig(max_num_seqs=8)
    policy = follow_goodput(
        Drafting(4, 1),
        timer,
        timer,
        graphs,
        limits,
        True,
        10,
        1000,
        keep=lambda measure: measure(),  # type: ignore[arg-type]
    )
    assert set(timed) == {1, 2, 4, 8}
    assert policy._execution == Execution(None, True, limits.max_num_batched_tokens)


def test_time_runs_from_the_first_step_on_which_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([1000.0, *(1000.0 + i for i in range(100))])
    monkeypatch.setattr(warm_up.time, "perf_counter", lambda: next(clock))
    graphs = Graphs()
    left_out, said = capture(graphs, seconds=5.5)
    assert 4 < len(graphs.captured) < 8
    assert said == f"{left_out} of 16 steps are not captured: 6 s are over"
