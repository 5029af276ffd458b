"""An engine whose pages are sized by what a device says of its memory, on a CPU that plays one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from engine import build
from engine.config import ConfigError, ModelConfig
from engine.kv_cache import KVCache, page_bytes
from engine.messages import GenerateRequest
from engine.sampling_params import DecodingMode, SamplingParams
from tests.engine.driver import drive
from tests.engine.tiny import tiny_engine, tiny_model

STEP = 5_000_000


@dataclass
class SmallDevice:
    total: int
    num_runs: int = 0

    def free(self) -> int:
        return self.total // 2

    def peak(self, run: Callable[[], None]) -> int:
        run()
        self.num_runs += 1
        return STEP


@pytest.mark.parametrize(
    ("mode", "num_branches"),
    [(DecodingMode.TIDAR, 1), (DecodingMode.TIDAR, None), (DecodingMode.AR, 1), (DecodingMode.AUTO, 1)],
)
def test_an_engine_that_ran_its_largest_step_serves_like_any_other(mode: DecodingMode, num_branches: int | None) -> None:
    """The run leaves its marks in every slot: admission has to undo all of them."""
    memory = SmallDevice(100_000_000)
    model = tiny_model("qwen3", 0, 1.0)
    core = tiny_engine(model, memory=memory, mode=mode, num_branches=num_branches)
    assert memory.num_runs == 1
    expected = (int(100_000_000 * 0.9) - 50_000_000 - STEP) // page_bytes(model.config, 8, model.embedding.dtype)
    assert core.info.num_pages == core.scheduler.kv.pool.num_pages == expected
    assert "a step of 256 rows needs 0.00" in core.info.settings["memory"]
    requests = [
        GenerateRequest(str(i), (5 + i, 6, 7), SamplingParams(12, seed=i, temperature=i % 2, logprobs=2), DecodingMode.AUTO)
        for i in range(8)
    ]
    plain = drive(tiny_engine(model, num_branches=num_branches), requests)
    sized = drive(core, requests)
    for request in requests:
        one, other = sized.answer(request.request_id), plain.answer(request.request_id)
        assert one.token_ids == other.token_ids


def test_a_device_that_is_too_small_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match=r"the KV cache has room for 0 pages of 8 tokens .* needs 8: of 0\.01 GiB"):
        tiny_engine(tiny_model("qwen3"), memory=SmallDevice(12_000_000))


def test_more_pages_than_there_is_memory_for_are_a_configuration_error() -> None:
    with pytest.raises(
        ConfigError, match=r"10000000000 KV pages .* GiB of memory are free\. Ways out: lower --num-pages to \d+"
    ):
        tiny_engine(tiny_model("qwen3"), num_pages=10**10)


@pytest.mark.parametrize(
    ("memory", "remedy"), [(None, "--num-pages"), (100_000_000, "--num-pages or --gpu-memory-utilization")]
)
def test_pages_that_turn_out_not_to_fit_are_a_configuration_error(
    memory: int | None, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Cache(KVCache):
        def __init__(self, config: ModelConfig, num_pages: int, *rest: Any) -> None:
            if num_pages > 1:  # as many as the largest step needs, which runs before there are others
                raise torch.OutOfMemoryError("out of memory, says the device\nand more")
            super().__init__(config, num_pages, *rest)

    monkeypatch.setattr(build, "KVCache", Cache)
    with pytest.raises(ConfigError) as caught:
        tiny_engine(tiny_model("qwen3"), num_pages=50, memory=memory and SmallDevice(memory))
    assert str(caught.value) == (
        f"50 KV pages of 8 tokens (0.00 MiB each) take 0.00 GiB, which cannot be had: lower {remedy} (out of memory, says the "
        "device)"
    )
