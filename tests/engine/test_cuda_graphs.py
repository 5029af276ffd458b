"""Captured steps give the tokens of steps that run operation by operation, with a capture that needs no GPU."""

from __future__ import annotations

import gc
import random
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch

from engine import step_sizes
from engine.core import EngineCore
from engine.cuda_graphs import ALL_NEEDS, GREEDY, SAMPLED, TRUNCATED, StepGraphs
from engine.decode.acceptance import Acceptance
from engine.decode.auto import GoodputPolicy
from engine.decode.costs import CostTable
from engine.decode.goodput import AR, PLAIN, Execution, PlanShape
from engine.decode.layout import _build_layout
from engine.decode.policy import Drafting
from engine.input_batch import SamplingNeeds
from engine.messages import GenerateRequest, GrammarSpec
from engine.sampling_params import MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS, DecodingMode, SamplingParams
from engine.step import DraftPlan
from kernels.process_logits import reference
from tests.engine.driver import drive
from tests.engine.fake_capture import FakeCapture
from tests.engine.tiny import BLOCK_LENGTH, MAX_MODEL_LEN, tiny_engine, tiny_model
from tests.engine.workload import same

PLANS = [DraftPlan(1, 0, 1), DraftPlan(1, 1, BLOCK_LENGTH), DraftPlan(BLOCK_LENGTH, 2, BLOCK_LENGTH)]
MODES = (DecodingMode.AR, DecodingMode.LINEAR, DecodingMode.TIDAR)


