"""A whole engine on the Triton kernels: what a step hands to them is what they expect."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from engine.config import DraftAnchor, RopeConfig
from engine.messages import GenerateRequest
from engine.models.transformer import Transformer
from engine.sampling_params import DecodingMode, SamplingParams
from kernels.backend import REFERENCE, Kernels, nothing_to_prepare, triton_kernels
from tests.engine.driver import drive
from tests.engine.tiny import ARCHITECTURES, tiny_engine, tiny_model

SCALED = RopeConfig(theta=500.0, original_max_position=8, query_scale_beta=0.3)
"""Queries are scaled from position 8 on, within the tiny contexts."""

PROMPTS = ((4, 1, 4, 1, 5, 2, 6, 5, 8, 5), (2, 9, 1))
GREEDY = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
SAMPLED = replace(GREEDY, temperature=1.1, top_k=12, top_p=0.9, seed=5)


def on(kernels: Kernels, architecture: str, device: torch.device, anchor: DraftAnchor | None = None) -> Transformer:
    """A tiny model in float32."""
    config = replace(ARCHITECTURES[architecture], rope=SCALED)
    assert config.tidar is not None
    if anchor is not None:
        config = replace(config, tidar=replace(config.tidar, anchor=anchor))
    model = Transformer(config, kernels).float().requires_grad_(False)
    model.load_state_dict(tiny_model(architecture, 0, 1.0).state_dict())
    return model.to(device)


def on_triton(architecture: str, device: torch.device, anchor: DraftAnchor | None = None) -> Transformer:
    """The linear layers choose by timing on a GPU; unmeasured ones are the library's."""
    return on(replace(triton_kernels(num_kv_heads=2), prepare_linear=nothing_to_prepare), architecture, device, anchor)


def answers(
    model: Transformer, requests: list[GenerateRequest]
) -> tuple[dict[str, tuple[int, ...]], torch.Tensor, torch.Tensor]:
    """Tokens of the requests, the keys that they left in the cache, and how many drafts were tried and accepted."""
    core = tiny_engine(model, page_size=8, num_pages=16, max_num_seqs=4, num_branches=2, block_length=3, prefix_caching=False)
    transcript = drive(core, requests)
    keys = torch.stack([tensor for layer in core.runner.cache.layers for tensor in layer])
    num_outcomes = torch.stack((core.decoder.survival.tried.sum(), core.decoder.survival.accepted.sum()))
    return {name: transcript.tokens(name) for name in transcript.outputs}, keys[:, 1:], num_outcomes


@pytest.mark.parametrize(("architecture", "second"), [("qwen2", GREEDY), ("qwen3", SAMPLED)], ids=["qwen2", "qwen3"])
def test_an_engine_on_triton_gives_what_one_on_the_reference_does(
    architecture: str, second: SamplingParams, device: torch.device
) -> None:
    requests = [
        GenerateRequest(f"r{i}", prompt, sampling, DecodingMode.TIDAR)
        for i, (prompt, sampling) in enumerate(zip(PROMPTS, (GREEDY, second), strict=True))
    ]
    same(requests, architecture, device)


def test_all_modes_beside_each_other(device: torch.device) -> None:
    sampled = replace(GREEDY, temperature=1.1, seed=5)
    of_modes = {
        DecodingMode.AR: replace(sampled, max_tokens=3),
        DecodingMode.LINEAR: GREEDY,
        DecodingMode.TIDAR: replace(sampled, max_tokens=7, repetition_penalty=1.2, min_tokens=3),
        DecodingMode.DIFFUSION: replace(GREEDY, max_tokens=3),
    }
    requests = [GenerateRequest(mode.value, PROMPTS[1], sampling, mode) for mode, sampling in of_modes.items()]
    same(requests, "qwen3", device, DraftAnchor.COPY)


def same(requests: list[GenerateRequest], architecture: str, device: torch.device, anchor: DraftAnchor | None = None) -> None:
    expected, expected_cache, expected_outcomes = answers(on(REFERENCE, architecture, device, anchor), requests)
    given, cache, num_outcomes = answers(on_triton(architecture, device, anchor), requests)
    assert given == expected
    torch.testing.assert_close(cache, expected_cache, atol=1e-4, rtol=1e-4)
    assert (expected_cache != 0).any()
    assert torch.equal(num_outcomes, expected_outcomes)
