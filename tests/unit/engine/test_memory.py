"""How many KV pages there are, with memory that a table describes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import torch

from engine.config import ConfigError, SchedulerConfig
from engine.memory import GIB, GpuBudget, PageNeeds, largest_steps, measure_budget, pages_on_cpu, pages_on_gpu
from engine.step import DraftPlan

MIB = 2**20
NEEDS = PageNeeds(page_size=64, page_bytes=9 * MIB, max_model_len=4096, wanted=None)
BUDGET = GpuBudget(total=80 * GIB, utilization=0.9, held=20 * GIB, activations=3 * GIB, max_rows=1024)


@dataclass
class TableMemory:
    """A device with so many bytes, of which weights take some; a step takes some and leaves some behind."""

    total: int = 80 * GIB
    held: int = 16 * GIB
    step: int = 3 * GIB
    left: int = GIB
    is_enough: bool = True
    runs: list[str] = field(default_factory=list)

    def free(self) -> int:
        return self.total - self.held

    def peak(self, run: Callable[[], None]) -> int:
        run()
        if not self.is_enough:
            raise torch.OutOfMemoryError
        self.held += self.left
        return self.step


@pytest.mark.parametrize("has_graphs", [False, True])
def test_what_is_held_and_what_the_largest_step_needs_is_taken_off(has_graphs):
    memory = TableMemory()
    budget = measure_budget(memory, 0.9, lambda: memory.runs.append("run"), 1024, has_graphs)
    assert memory.runs == ["run"]
    assert (budget.held, budget.activations) == (17 * GIB, (6 if has_graphs else 3) * GIB)
    assert budget.for_pages == 72 * GIB - budget.held - budget.activations


def test_pages_fill_what_is_left():
    assert pages_on_gpu(NEEDS, BUDGET) == 49 * GIB // (9 * MIB)
    wanted = PageNeeds(64, 9 * MIB, 4096, wanted=100)
    assert pages_on_gpu(wanted, BUDGET) == 100


def error_of(action: Callable[[], object]) -> str:
    with pytest.raises(ConfigError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_too_small_a_gpu_is_told_with_numbers():
    tight = GpuBudget(24 * GIB, 0.9, 18 * GIB, 3 * GIB, 1024)
    message = error_of(lambda: pages_on_gpu(PageNeeds(64, 9 * MIB, 40960, None), tight))
    assert message == (
        "the KV cache has room for 67 pages of 64 tokens (9.00 MiB each), but one request of max_model_len 40960 needs 640: of "
        "24.00 GiB, gpu_memory_utilization 0.9 gives 21.60; weights and what else is there hold 18.00, a step of 1024 rows "
        "needs 3.00. Ways out: lower --max-model-len to 4288, raise --gpu-memory-utilization, lower --max-num-batched-tokens "
        "or use --quantization fp8"
    )
    assert pages_on_gpu(PageNeeds(64, 9 * MIB, 4288, None), tight) == 68, "what the message says works"
    nothing = GpuBudget(24 * GIB, 0.9, 22 * GIB, 3 * GIB, 1024)
    message = error_of(lambda: pages_on_gpu(NEEDS, nothing))
    assert "room for 0 pages" in message
    assert "Ways out: raise" in message


def test_a_wanted_number_of_pages_has_to_fit():
    message = error_of(lambda: pages_on_gpu(PageNeeds(64, 9 * MIB, 4096, 10_000), BUDGET))
    assert message.startswith("10000 KV pages take 87.89 GiB, but there is room for 5575: of 80.00 GiB, ")
    assert "lower --num-pages to 5575" in message
    assert pages_on_gpu(PageNeeds(64, 9 * MIB, 4096, 5575), BUDGET) == 5575


def test_a_step_that_does_not_fit_beside_the_weights():
    memory = TableMemory(is_enough=False)
    message = error_of(lambda: measure_budget(memory, 0.9, lambda: None, 1024, has_graphs=False))
    assert "a step of max_num_batched_tokens 1024 rows does not fit into the 64.00 GiB that the weights leave" in message


@pytest.mark.parametrize(("max_num_seqs", "max_model_len", "wanted", "available", "expected"), [
    (3, 4096, None, 64 * GIB, 1 + 3 * 64),
    (1000, 4096, None, 64 * GIB, 1 + 227),
    (1000, 40960, None, 64 * GIB, 1 + 640),
    (1000, 4096, None, sys.maxsize, 1 + 227),
    (1000, 4096, None, 2 * GIB, 113),
    (4, 4096, 65, 64 * GIB, 65),
    (4, 4096, 227, 2 * GIB, 227),
])  # fmt: skip
def test_pages_on_a_cpu(max_num_seqs, max_model_len, wanted, available, expected):
    """What can run at once, 2 GiB or one request, and within half of what is free; all of it for a number that is asked for."""
    needs = PageNeeds(64, 9 * MIB, max_model_len, wanted)
    assert pages_on_cpu(needs, SchedulerConfig(max_num_seqs=max_num_seqs), available) == expected


def test_too_few_wanted_pages_on_a_cpu():
    message = error_of(lambda: pages_on_cpu(PageNeeds(64, 9 * MIB, 4096, 64), SchedulerConfig(), 64 * GIB))
    assert message == (
        "the KV cache has room for 63 pages of 64 tokens (9.00 MiB each), but one request of max_model_len 4096 needs 64: "
        "lower --max-model-len or raise --num-pages"
    )


@pytest.mark.parametrize(("available", "ways_out"), [
    (2 * GIB, "lower --num-pages to 227 or leave it out"),
    (2**29, "lower --max-model-len to 3520 and --num-pages to 56"),
    (0, "free some"),
])  # fmt: skip
def test_more_wanted_pages_than_a_cpu_has_memory(available, ways_out):
    message = error_of(lambda: pages_on_cpu(PageNeeds(64, 9 * MIB, 4096, 10**10), SchedulerConfig(), available))
    assert message == (
        f"10000000000 KV pages of 64 tokens (9.00 MiB each) take 87890625.00 GiB, but {available / GIB:.2f} GiB of memory are "
        f"free. Ways out: {ways_out}"
    )


def test_a_cpu_whose_share_is_too_small_for_one_request():
    needs = PageNeeds(64, 9 * MIB, 4096, None)
    message = error_of(lambda: pages_on_cpu(needs, SchedulerConfig(), GIB))
    assert message == (
        "the KV cache has room for 55 pages of 64 tokens (9.00 MiB each), but one request of max_model_len 4096 needs 64: "
        "1.00 GiB of memory are free, and pages take 50% of it. Ways out: lower --max-model-len to 3520, free some, or set "
        "--num-pages"
    )
    assert pages_on_cpu(replace(needs, max_model_len=3520), SchedulerConfig(), GIB) == 56, "what the message says works"
    assert pages_on_cpu(replace(needs, wanted=65), SchedulerConfig(), GIB) == 65, "as does the other way"


@pytest.mark.parametrize(
    ("plans", "max_num_seqs", "max_rows", "requests", "rows_each"),
    [
        ([DraftPlan(1, 0, 1)], 64, 1024, 64, 1),
        ([DraftPlan(1, 0, 1)], 64, 32, 32, 1),
        ([DraftPlan(1, 0, 1), DraftPlan(8, 1, 8), DraftPlan(8, 8, 8)], 64, 1024, 64, 16),
        ([DraftPlan(1, 0, 1), DraftPlan(8, 1, 8), DraftPlan(8, 8, 8)], 4, 1024, 4, 72),
        ([DraftPlan(8, 8, 8)], 4, 32, 4, 1),
    ],
)
def test_the_largest_steps_have_the_most_rows(plans, max_num_seqs, max_rows, requests, rows_each):
    decode, prompt = largest_steps(plans, max_num_seqs, max_rows, max_model_len=512)
    assert (len(decode.slots), decode.num_rows) == (requests, requests * rows_each)
    assert int(decode.max_computed.sum()) <= 512
    assert prompt.num_rows == len(prompt.prompt_targets) == min(max_rows, 512)
    assert int(prompt.max_computed[0]) + prompt.num_rows == 512
