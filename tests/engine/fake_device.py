"""A device without a model: it follows plans as the real one does and checks every page it touches.

Each request has a script, the tokens it must end up with. Where the real device writes K/V, this one writes the whole text up
to that position (K/V is a function of nothing else). Before a step attends, every position below the request's computed tokens
has to hold the text of this very request: a page that was given away too early, written by someone else, shared between
different prefixes or left unwritten shows at once. A step takes effect when it is launched, as in stream order, while the
host reads it as late as the loop's depth allows.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np

from engine.config import DecodeConfig, SchedulerConfig
from engine.core import EngineCore
from engine.decode.policy import num_useful_branches, policies
from engine.kv_cache_manager import KVCacheManager
from engine.messages import EngineInfo, GenerateRequest
from engine.page_pool import NULL_PAGE, PagePool
from engine.sampling_params import DecodingMode, SamplingParams
from engine.scheduler import Scheduler
from engine.step import RequestResult, ScheduledRequest, StepPlan, StepResult
from tests.engine.vocabulary import no_grammars

STOP_TOKEN = 99
MAX_MODEL_LEN = 48

Text = tuple[str, tuple[int, ...]]
"""The salt and all tokens up to a position: what K/V depends on."""


@dataclass(frozen=True)
class Script:
    """A request and the tokens it must give."""

    request: GenerateRequest
    token_ids: tuple[int, ...]

    @property
    def expected(self) -> tuple[int, ...]:
        output, stops = self.token_ids[len(self.request.prompt_token_ids) :], self.request.sampling.stop_token_ids
        end = next((i for i, token in enumerate(output, start=1) if token in stops), len(output))
        return output[:end]


def make_script(
    name: str,
    prompt: tuple[int, ...],
    output: tuple[int, ...],
    mode: DecodingMode = DecodingMode.TIDAR,
    salt: str = "",
    stops: tuple[int, ...] = (),
) -> Script:
    """A request that wants as many tokens as the script has; ``STOP_TOKEN`` or one of ``stops`` ends it sooner."""
    sampling = SamplingParams(max_tokens=len(output), stop_token_ids=(STOP_TOKEN, *stops))
    return Script(GenerateRequest(name, prompt, sampling, mode, salt), prompt + output)


@dataclass
class SlotState:
    """Device state of one slot; like the real one, it is not cleared between requests."""

    block_table: dict[int, int] = field(default_factory=dict)
    num_computed: int = 0
    drafts: list[int] = field(default_factory=list)
    wanted: int = 0
    request_id: str = ""


@dataclass
class Pending:
    """A step that the host has not read. ``events`` tells in which order steps are launched and read."""

    result: StepResult
    events: list[tuple[str, int]]

    def wait(self) -> None:
        pass

    def read(self) -> StepResult:
        self.events.append(("read", self.result.step_id))
        return self.result


class FakeDevice:
    """Decoder and runner in one. ``guess_rate`` is how often a diffusion guess is right."""

    def __init__(self, scheduler: Scheduler, depth: int, rng: random.Random, guess_rate: float) -> None:
        self.scheduler, self.depth, self.rng, self.guess_rate = scheduler, depth, rng, guess_rate
        self.page_size = scheduler.kv.page_size
        self.slots = [SlotState() for _ in range(scheduler.config.max_num_seqs)]
        self.scripts: dict[str, Script] = {}
        self.memory: dict[tuple[int, int], Text] = {}
        self.events: list[tuple[str, int]] = []

    def admit(self, plan: StepPlan) -> None:
        for admission in plan.admissions:
            state = self.slots[admission.slot]
            state.num_computed, state.drafts, state.wanted = admission.num_computed, [admission.last_token_id], admission.wanted
            state.request_id = admission.request_id
        for slot, number, page in plan.page_updates.tolist():
            self.slots[slot].block_table[number] = page

    def lay_out(self, plan: StepPlan) -> StepPlan:
        assert 0 < plan.num_rows <= self.scheduler.config.max_num_batched_tokens
        assert len(set(plan.slots.tolist())) == len(plan.slots)
        return plan

    def execute(self, plan: StepPlan) -> None:
        self.events.append(("launch", plan.step_id))

    def judge(self, plan: StepPlan, inputs: StepPlan, logits: None) -> Pending:
        return Pending(StepResult.of(plan.step_id, [self._run(share) for share in plan.requests()]), self.events)

    def _run(self, share: ScheduledRequest) -> RequestResult:
        state = self.slots[share.slot]
        script = self.scripts[state.request_id]
        num_prefill, start = len(share.prefill_token_ids), state.num_computed
        assert start <= share.max_computed, "the host's bound is too low"
        assert self.depth > 0 or start == share.max_computed, "at depth 0 the host knows the computed tokens"
        assert share.prefill_token_ids == script.token_ids[start : start + num_prefill]
        self._attend(script, state)
        num_drafts = min(len(state.drafts), state.wanted, share.draft_plan.num_drafts)
        drafts = state.drafts[:num_drafts]
        self._write(script, state, [*share.prefill_token_ids, *drafts])
        state.num_computed += num_prefill
        if num_drafts == 0:
            return RequestResult((), 0, len(state.drafts), 0)
        return self._verify(share, script, state, drafts)

    def _verify(self, share: ScheduledRequest, script: Script, state: SlotState, drafts: list[int]) -> RequestResult:
        start, truth = state.num_computed, script.token_ids
        assert start + 1 + state.wanted == len(truth), "the device has lost count"
        assert drafts[0] == truth[start], "the certain draft is not the last token"
        accepted = 1
        while accepted < len(drafts) and drafts[accepted] == truth[start + accepted]:
            accepted += 1
        (useful,) = num_useful_branches(np.array([len(drafts)]), np.array([state.wanted])).tolist()
        branches = self.rng.sample(range(useful), min(useful, share.draft_plan.num_branches))
        emitted = truth[start + 1 : start + 1 + accepted]
        state.num_computed += accepted
        state.wanted -= accepted
        state.drafts = [emitted[-1]]
        if accepted - 1 in branches:
            state.drafts += [self._guess(truth, start + accepted + j) for j in range(1, share.draft_plan.block_length)]
        return RequestResult(emitted, len(drafts), len(state.drafts), accepted)

    def _guess(self, truth: tuple[int, ...], position: int) -> int:
        if position < len(truth) and self.rng.random() < self.guess_rate:
            return truth[position]
        return self.rng.randrange(4)

    def _attend(self, script: Script, state: SlotState) -> None:
        for position in range(state.num_computed):
            page = state.block_table[position // self.page_size]
            held = self.memory.get((page, position % self.page_size))
            expected = (script.request.cache_salt, script.token_ids[: position + 1])
            assert held == expected, f"{script.request.request_id} reads {held} at position {position}"

    def _write(self, script: Script, state: SlotState, tokens: list[int]) -> None:
        salt, start = script.request.cache_salt, state.num_computed
        for count, position in enumerate(range(start, start + len(tokens)), start=1):
            page = state.block_table[position // self.page_size]
            self._check_owner(state.request_id, page, position // self.page_size)
            text = script.token_ids[:start] + tuple(tokens[:count])
            self.memory[page, position % self.page_size] = (salt, text)

    def _check_owner(self, request_id: str, page: int, index: int) -> None:
        assert page != NULL_PAGE, "a clean row writes to the null page"
        pages_of = self.scheduler.kv.page_ids
        owners = [r for r in self.scheduler.running if page in pages_of(r.slot)]
        assert [r.request_id for r in owners] == [request_id], "the page belongs to another request"
        assert pages_of(owners[0].slot).index(page) == index, "the device's block table differs from the host's"
        assert self.scheduler.kv.pool._hashes[page] is None, "a shareable page is overwritten"


@dataclass(frozen=True)
class FakeLimits:
    """What a schedule may vary."""

    page_size: int = 4
    num_pages: int = 64
    max_num_seqs: int = 4
    budget: int = 64
    depth: int = 0
    block_length: int = 4
    num_branches: int = 2
    share_prefixes: bool = True
    guess_rate: float = 0.7
    seed: int = 0
    max_model_len: int = MAX_MODEL_LEN


_INFO = EngineInfo("Fake", 0, 100, MAX_MODEL_LEN, (), 4, None, (), DecodingMode.AUTO, 1, 1, "none", "none")


def fake_engine(limits: FakeLimits) -> tuple[EngineCore, FakeDevice]:
    """The real loop and scheduler around a fake device."""
    kv = KVCacheManager(PagePool(limits.num_pages), limits.page_size, limits.max_num_seqs, limits.share_prefixes)
    table = policies(DecodeConfig(DecodingMode.TIDAR, None, limits.num_branches), limits.block_length, limits.budget)
    config = SchedulerConfig(limits.max_num_seqs, limits.budget, async_depth=limits.depth)
    scheduler = Scheduler(config, kv, table, (), limits.max_model_len)
    device = FakeDevice(scheduler, limits.depth, random.Random(limits.seed), limits.guess_rate)
    return EngineCore(scheduler, device, device, no_grammars(), _INFO, limits.depth), device  # type: ignore[arg-type]
