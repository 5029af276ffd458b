"""Nemotron-Labs-Diffusion in the engine: its two-pass drafter, replayed step by step against the oracle of its checkpoints."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.build import assemble
from engine.config import CacheConfig, DecodeConfig, DraftAnchor, EngineConfig, SchedulerConfig
from engine.core import EngineCore
from engine.messages import GenerateRequest, SamplingDefaults
from engine.models.hf_config import read_model_config
from engine.models.loader import load_model
from engine.sampling_params import DecodingMode, SamplingParams
from tests.engine.driver import drive
from tests.engine.vocabulary import no_grammars
from tests.unit.engine.models.nemotron import (
    Checkpoint,
    autoregressive,
    drafts_after,
    next_tokens,
    tiny_checkpoint,
    write,
)

MAX_TOKENS = 24
BRANCHES = {DecodingMode.LINEAR: 1, DecodingMode.TIDAR: None}


def nemotron_engine(folder: Path, num_branches: int | None, anchor: DraftAnchor) -> EngineCore:
    config = read_model_config(folder)
    assert config.tidar is not None
    config = replace(config, tidar=replace(config.tidar, anchor=anchor))
    model = load_model(folder, config, torch.float64, torch.device("cpu"))
    engine_config = EngineConfig(
        str(folder),
        cache=CacheConfig(page_size=4),
        scheduler=SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=512),
        decode=DecodeConfig(DecodingMode.TIDAR, None, num_branches),
    )
    return assemble(engine_config, model, 100, SamplingDefaults(), no_grammars())


def replay(checkpoint: Checkpoint, prompt: list[int], masks: int, mode: DecodingMode) -> list[tuple[int, ...]]:
    """What each step emits, with the drafting and the verifying pass of a step computed apart, densely.

    A step verifies what it holds; the branch behind the last accepted draft then holds the token that verification took, and
    the guesses that the two-pass drafter makes there for the positions after it. ``linear`` drafts only when it holds none.
    """
    tokens, held, steps = list(prompt), prompt[-1:], []
    while (wanted := MAX_TOKENS - (len(tokens) - len(prompt))) > 0:
        drafts = held[: min(len(held), wanted)]
        taken = next_tokens(checkpoint, tokens[:-1] + drafts)[len(tokens) - 1 :]
        accepted = 1
        while accepted < len(drafts) and drafts[accepted] == taken[accepted - 1]:
            accepted += 1
        behind = tokens[:-1] + drafts[:accepted]
        is_run = accepted - 1 < wanted - 2 and (mode is DecodingMode.TIDAR or len(held) == 1)
        guesses = drafts_after(checkpoint, behind, masks)[1:] if is_run else []
        tokens += taken[:accepted]
        held = [tokens[-1], *guesses]
        steps.append(tuple(taken[:accepted]))
    return steps


@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize("mode", [DecodingMode.LINEAR, DecodingMode.TIDAR])
def test_every_step_is_the_two_pass_drafters(tmp_path: Path, mode: DecodingMode, lora: bool) -> None:
    checkpoint = tiny_checkpoint(3, lora=lora, shared=1.0)
    core = nemotron_engine(write(checkpoint, tmp_path), BRANCHES[mode], DraftAnchor.COPY)
    masks = core.info.block_length
    assert masks == checkpoint.config["block_size"] - 1
    rng, taken = random.Random(1), set()
    vocabulary = [t for t in range(checkpoint.config["vocab_size"]) if t != checkpoint.config["mask_token_id"]]
    for i in range(6):
        prompt = rng.choices(vocabulary, k=rng.randint(1, 12))
        request = GenerateRequest(f"{i}", tuple(prompt), SamplingParams(MAX_TOKENS, temperature=0.0, ignore_eos=True), mode)
        steps = [output.token_ids for output in drive(core, [request]).outputs[request.request_id]]
        assert steps == replay(checkpoint, prompt, masks, mode)
        taken |= {len(step) for step in steps}
    assert len(taken) > 2, "drafts were accepted at several lengths"


@pytest.mark.parametrize("anchor", list(DraftAnchor))
def test_both_draft_layouts_are_exact_in_one_batch(tmp_path: Path, anchor: DraftAnchor) -> None:
    checkpoint = tiny_checkpoint(1, lora=True, shared=1.0)
    core = nemotron_engine(write(checkpoint, tmp_path), 2, anchor)
    rng, mask = random.Random(2), checkpoint.config["mask_token_id"]
    vocabulary = [t for t in range(checkpoint.config["vocab_size"]) if t != mask]
    sampling = SamplingParams(MAX_TOKENS, temperature=0.0, ignore_eos=True)
    modes = [DecodingMode.AR, DecodingMode.LINEAR, DecodingMode.TIDAR] * 3
    requests = [
        GenerateRequest(f"{i}", tuple(rng.choices(vocabulary, k=rng.randint(1, 40))), sampling, mode)
        for i, mode in enumerate(modes)
    ]
    transcript = drive(core, requests)
    for request in requests:
        assert list(transcript.tokens(request.request_id)) == autoregressive(checkpoint, request.prompt_token_ids, MAX_TOKENS)
    assert core.scheduler.stats().num_accepted_tokens > 0
