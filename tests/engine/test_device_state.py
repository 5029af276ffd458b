"""What the device knows of a request equals what the host knows once it has read every launched step."""

from __future__ import annotations

import random

import numpy as np
import pytest

from engine.core import EngineCore
from engine.messages import GenerateRequest
from engine.sampling_params import DecodingMode, SamplingParams
from tests.engine.tiny import BLOCK_LENGTH, MAX_MODEL_LEN, tiny_engine, tiny_model


def assert_device_agrees(core: EngineCore) -> None:
    batch, table, kv = core.decoder.batch, core.scheduler.table, core.scheduler.kv
    for request in core.scheduler.running:
        slot = request.slot
        tokens, pages, num_computed = table.tokens_of(slot).tolist(), kv.page_ids(slot), kv.num_computed_S[slot]
        assert not table.rows_in_flight(np.array([slot])).any()
        assert batch.num_computed_S[slot] == num_computed
        assert batch.wanted_S[slot] == request.max_length - len(tokens)
        assert batch.num_held_S[slot] == table.num_held_S[slot] == table.max_held_S[slot]
        assert batch.block_table_SP[slot, : len(pages)].tolist() == pages
        if num_computed == len(tokens) - 1:
            assert batch.drafts_SK[slot, 0] == tokens[-1]


@pytest.mark.parametrize("num_branches", [1, None])
@pytest.mark.parametrize("num_pages", [None, 1 + MAX_MODEL_LEN // 4])
def test_host_and_device_agree_after_every_step(num_branches: int | None, num_pages: int | None) -> None:
    rng = random.Random(2)
    core = tiny_engine(
        tiny_model("qwen3", 0, 1.0), page_size=4, num_pages=num_pages, max_num_seqs=4, budget=40, num_branches=num_branches
    )
    modes = (DecodingMode.AR, DecodingMode.LINEAR, DecodingMode.TIDAR)
    for i in range(12):
        prompt = tuple(rng.choices(range(8, 23), k=rng.randint(1, 30)))
        core.add(GenerateRequest(str(i), prompt, SamplingParams(rng.randint(1, 30), seed=i, ignore_eos=True), modes[i % 3]))
    held = set()
    while core.has_work:
        core.step()
        assert_device_agrees(core)
        held |= set(core.scheduler.table.num_held_S[core.scheduler.table.slots].tolist())
    assert held == {1, BLOCK_LENGTH}
    assert (core.scheduler.stats().num_preemptions > 0) == (num_pages is not None)
