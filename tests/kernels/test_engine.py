"""A whole engine on the Triton kernels: what a step hands to them is what they expect."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from engine.config import RopeConfig
from engine.messages import GenerateRequest
from engine.models.transformer import Transformer
from engine.sampling_params import DecodingMode, SamplingParams
from kernels.backend import REFERENCE, Kernels, nothing_to_prepare, triton_kernels
from tests.engine.driver import drive
from tests.engine.tiny import ARCHITECTURES, tiny_engine, tiny_model

SCALED = RopeConfig(theta=500.0, original_max_position=8, query_scale_beta=0.3)
"""Queries are scaled from position 8 on, within the tiny contexts."""

PROMPTS = ((4, 1, 4, 1, 5, 2, 6, 5, 8, 5), (2, 9, 1))


def answers(kernels: Kernels, architecture: str, device: torch.device) -> tuple[dict[str, tuple[int, ...]], torch.Tensor]:
    """Tokens of two requests that draft, a greedy one and a sampled one, and the keys that they left in the cache."""
    config = replace(ARCHITECTURES[architecture], rope=SCALED)
    model = Transformer(config, kernels).float().requires_grad_(False)
    model.load_state_dict(tiny_model(architecture, 0, 1.0).state_dict())
    model.to(device)
    core = tiny_engine(model, page_size=8, num_pages=12, max_num_seqs=2, num_branches=2, block_length=3, prefix_caching=False)
    greedy = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    both = (greedy, replace(greedy, temperature=1.1, top_k=12, top_p=0.9, seed=5))
    requests = [GenerateRequest(f"r{i}", PROMPTS[i], params, DecodingMode.TIDAR) for i, params in enumerate(both)]
    transcript = drive(core, requests)
    keys = torch.stack([tensor for layer in core.runner.cache.layers for tensor in layer])
    return {name: transcript.tokens(name) for name in transcript.outputs}, keys[:, 1:]


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_an_engine_on_triton_gives_what_one_on_the_reference_does(architecture: str, device: torch.device) -> None:
    expected, expected_cache = answers(REFERENCE, architecture, device)
    # The linear layers choose by timing on a GPU; unmeasured ones are the library's.
    kernels = replace(triton_kernels(num_kv_heads=2), prepare_linear=nothing_to_prepare)
    given, cache = answers(kernels, architecture, device)
    assert given == expected
    torch.testing.assert_close(cache, expected_cache, atol=1e-4, rtol=1e-4)
    assert (expected_cache != 0).any()
