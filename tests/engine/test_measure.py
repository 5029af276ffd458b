"""What a step costs is timed with requests as they will be: with pages of their own, behind a context, holding a block."""

from __future__ import annotations

import pytest
import torch

from engine.core import launch
from engine.decode.measure import step_timer
from engine.decode.pending import PendingResult
from engine.step import DraftPlan, StepPlan
from tests.engine.tiny import BLOCK_LENGTH, tiny_engine, tiny_model


@pytest.mark.parametrize(("num_pages", "is_own"), [(None, True), (9, False)])
def test_timed_requests_have_pages_of_their_own(num_pages, is_own):
    core = tiny_engine(tiny_model("qwen3"), page_size=8, num_pages=num_pages, max_num_seqs=4)
    batch, seen = core.decoder.batch, []

    def watched(plan: StepPlan) -> PendingResult:
        seen.append((plan.num_rows, batch.num_held_S[:3].tolist(), batch.num_computed_S[:3].tolist()))
        return launch(plan, core.decoder, core.runner)

    timer = step_timer(watched, core.decoder, BLOCK_LENGTH, core.info.num_pages)
    assert timer(3, DraftPlan(BLOCK_LENGTH, 2, BLOCK_LENGTH), 30) > 0
    assert {*map(str, seen)} == {str((3 * 3 * BLOCK_LENGTH, [BLOCK_LENGTH] * 3, [30] * 3))}
    pages = batch.block_table_SP[:3, :5]
    assert pages.min() > 0
    assert pages.max() < core.info.num_pages
    assert (len(pages.unique()) == 15) == is_own
    is_written = [bool((keys[page] != 0).any()) for keys, _ in core.runner.cache.layers for page in pages.unique()]
    assert any(is_written), "drafts are kept where real ones would be"
    assert torch.equal(core.decoder.survival.tried, torch.zeros_like(core.decoder.survival.tried))
