"""The counters say what happened: everything is counted again from the plans, the results and the outputs."""

from __future__ import annotations

import copy
import random
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace

import pytest

from engine.config import DraftAnchor
from engine.core import EngineCore
from engine.messages import FinishReason, RequestOutput, SpeculationStats, TokenColumns
from engine.request import Request
from engine.sampling_params import DecodingMode
from engine.step import RequestResult, ScheduledRequest, StepPlan, StepResult
from tests.engine.driver import Transcript, drive
from tests.engine.fake_device import FakeLimits, fake_engine, make_script
from tests.engine.tiny import tiny_engine, tiny_model
from tests.engine.vocabulary import TINY
from tests.engine.workload import by_diffusion, random_requests

BLOCK_LENGTH = 4
TOTALS = ("num_steps", "generation_tokens", "prefill_rows", "draft_rows", "mask_rows", "branch_hits", "branch_misses")


@dataclass
class Recount:
    """What ``apply`` was told, counted without the engine's counters. Shares of requests that are gone do not count."""

    totals: Counter[str] = field(default_factory=Counter)
    accepted_at: Counter[int] = field(default_factory=Counter)
    of_request: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))

    def watch(self, core: EngineCore) -> None:
        scheduler, owners = core.scheduler, {}
        schedule, apply = scheduler.schedule, scheduler.apply
        launched: dict[int, list[tuple[str, int]]] = {}

        def scheduled() -> StepPlan | None:
            plan = schedule()
            if plan is not None:
                # Whose the rows are, and since which step: a preempted request that is back has lost what was in flight.
                owners.update({a.slot: (a.request_id, plan.step_id) for a in plan.admissions})
                launched[plan.step_id] = [owners[slot] for slot in plan.slots.tolist()]
            return plan

        def applied(plan: StepPlan, result: StepResult) -> tuple[list[RequestOutput], TokenColumns]:
            running = {owners[r.slot] for r in scheduler.running}
            rows = zip(launched.pop(plan.step_id), plan.requests(), result.requests(), strict=True)
            others, tokens = apply(plan, result)
            self.totals["num_steps"] += 1
            self.totals["generation_tokens"] += sum(len(output.token_ids) for output in others) + len(tokens.token_ids)
            for owner, share, judged in rows:
                if owner in running:
                    self._count(owner[0], share, judged)
                    self.totals["prefill_rows"] += len(share.prefill_token_ids)
                    self.totals["draft_rows"] += share.draft_plan.num_drafts
                    self.totals["mask_rows"] += share.draft_plan.num_branches * share.draft_plan.branch_rows
            return others, tokens

        def preempted(request: Request) -> None:
            self.totals["num_preemptions"] += 1
            preempt(request)

        preempt = scheduler._preempt
        scheduler.schedule, scheduler.apply, scheduler._preempt = scheduled, applied, preempted  # type: ignore[method-assign]

    def _count(self, name: str, share: ScheduledRequest, judged: RequestResult) -> None:
        for counter in (self.totals, self.of_request[name]):
            counter["forwards"] += share.draft_plan.num_rows > 0
            if judged.num_drafts > 1:
                counter["num_drafts"] += 1
                counter["num_draft_tokens"] += judged.num_drafts - 1
                counter["num_accepted_tokens"] += len(judged.token_ids) - 1
        if judged.num_drafts > 1:
            self.accepted_at.update(range(len(judged.token_ids) - 1))
        if share.draft_plan.num_branches and judged.num_drafts:
            self.totals["branch_hits" if judged.num_held > 1 else "branch_misses"] += 1


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("num_pages", [14, 200])
def test_counters_equal_what_happened(depth: int, num_pages: int) -> None:
    rng = random.Random(5)
    limits = FakeLimits(4, num_pages, 5, 40, depth, BLOCK_LENGTH, num_branches=2, share_prefixes=False)
    core, device = fake_engine(limits)
    scripts = [random_script(rng, f"r{i}") for i in range(30)]
    device.scripts = {s.request.request_id: s for s in scripts}
    recount = Recount()
    recount.watch(core)
    transcript = drive(core, [s.request for s in scripts])
    stats = core.scheduler.stats()
    assert (stats.num_preemptions > 0) == (num_pages == 14)
    for name in TOTALS:
        assert getattr(stats, name) == recount.totals[name], name
    for name in ("forwards", "num_drafts", "num_draft_tokens", "num_accepted_tokens"):
        assert getattr(stats, name) == recount.totals[name] > 0, name
    assert stats.accepted_per_position == tuple(recount.accepted_at[i] for i in range(BLOCK_LENGTH - 1))
    assert stats.prompt_tokens == sum(len(s.request.prompt_token_ids) for s in scripts)
    assert stats.generation_tokens == sum(len(s.expected) for s in scripts)
    assert (stats.num_running, stats.num_waiting, stats.kv_cache_usage) == (0, 0, 0.0)
    for script in scripts:
        check_speculation(script.request.request_id, transcript, recount)


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize(("num_pages", "anchor"), [(20, DraftAnchor.CLEAN), (None, DraftAnchor.COPY)])
def test_counters_equal_what_happened_with_every_option_and_beside_diffusion(
    depth: int, num_pages: int | None, anchor: DraftAnchor
) -> None:
    rng = random.Random(f"{depth} {num_pages}")
    requests = random_requests(rng, TINY, "request", 24)
    requests += [by_diffusion(request) for request in random_requests(rng, TINY, "lossy", 6)]
    model = copy.copy(tiny_model("qwen3", 0, 1.0))
    assert model.config.tidar is not None
    model.config = replace(model.config, tidar=replace(model.config.tidar, anchor=anchor))
    core = tiny_engine(model, page_size=4, num_pages=num_pages, max_num_seqs=6, budget=40, depth=depth, num_branches=2)
    recount = Recount()
    recount.watch(core)
    transcript, stats = drive(core, requests), core.scheduler.stats()
    assert (stats.num_preemptions > 5) == (num_pages is not None)
    assert stats.num_preemptions == recount.totals["num_preemptions"]
    for name in (*TOTALS, "num_drafts", "num_draft_tokens", "num_accepted_tokens", "forwards"):
        assert getattr(stats, name) == recount.totals[name] > 0, name
    assert stats.accepted_per_position == tuple(recount.accepted_at[i] for i in range(5))
    assert sum(stats.accepted_per_position) == stats.num_accepted_tokens
    ends = {True: 0, False: 0}
    for request in requests:
        answer = transcript.answer(request.request_id)
        speculation, counted = transcript.outputs[request.request_id][-1].speculation, recount.of_request[request.request_id]
        assert speculation == speculation_of(counted)
        if request.decoding is DecodingMode.DIFFUSION:
            assert speculation == SpeculationStats(speculation.num_forwards), "its drafts are not called verified"
            continue
        # A forward gives the token that verification takes, and the accepted drafts; those behind a stop were dropped.
        given = speculation.num_forwards + speculation.num_accepted_draft_tokens
        ends[answer.finish_reason is FinishReason.STOP] += 1
        assert len(answer.token_ids) <= given, request
        assert len(answer.token_ids) == given or answer.finish_reason is FinishReason.STOP, request
    assert min(ends.values()) > 3


