"""Memory on the GPU: weights go there without a copy on the host, and an engine under full load stays within its share."""

from __future__ import annotations

import pytest
import torch

from engine.build import build_engine_core
from engine.config import CacheConfig, EngineConfig, SchedulerConfig
from engine.memory import CudaMemory
from engine.models.hf_config import read_model_config
from engine.models.loader import load_model
from engine.sampling_params import DecodingMode
from tests.engine.bundled import FOLDER, question_prompts, requests_for
from tests.engine.driver import drive
from tests.unit.engine.models.test_loader import own_memory


def test_a_peak_is_what_a_run_holds_beyond_what_it_leaves(device):
    memory, kept = CudaMemory(device), []

    def run() -> None:
        large = torch.empty(300 * 2**20, dtype=torch.uint8, device=device)
        kept.append(torch.empty(50 * 2**20, dtype=torch.uint8, device=device))
        del large

    assert 299 * 2**20 <= memory.peak(run) <= 302 * 2**20
    free = memory.free()
    kept.clear()
    assert memory.free() >= free + 49 * 2**20


def test_weights_do_not_stay_on_the_host(device):
    config = read_model_config(FOLDER)
    load_model(FOLDER, config, torch.bfloat16, device)  # the first use of a GPU takes memory of its own
    before = own_memory()
    model = load_model(FOLDER, config, torch.bfloat16, device)
    assert all(p.is_cuda for p in model.parameters())
    assert own_memory() - before < 4e6


@pytest.mark.parametrize("kernels", ["reference", "triton"])
def test_an_engine_under_full_load_stays_within_its_share(kernels, device):
    share = 0.3
    torch.cuda.empty_cache()
    config = EngineConfig(
        str(FOLDER),
        dtype="bfloat16",
        device="cuda",
        kernels=kernels,
        cache=CacheConfig(gpu_memory_utilization=share),
        scheduler=SchedulerConfig(max_num_seqs=64, max_num_batched_tokens=1024),
    )
    core = build_engine_core(config)
    print(core.info.settings["memory"], core.info.num_pages)
    drive(core, requests_for(question_prompts(), 1.0, DecodingMode.TIDAR))
    free, total = torch.cuda.mem_get_info()
    assert torch.cuda.max_memory_reserved() <= share * total + 2**30
    assert free >= (1 - share) * total - 2**31, "contexts and graphs take their own, not much more"
