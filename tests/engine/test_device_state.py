"""What the device knows of a request equals what the host knows once it has read every launched step."""

from __future__ import annotations

import random

import pytest

from engine.core import EngineCore
from engine.messages import GenerateRequest
from engine.sampling_params import DecodingMode, SamplingParams
from tests.engine.tiny import BLOCK_LENGTH, MAX_MODEL_LEN, tiny_engine, tiny_model


def assert_device_agrees(core: EngineCore) -> None:
    batch = core.decoder.batch
    for request in core.scheduler.running:
        slot, cache = request.slot, request.cache
        assert cache is not None
        assert not request.in_flight
        assert batch.num_computed_S[slot] == cache.num_computed
        assert batch.wanted_S[slot] == request.wanted
        assert batch.num_held_S[slot] == request.num_held
        assert batch.block_table_SP[slot, : len(cache.page_ids)].tolist() == cache.page_ids
        if cache.num_computed == len(request.token_ids) - 1:
            assert batch.drafts_SK[slot, 0] == request.token_ids[-1]


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
        held |= {request.num_held for request in core.scheduler.running}
    assert held == {1, BLOCK_LENGTH}
    assert (core.scheduler.stats().num_preemptions > 0) == (num_pages is not None)