def random_script(rng: random.Random, name: str):  # type: ignore[no-untyped-def]
    prompt = tuple(rng.choices(range(4), k=rng.randint(1, 20)))
    output = tuple(rng.choices((0, 1, 2, 3, 99), (8, 8, 8, 8, 1), k=rng.randint(1, 20)))
    mode = rng.choice((DecodingMode.AR, DecodingMode.LINEAR, DecodingMode.TIDAR))
    return make_script(name, prompt, output, mode)


def speculation_of(counted: Counter[str]) -> SpeculationStats:
    return SpeculationStats(
        num_forwards=counted["forwards"],
        num_spec_steps=counted["num_drafts"],
        num_draft_tokens=counted["num_draft_tokens"],
        num_accepted_draft_tokens=counted["num_accepted_tokens"],
    )


def check_speculation(name: str, transcript: Transcript, recount: Recount) -> None:
    outputs, counted = transcript.outputs[name], recount.of_request[name]
    assert all(output.times is None for output in outputs[:-1])
    # The total so far comes with every output, since the server may end a request at a stop string.
    assert [output.speculation.num_forwards for output in outputs] == list(range(1, len(outputs) + 1))
    speculation, times = outputs[-1].speculation, outputs[-1].times
    assert times is not None
    assert times.scheduled <= times.first_token <= times.finished
    assert speculation == speculation_of(counted)
    num_tokens = len(transcript.tokens(name))
    expected = (num_tokens - 1) / (len(outputs) - 1) if len(outputs) > 1 else None
    assert speculation.tokens_per_forward(num_tokens) == expected


def test_tokens_per_forward_leaves_out_the_forward_of_the_first_token() -> None:
    assert SpeculationStats(num_forwards=1).tokens_per_forward(1) is None
    assert SpeculationStats(num_forwards=0).tokens_per_forward(0) is None
    assert SpeculationStats(num_forwards=5).tokens_per_forward(5) == 1.0
    assert SpeculationStats(num_forwards=3).tokens_per_forward(9) == 4.0


def test_plain_decoding_takes_one_forward_a_token() -> None:
    core, device = fake_engine(FakeLimits())
    script = make_script("a", (1, 2, 3), (1, 2, 3, 0, 1), DecodingMode.AR)
    device.scripts["a"] = script
    speculation = drive(core, [script.request]).outputs["a"][-1].speculation
    assert speculation == SpeculationStats(num_forwards=5)
    assert speculation.tokens_per_forward(5) == 1.0


def test_drafts_that_are_always_right_give_a_block_a_forward() -> None:
    core, device = fake_engine(FakeLimits(guess_rate=1.0, num_branches=BLOCK_LENGTH, block_length=BLOCK_LENGTH))
    script = make_script("a", (1, 2, 3), (1, 2, 3, 0) * 4 + (1,))
    device.scripts["a"] = script
    speculation = drive(core, [script.request]).outputs["a"][-1].speculation
    assert speculation.tokens_per_forward(17) == BLOCK_LENGTH
    assert speculation.num_accepted_draft_tokens == speculation.num_draft_tokens == 4 * (BLOCK_LENGTH - 1)


def test_a_prefix_that_is_cached_is_counted_and_reported() -> None:
    core, device = fake_engine(FakeLimits(page_size=4))
    prompt = (1, 2, 3, 0) * 3
    for name, salt in (("first", ""), ("second", ""), ("other tenant", "x")):
        script = make_script(name, prompt, (1, 2), salt=salt)
        device.scripts[name] = script
        output = drive(core, [script.request]).outputs[name][-1]
        # The last page of the prompt holds the token that has to be computed again.
        assert output.num_cached_tokens == (8 if name == "second" else 0)
    stats = core.scheduler.stats()
    assert (stats.prefix_cache_queries, stats.prefix_cache_hits) == (36, 8)
