"""What a captured step launches around the model's layers: each is taken to cost two microseconds, in a graph, too.

The interpreter stands in for the GPU; the linear layers of the tiny model are torch's, and the rest is what a GPU would run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from engine.cuda_graphs import GREEDY, SAMPLED, StepGraphs
from engine.input_batch import SamplingNeeds
from engine.step import DraftPlan
from tests.engine.tiny import BLOCK_LENGTH, MAX_MODEL_LEN, tiny_engine
from tests.kernels.op_counts import OpCounts
from tests.kernels.test_engine import on_triton

PLANS = {
    "ar": (DraftPlan(1, 0, 1), 2, 8),
    "linear, verifying": (DraftPlan(BLOCK_LENGTH, 0, 1), 2, 8),
    "linear, drafting": (DraftPlan(1, 1, BLOCK_LENGTH), 5, 11),
    "tidar": (DraftPlan(BLOCK_LENGTH, 2, BLOCK_LENGTH), 5, 11),
    "tidar with anchors": (DraftPlan(BLOCK_LENGTH, 2, BLOCK_LENGTH - 1, True), 5, 11),
}
"""Plans, with the torch operators and the Triton kernels that their steps may launch.

Torch: embedding and head; where a step drafts, its rows with logits, and the drafts and their probabilities put away. Triton:
rows, the work list of attention (two), the last norm, parameters of sampling, a draw (two), the verdict; parameters and a draw
again for drafts.
"""


@pytest.mark.parametrize("needs", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("acceptance", [None, 0.9])
@pytest.mark.parametrize("name", PLANS)
def test_a_step_launches_little_around_the_layers(
    name: str, acceptance: float | None, needs: SamplingNeeds, device: torch.device
) -> None:
    if device.type != "cpu":
        pytest.skip("launches are counted in the interpreter")
    plan, most_torch, most_triton = PLANS[name]
    model = on_triton("qwen3", device)
    core = tiny_engine(model, num_pages=12, max_num_seqs=2, num_branches=2, synthetic_acceptance=acceptance)
    counts = OpCounts()

    def capture(run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        with counts.outside(model.layers):
            return run(), lambda: None

    with torch.inference_mode():
        StepGraphs(core.decoder, core.runner, capture, MAX_MODEL_LEN).prepare(1, [plan], needs)
    print(f"{name}: {dict(counts.torch)} {dict(counts.triton)}")
    assert 0 < counts.torch.total() <= most_torch, counts.torch
    assert 0 < counts.triton.total() <= most_triton, counts.triton