@pytest.fixture(autouse=True)
def sorted_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: what NumPy returns is a tensor that no capture sees being made."""
    monkeypatch.setattr(reference, "_descending", lambda logits: logits.sort(dim=-1, descending=True).values)


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
    fitting = Execution(max_rows=core.scheduler.config.max_num_batched_tokens)
    pairs = [(shape, n) for shape in policy._shapes for n in graphs.sizes.buckets if fitting.can_run(shape, n)]
    assert len(pairs) > 20
    for shape, num_requests in pairs:
        assert policy._execution.can_run(shape, num_requests, ALL_NEEDS.level)
    requests = random_requests(random.Random(4), 16)
    requests += [replace(request, request_id=f"auto {i}", decoding=DecodingMode.AUTO) for i, request in enumerate(requests)]
    recorded = capture.num_recorded
    assert graphs.num_replays == 0, "what was timed at the start does not count"
    assert answers(core, requests, {}) == answers(plain, requests, {})
    stats = core.scheduler.stats()
    assert graphs.num_replays == dict(stats.launches)["replayed"] > 20
    assert sum(dict(stats.launches).values()) == stats.num_steps
    assert stats.step_seconds > stats.launch_seconds + stats.host_seconds
    assert min(stats.launch_seconds, stats.host_seconds) > 0
    assert not plain.scheduler.stats().launches, "nothing is captured there"
    assert capture.num_recorded == recorded, "a step was captured while requests ran"


@pytest.mark.parametrize("mode", [DecodingMode.AUTO, DecodingMode.TIDAR])
def test_the_plan_follows_what_is_captured_for_the_sampling_of_the_running_requests(mode: DecodingMode) -> None:
    core, graphs = engine_with_graphs(needs=(GREEDY,))
    with torch.inference_mode():
        graphs.prepare(1, [PLAIN], ALL_NEEDS)
        graphs.prepare(2, [PLAIN], ALL_NEEDS)
    free = CostTable((1,), ((1, 1000),), ((1.0, 1.0),))
    policy = GoodputPolicy(Drafting(BLOCK_LENGTH, 2), free, Execution(graphs.sizes))
    policy._acceptance = Acceptance.known([0.9] * (BLOCK_LENGTH - 1))
    core.scheduler.planner.use(DecodingMode.AUTO, policy)
    plain = GenerateRequest("plain", (9,), SamplingParams(60, temperature=0.0, ignore_eos=True), DecodingMode.AUTO)
    penalised = GenerateRequest("penalised", (9,), replace(plain.sampling, max_tokens=20, frequency_penalty=1.0), mode)
    plans = []
    for request in (plain, penalised):
        core.add(request)
        core.step()  # admits it, after the plan was chosen
        core.step()
        plans.append(policy.shape)
    while len(core.scheduler.running) > 1:
        core.step()
    core.step()
    assert [*plans, policy.shape] == [PlanShape(BLOCK_LENGTH, 2), AR, PlanShape(BLOCK_LENGTH, 2)]


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


@pytest.mark.parametrize("depth", [0, 1])
def test_log_probabilities_are_computed_behind_the_graph(depth: int) -> None:
    rng = random.Random(6)
    requests = [
        replace(request, sampling=replace(request.sampling, logprobs=rng.choice((None, None, 0, 3, 20))))
        for request in random_requests(rng, 20)
    ]
    arrivals = {request.request_id: rng.randrange(30) for request in requests}
    plain = tiny_engine(tiny_model("qwen3", 0, 1.0), page_size=4, depth=depth, num_branches=2)
    core, graphs = engine_with_graphs(depth=depth)
    given, expected = answers(core, requests, arrivals), answers(plain, requests, arrivals)
    assert all(same(given[name], answer) for name, answer in expected.items())
    assert sum(len(answer.logprobs) for answer in given.values()) > 50
    assert set(graphs.launches) <= {"replayed", "prefill", "padding"}
    assert graphs.num_replays > 10


@pytest.mark.parametrize(
    ("reason", "options"),
    [
        ("prefill", {"prompt_token_ids": tuple(range(8, 20))}),
        ("grammar", {"grammar": GrammarSpec('{"grammars": [{"lark_grammar": "start: /[a-h]+/"}]}')}),
        ("diffusion", {"decoding": DecodingMode.DIFFUSION}),
    ],
)
def test_steps_in_which_the_host_has_a_part_are_not_replayed(reason: str, options: dict[str, Any]) -> None:
    core, graphs = engine_with_graphs()
    plain = tiny_engine(tiny_model("qwen3", 0, 1.0), page_size=4, num_branches=2)
    request = GenerateRequest("plain", (9,), SamplingParams(12, seed=1, temperature=0.7))
    answers(core, [request], {})
    assert set(graphs.launches) == {"replayed"}, "a prompt of one token has nothing to prefill"
    request = replace(request, request_id=reason, **options)
    before = graphs.launches.copy()
    assert answers(core, [request], {}) == answers(plain, [request], {})
    assert set(graphs.launches - before) == {reason} | ({"replayed"} if reason == "prefill" else set())


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


def test_a_table_that_has_moved_since_it_was_captured_does_not_go_unnoticed() -> None:
    core, _ = engine_with_graphs()
    biases = core.decoder.batch.biases
    biases.ids_SW = biases.ids_SW.clone()
    sampling = SamplingParams(9, seed=1, temperature=0.0)
    answers(core, [GenerateRequest("does not read it", (9,), sampling)], {})
    with pytest.raises(AssertionError, match="where its inputs were"):
        answers(core, [GenerateRequest("reads it", (9,), replace(sampling, logit_bias=((9, 1.0),)))], {})


def test_nothing_is_captured_while_requests_run_and_what_is_not_at_hand_runs_without() -> None:
    core, graphs = engine_with_graphs(needs=(GREEDY,))
    capture, plain = graphs._capture, tiny_engine(tiny_model("qwen3", 0, 1.0), page_size=4, num_branches=2)
    assert isinstance(capture, FakeCapture)
    request = GenerateRequest("sampled", (9, 10), SamplingParams(20, seed=1, temperature=0.7, top_p=0.9))
    recorded = capture.num_recorded
    assert answers(core, [request], {}) == answers(plain, [request], {})
    assert (capture.num_recorded, graphs.num_replays) == (recorded, 0), "greedy steps alone were captured"
    assert graphs.launches["options"] > 0
    graphs.launches.clear()
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
    assert graphs.launches["padding"] > 0
    unlike = GenerateRequest("unlike", (9, 10), SamplingParams(9, seed=9, temperature=0.0), DecodingMode.TIDAR)
    core.scheduler.planner.use(DecodingMode.TIDAR, Drafting(BLOCK_LENGTH, 3))
    drive(core, [unlike])
    assert graphs.launches["size"] > 0, "three branches were not captured"
