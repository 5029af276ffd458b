"""Captured steps give the tokens of steps that run operation by operation, with a capture that needs no GPU.

The fake capture keeps what a CUDA graph keeps: a function that saw the host's data only once, whose results appear in the
tensors of the first run. So host data that a replay would not see, or a result that is not where it was, changes an answer.
"""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from engine import step_sizes
from engine.core import EngineCore
from engine.cuda_graphs import ALL_NEEDS, GREEDY, SAMPLED, TRUNCATED, StepGraphs
from engine.decode.auto import GoodputPolicy
from engine.decode.layout import _build_layout
from engine.input_batch import SamplingNeeds
from engine.messages import GenerateRequest, GrammarSpec
from engine.sampling_params import MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS, DecodingMode, SamplingParams
from engine.step import DraftPlan
from tests.engine.driver import drive
from tests.engine.tiny import BLOCK_LENGTH, MAX_MODEL_LEN, tiny_engine, tiny_model

PLANS = [DraftPlan(1, 0, 1), DraftPlan(1, 1, BLOCK_LENGTH), DraftPlan(BLOCK_LENGTH, 2, BLOCK_LENGTH)]
MODES = (DecodingMode.AR, DecodingMode.LINEAR, DecodingMode.TIDAR)


class FakeCapture:
    """Runs again and copies the results to where they were."""

    def __init__(self) -> None:
        self.num_recorded = 0

    def __call__(self, run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        self.num_recorded += 1
        first = run()

        def replay() -> None:
            for old, new in zip(tensors_in(first), tensors_in(run()), strict=True):
                old.copy_(new)

        return first, replay


def tensors_in(result: Any) -> list[Tensor]:
    assert is_dataclass(result)
    return [getattr(result, field.name) for field in fields(result)]


def engine_with_graphs(
    num_branches: int = 2, depth: int = 0, needs: tuple[SamplingNeeds, ...] = (GREEDY, TRUNCATED, ALL_NEEDS)
) -> tuple[EngineCore, StepGraphs]:
    core = tiny_engine(
        tiny_model("qwen3", 0, 1.0), page_size=4, max_num_seqs=8, budget=256, depth=depth, num_branches=num_branches
    )
    graphs = StepGraphs(core.decoder, core.runner, FakeCapture(), MAX_MODEL_LEN)
    plans = [*PLANS[:2], DraftPlan(BLOCK_LENGTH, num_branches, BLOCK_LENGTH)]
    with torch.inference_mode():
        for num_requests in graphs.sizes.buckets:
            for need in needs:
                graphs.prepare(num_requests, plans, need)
    core.graphs = graphs
    return core, graphs


@pytest.mark.parametrize("depth", [0, 1])
def test_an_engine_with_a_capture_records_every_step_that_its_plans_may_take(depth: int) -> None:
    capture = FakeCapture()
    core = tiny_engine(tiny_model("qwen3", 0, 1.0), page_size=4, depth=depth, mode=DecodingMode.AUTO, capture=capture)
    plain = tiny_engine(tiny_model("qwen3", 0, 1.0), page_size=4, depth=depth)
    graphs, policy = core.graphs, core.scheduler.planner.policy_of(DecodingMode.AUTO)
    assert graphs is not None
    assert isinstance(policy, GoodputPolicy)
    for shape in policy._candidates(8):
        assert graphs.sizes.covers(8, DraftPlan(shape.block_length, shape.num_branches, shape.block_length))
    requests = random_requests(random.Random(4), 16)
    requests += [replace(request, request_id=f"auto {i}", decoding=DecodingMode.AUTO) for i, request in enumerate(requests)]
    recorded = capture.num_recorded
    assert answers(core, requests, {}) == answers(plain, requests, {})
    assert graphs.num_replays > 20
    assert capture.num_recorded == recorded, "a step was captured while requests ran"


def random_requests(rng: random.Random, count: int, **options: Any) -> list[GenerateRequest]:
    requests = []
    for i in range(count):
        prompt = tuple(rng.choices(range(8, 23), k=rng.randint(1, 20)))
        sampling = SamplingParams(rng.randint(2, 30), seed=i, temperature=rng.choice((0.0, 0.9)), **options)
        requests.append(GenerateRequest(f"r{i}", prompt, sampling, rng.choice(MODES)))
    return requests


def answers(core: EngineCore, requests: list[GenerateRequest], arrivals: dict[str, int]) -> dict[str, Any]:
    transcript = drive(core, requests, arrivals)
    return {request.request_id: transcript.answer(request.request_id) for request in requests}


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("options", [{}, {"top_p": 0.8, "top_k": 7}, {"repetition_penalty": 1.3, "min_tokens": 2}])
def test_captured_steps_give_the_tokens_of_uncaptured_ones(depth: int, options: dict[str, Any]) -> None:
    rng = random.Random(3)
    requests = random_requests(rng, 24, **options)
    arrivals = {request.request_id: rng.randrange(40) for request in requests}
    plain = tiny_engine(tiny_model("qwen3", 0, 1.0), page_size=4, depth=depth, num_branches=2)
    core, graphs = engine_with_graphs(depth=depth)
    assert answers(core, requests, arrivals) == answers(plain, requests, arrivals)
    assert graphs.num_replays > 20


def test_the_host_has_a_part_in_some_steps_and_those_are_not_replayed() -> None:
    core, graphs = engine_with_graphs()
    plain = tiny_engine(tiny_model("qwen3", 0, 1.0), page_size=4, num_branches=2)
    sampling = SamplingParams(12, seed=1, temperature=0.7)
    logged = SamplingParams(12, seed=1, temperature=0.7, logprobs=3)
    for request in (
        GenerateRequest(
            "grammar", (9, 10), sampling, grammar=GrammarSpec('{"grammars": [{"lark_grammar": "start: /[a-h]+/"}]}')
        ),
        GenerateRequest("logprobs", (9, 10), logged),
        GenerateRequest("diffusion", (9, 10), sampling, DecodingMode.DIFFUSION),
    ):
        assert answers(core, [request], {}) == answers(plain, [request], {})
    assert graphs.num_replays == 0
    answers(core, [GenerateRequest("plain", (9, 10), sampling)], {})
    assert graphs.num_replays > 0


def test_a_step_without_a_captured_size_runs_all_the_same() -> None:
    _, graphs = engine_with_graphs(num_branches=1)
    assert graphs.sizes.covers(3, DraftPlan(BLOCK_LENGTH, 1, BLOCK_LENGTH))
    assert graphs.sizes.covers(3, DraftPlan(2, 0, 1))
    assert not graphs.sizes.covers(3, DraftPlan(BLOCK_LENGTH, 2, BLOCK_LENGTH))
    assert not graphs.sizes.covers(3, DraftPlan(2, 1, BLOCK_LENGTH - 1)), "blocks of another length"
    assert not graphs.sizes.covers(3, DraftPlan(2, 1, BLOCK_LENGTH, has_anchor=True))


def test_a_step_is_captured_once_for_its_size_and_needs() -> None:
    _, graphs = engine_with_graphs(needs=(GREEDY,))
    capture = graphs._capture
    assert isinstance(capture, FakeCapture)

    def recorded(needs: SamplingNeeds) -> int:
        before = capture.num_recorded
        with torch.inference_mode():
            graphs.prepare(3, [DraftPlan(1, 0, 1)], needs)
        return capture.num_recorded - before

    assert recorded(GREEDY) == 0, "it was captured before"
    assert [recorded(SAMPLED), recorded(SAMPLED)] == [1, 0]
    assert [recorded(ALL_NEEDS), recorded(ALL_NEEDS)] == [1, 0]


def test_the_longest_lists_of_biases_and_stops_are_replayed() -> None:
    core, graphs = engine_with_graphs()
    plain = tiny_engine(tiny_model("qwen3", 0, 1.0), page_size=4, num_branches=2)
    # Ids beyond the tiny vocabulary cannot be asked for, but a list may be as long as any: its biases add up.
    rng = random.Random(8)
    biases = tuple((rng.randrange(8, 23), rng.uniform(-1, 1)) for _ in range(MAX_LOGIT_BIAS))
    stops = tuple(rng.choices(range(8, 11), k=MAX_STOP_TOKEN_IDS))
    sampling = SamplingParams(20, seed=1, temperature=0.7, min_tokens=9, stop_token_ids=stops, logit_bias=biases)
    request = GenerateRequest("long lists", (9, 10), sampling)
    assert answers(core, [request], {}) == answers(plain, [request], {})
    assert graphs.num_replays > 0


def test_what_a_replay_reads_is_kept_however_many_layouts_are_built() -> None:
    core, _ = engine_with_graphs()
    graphs = StepGraphs(core.decoder, core.runner, lambda run: (run(), lambda: None), MAX_MODEL_LEN)
    with torch.inference_mode():
        graphs.prepare(3, [DraftPlan(1, 1, BLOCK_LENGTH)])
    (step,) = graphs._captured.values()
    layout = weakref.ref(step.layout.request_R)
    del step
    _build_layout.cache_clear()
    gc.collect()
    assert layout() is not None, "the replay would read memory that was given back"


def test_nothing_is_captured_while_requests_run_and_what_is_not_at_hand_runs_without() -> None:
    core, graphs = engine_with_graphs(needs=(GREEDY,))
    capture, plain = graphs._capture, tiny_engine(tiny_model("qwen3", 0, 1.0), page_size=4, num_branches=2)
    assert isinstance(capture, FakeCapture)
    request = GenerateRequest("sampled", (9, 10), SamplingParams(20, seed=1, temperature=0.7, top_p=0.9))
    recorded = capture.num_recorded
    assert answers(core, [request], {}) == answers(plain, [request], {})
    assert (capture.num_recorded, graphs.num_replays) == (recorded, 0), "greedy steps alone were captured"
    with torch.inference_mode():
        for num_requests in graphs.sizes.buckets:
            graphs.prepare(num_requests, PLANS, ALL_NEEDS)
    assert answers(core, [request], {}) == answers(plain, [request], {})
    assert graphs.num_replays > 0, "a step with all options serves whoever wants some"


def test_a_captured_step_is_not_taken_where_it_would_be_mostly_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    core, graphs = engine_with_graphs()
    requests = [
        GenerateRequest(f"ar {i}", (9, 10), SamplingParams(20, seed=i, temperature=0.0), DecodingMode.AR) for i in range(7)
    ]
    mixed = [*requests, GenerateRequest("tidar", (9, 10), SamplingParams(20, seed=9, temperature=0.0))]
    monkeypatch.setattr(step_sizes, "FREE_ROWS", 8)
    drive(core, mixed)
    replays = graphs.num_replays
    drive(core, requests)
    assert graphs.num_replays - replays > replays, "one that drafts makes eight times the rows"
