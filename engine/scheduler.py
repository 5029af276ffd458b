"""Who runs in the next step, with which bounds, and what a judged step means for its requests.

There are no prefill and decode phases: a request's computed tokens catch up with its tokens, in chunks; the last token is
the certain draft of a decode step. Chunked prefill, prefix hits and resumption after preemption all follow from that.

With a loop depth of 1 a step is scheduled while the one before it has not been read. Everything here therefore works with
bounds: what a request has certainly and at most reached once its launched steps are done.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from engine.config import SchedulerConfig
from engine.decode.auto import GoodputPolicy
from engine.decode.policy import DraftPolicy
from engine.grammar import CompiledGrammar
from engine.kv_cache_manager import KVCacheManager, SequenceCache
from engine.messages import (
    EngineStats,
    FinishReason,
    GenerateRequest,
    RequestOutput,
    RequestTimes,
    SpeculationStats,
    TokenLogprobs,
)
from engine.request import Request, RequestStatus
from engine.sampling_params import DecodingMode
from engine.stats import EngineCounters
from engine.step import (
    NO_DRAFTS,
    Admission,
    DraftPlan,
    RequestResult,
    ScheduledRequest,
    StepPlan,
    StepResult,
)


class _PlanBuilder:
    """Collects one step's plan; ``budget`` is how many rows are left."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.shares: list[tuple[Request, ScheduledRequest]] = []
        self.admissions: list[Admission] = []
        self.page_updates: list[tuple[int, int, int]] = []
        self.preempted = False

    def build(self, step_id: int) -> StepPlan | None:
        if not self.shares:
            return None
        return StepPlan.of(step_id, [share for _, share in self.shares], self.admissions, self.page_updates)

    def update_pages(self, slot: int, first: int, page_ids: Sequence[int]) -> None:
        self.page_updates += [(slot, number, page) for number, page in enumerate(page_ids, start=first)]


class Scheduler:
    """The queues and the only writer of requests."""

    def __init__(
        self,
        config: SchedulerConfig,
        kv: KVCacheManager,
        policies: dict[DecodingMode, DraftPolicy],
        eos_token_ids: tuple[int, ...],
        max_model_len: int,
    ) -> None:
        self.config, self.kv, self.policies = config, kv, policies
        self.eos_token_ids, self.max_model_len = frozenset(eos_token_ids), max_model_len
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.requests: dict[str, Request] = {}
        self.counters = EngineCounters()
        self._auto = next((p for p in policies.values() if isinstance(p, GoodputPolicy)), None)
        self._free_slots = list(reversed(range(config.max_num_seqs)))
        self._rejected: list[RequestOutput] = []
        self._step_id = 0
        self._launched: dict[int, list[tuple[Request, ScheduledRequest]]] = {}

    @property
    def has_work(self) -> bool:
        """Whether a step could do something, or an answer waits to be handed out."""
        return bool(self.requests or self._rejected)

    def add(self, message: GenerateRequest, grammar: CompiledGrammar | None = None) -> None:
        """Queue a request. One that can never run is answered with an error by the next ``take_rejected``."""
        problem = self._problem(message)
        if problem is not None:
            self.reject(message.request_id, problem)
            return
        stops = frozenset(message.sampling.stop_token_ids)
        if not message.sampling.ignore_eos or message.grammar is not None:
            stops |= self.eos_token_ids
        request = Request(message, self.policies[message.decoding], stops, list(message.prompt_token_ids), grammar)
        self.requests[message.request_id] = request
        self.waiting.append(request)

    def reject(self, request_id: str, problem: str) -> None:
        """Have the next ``take_rejected`` answer a request with an error."""
        self._rejected.append(RequestOutput(request_id, (), FinishReason.ERROR, error=problem))

    def _problem(self, message: GenerateRequest) -> str | None:
        tokens = len(message.prompt_token_ids)
        if tokens == 0:
            return "the prompt is empty: send at least one token"
        if tokens + message.sampling.max_tokens > self.max_model_len:
            return (
                f"the prompt has {tokens} tokens and {message.sampling.max_tokens} more are wanted, but the context holds "
                f"{self.max_model_len}: shorten the prompt or lower max_tokens"
            )
        if message.decoding not in self.policies:
            return f"this checkpoint cannot decode in mode {message.decoding.value!r}"
        if self.policies[message.decoding].mode is DecodingMode.DIFFUSION:
            problem = diffusion_problem(message)
            if problem is not None:
                return problem
        if message.request_id in self.requests:
            return f"the request id {message.request_id!r} is in use"
        return None

    def take_rejected(self) -> list[RequestOutput]:
        """Hand out the answers to requests that can never run."""
        rejected, self._rejected = self._rejected, []
        return rejected

    def abort(self, request_id: str) -> None:
        """Drop a request at once; its share of a launched step is ignored. Unknown ids are ignored too."""
        request = self.requests.get(request_id)
        if request is None:
            return
        if request.status is RequestStatus.WAITING:
            self.waiting.remove(request)
        self._finish(request)

    # -- schedule ------------------------------------------------------------------------------------------------------

    def schedule(self) -> StepPlan | None:
        """Plan the next step: running requests oldest first, then waiting ones while rows, slots and pages last."""
        builder = _PlanBuilder(self.config.max_num_batched_tokens)
        running = list(self.running)
        if self._auto is not None and running:
            self._auto.begin_step(len(running), sum(len(r.token_ids) for r in running) / len(running))
        # Drafts and branches of running requests neither take the row of another one nor keep a waiting one out of a free slot.
        kept_back = self.config.max_num_batched_tokens // 4 if self.waiting and self._free_slots else 0
        for place, request in enumerate(running):
            others = len(running) - place - 1
            if request.status is RequestStatus.RUNNING and builder.budget > others:
                self._schedule(request, builder, max(1, builder.budget - others - kept_back))
        while self.waiting and builder.budget > 0 and not builder.preempted and self._free_slots:
            if not self._admit(self.waiting[0], builder):
                break
        self._step_id += 1
        if builder.shares:
            self._launched[self._step_id] = builder.shares
        return builder.build(self._step_id)

    def _schedule(self, request: Request, builder: _PlanBuilder, budget: int) -> None:
        """Give a request its share of the step, at most ``budget`` rows."""
        cache = _cache_of(request)
        computed = cache.num_computed + sum(len(s.prefill_token_ids) for s in request.in_flight)
        drafts_in_flight = sum(s.draft_plan.num_drafts for s in request.in_flight)
        max_computed = computed + drafts_in_flight
        last = len(request.token_ids) - request.policy.num_emitted(request.num_held)
        # Once drafts are in flight the prompt is done, and ``token_ids`` lags behind what the device has computed.
        prefill = () if drafts_in_flight else tuple(request.token_ids[computed : min(last, computed + budget)])
        plan = NO_DRAFTS
        if computed + len(prefill) >= last:
            plan = self._draft_plan(request, budget - len(prefill))
        if not prefill and plan.num_rows == 0:
            return
        plan = self._reserve(request, max_computed + len(prefill), plan, builder)
        if request.status is not RequestStatus.RUNNING:
            return
        share = ScheduledRequest(
            request.slot,
            prefill,
            plan,
            max_computed,
            _prompt_targets(request, computed, len(prefill)),
        )
        request.in_flight.append(share)
        builder.shares.append((request, share))
        builder.budget -= share.num_rows

    def _draft_plan(self, request: Request, budget: int) -> DraftPlan:
        """The policy's choice for what the request holds at most, cut to ``budget`` rows; nothing if it surely ends before."""
        held, wanted = request.num_held, request.wanted
        for share in request.in_flight:
            if share.draft_plan.num_rows:
                held = share.draft_plan.block_length if share.draft_plan.num_branches else 1
                wanted -= request.policy.min_emitted
        if wanted <= 0 or budget <= 0:
            return NO_DRAFTS
        plan = request.policy.plan(held, wanted)
        num_drafts = min(plan.num_drafts, budget)
        num_branches = min(plan.num_branches, (budget - num_drafts) // plan.branch_rows)
        return replace(plan, num_drafts=num_drafts, num_branches=num_branches)

    def _reserve(self, request: Request, start: int, plan: DraftPlan, builder: _PlanBuilder) -> DraftPlan:
        """Get pages for the positions below ``start`` and for the drafts behind it.

        When the pool is dry, first the drafts are cut to the pages at hand, then the newest running request is preempted,
        which may be this one.
        """
        cache = _cache_of(request)
        while True:
            first = len(cache.page_ids)
            # A bound of a launched step may lie beyond what the request can ever fill.
            pages = self.kv.allocate(cache, min(start + plan.num_drafts, request.max_computed))
            if pages is not None:
                if pages:
                    builder.update_pages(request.slot, first, pages)
                return plan
            room = first * self.kv.page_size - start
            if 1 <= room < plan.num_drafts:
                return replace(plan, num_drafts=room, num_branches=min(plan.num_branches, room))
            builder.preempted = True
            victim = self.running[-1]
            self._preempt(victim)
            if victim is request:
                return plan

    def _admit(self, request: Request, builder: _PlanBuilder) -> bool:
        # Log-probabilities of the prompt need its rows to be computed.
        known = [] if request.owes_prompt_logprobs else request.token_ids
        cache = self.kv.match_prefix(known, request.message.cache_salt)
        # Room for all its tokens and the first drafts, or it would soon be preempted again.
        needed = self.kv.pages_for(len(request.token_ids) + 1) - len(cache.page_ids)
        if needed > self.kv.pool.num_free:
            self.kv.free(cache)
            return False
        self.waiting.popleft()
        self.running.append(request)
        request.status, request.cache, request.slot, request.num_held = RequestStatus.RUNNING, cache, self._free_slots.pop(), 1
        builder.admissions.append(self._admission(request, cache.num_computed))
        if cache.page_ids:
            builder.update_pages(request.slot, 0, cache.page_ids)
        if not request.scheduled_at:
            request.scheduled_at = time.monotonic()
            request.num_cached_tokens = cache.num_computed
            self.counters.count_admission(request, cache.num_computed)
        self._schedule(request, builder, builder.budget)
        return True

    def _admission(self, request: Request, num_computed: int) -> Admission:
        message = request.message
        return Admission(
            slot=request.slot,
            num_computed=num_computed,
            prompt_token_ids=message.prompt_token_ids,
            output_token_ids=tuple(request.token_ids[request.num_prompt_tokens :]),
            mode=request.policy.mode,
            sampling=message.sampling,
            # min_tokens holds an EOS back even where it would not end the request.
            stop_token_ids=tuple(sorted(self.eos_token_ids.union(message.sampling.stop_token_ids))),
            matcher=request.grammar.start() if request.grammar else None,
            request_id=request.request_id,
        )

    def _preempt(self, request: Request) -> None:
        """Take a request's pages and slot away; it waits at the front and is recomputed. Its launched shares are dropped."""
        self.counters.num_preemptions += 1
        request.num_preemptions += 1
        self._leave(request)
        request.status = RequestStatus.WAITING
        self.waiting.appendleft(request)

    def _leave(self, request: Request) -> None:
        self.running.remove(request)
        self.kv.free(_cache_of(request))
        self._free_slots.append(request.slot)
        request.cache, request.slot = None, -1
        request.in_flight.clear()

    def _finish(self, request: Request) -> None:
        if request.status is RequestStatus.RUNNING:
            self._leave(request)
        request.status = RequestStatus.FINISHED
        del self.requests[request.request_id]

    # -- apply ---------------------------------------------------------------------------------------------------------

    def apply(self, plan: StepPlan, result: StepResult) -> list[RequestOutput]:
        """Commit what a judged step computed, append its tokens, finish what is finished; returns what there is to say."""
        assert plan.step_id == result.step_id, "a result belongs to another plan"
        outputs = []
        for (request, share), judged in zip(self._launched.pop(plan.step_id), result.requests(), strict=True):
            # The request was finished, aborted or preempted after this step was launched: its share no longer counts.
            if not request.in_flight or request.in_flight[0] is not share:
                continue
            output = self._apply(request, share, judged)
            if output is not None:
                outputs.append(output)
        return outputs

    def _apply(self, request: Request, share: ScheduledRequest, judged: RequestResult) -> RequestOutput | None:
        request.in_flight.pop(0)
        request.num_held = judged.num_held
        kept, reason = _until_stop(judged.token_ids, request.stop_token_ids, request.wanted)
        request.token_ids.extend(kept)
        cache = _cache_of(request)
        # Behind a stop there are committed drafts that the request does not have.
        known = len(request.token_ids) - cache.num_computed - len(share.prefill_token_ids)
        self.kv.commit(cache, len(share.prefill_token_ids) + min(judged.num_committed, known), request.token_ids)
        # Drafts that were rejected give their pages back, except those that a launched step may write to.
        self.kv.truncate(cache, min(cache.num_computed + request.num_rows_in_flight, request.max_computed))
        self.counters.count_share(share, judged, len(kept))
        if share.draft_plan.num_rows:
            request.speculation = _count(request.speculation, judged)
        if request.policy is self._auto and self._auto is not None:
            self._auto.observe(share.draft_plan, judged.num_drafts, judged.num_committed, judged.num_held > 1)
        if judged.error is not None:
            self._finish(request)
            return RequestOutput(request.request_id, (), FinishReason.ERROR, error=judged.error)
        prompt_logprobs = self._new_prompt_logprobs(request, share, judged)
        if not kept and not prompt_logprobs:
            return None
        now = time.monotonic()
        if kept:
            request.first_token_at = request.first_token_at or now
        times = None
        if reason is not None:
            self._finish(request)
            times = RequestTimes(request.message.arrival, request.scheduled_at, request.first_token_at, now)
        sampling = request.message.sampling
        return RequestOutput(
            request.request_id,
            kept,
            reason,
            stop_token_id=kept[-1] if reason is FinishReason.STOP else None,
            num_cached_tokens=request.num_cached_tokens,
            speculation=request.speculation,
            times=times,
            logprobs=_cut(judged.logprobs[: len(kept)], sampling.logprobs),
            prompt_logprobs=_cut(prompt_logprobs, sampling.prompt_logprobs),
        )

    def _new_prompt_logprobs(
        self, request: Request, share: ScheduledRequest, judged: RequestResult
    ) -> tuple[TokenLogprobs, ...]:
        """Those that were not sent before; a preempted request computes some of them again."""
        new = judged.prompt_logprobs[max(0, request.num_prompt_logprobs - share.max_computed) :]
        request.num_prompt_logprobs += len(new)
        return new

    def stats(self) -> EngineStats:
        """A frozen snapshot for the server."""
        plan, expected = ("", ()) if self._auto is None else (str(self._auto.shape), self._auto.expected_by_name)
        return self.counters.snapshot(len(self.running), len(self.waiting), self.kv.pool.usage, plan, expected)

    def check_integrity(self) -> None:
        """Raise AssertionError unless queues, slots and pages agree."""
        self.kv.check_integrity(_cache_of(r) for r in self.running)
        slots = [r.slot for r in self.running]
        assert sorted(slots + self._free_slots) == list(range(self.config.max_num_seqs)), "a slot is lost or shared"
        assert {r.request_id for r in [*self.running, *self.waiting]} == set(self.requests), "a request is lost"
        for request in self.running:
            cache = _cache_of(request)
            reach = min(cache.num_computed + request.num_rows_in_flight, request.max_computed)
            # In the exact modes the last token has no K/V yet; a diffusion block is decided behind tokens that all have it.
            without = request.policy.min_emitted
            assert cache.num_computed <= len(request.token_ids) - without, "a token has K/V before it is known"
            assert len(cache.page_ids) >= self.kv.pages_for(reach), "a launched step lacks a page"


def _cache_of(request: Request) -> SequenceCache:
    assert request.cache is not None, "a running request has pages"
    return request.cache


def diffusion_problem(message: GenerateRequest) -> str | None:
    """Why a request cannot be decoded by diffusion, if so: nothing verifies its tokens one after the other."""
    sampling = message.sampling
    for name, is_asked in (
        ("a grammar", message.grammar is not None),
        ("a penalty", sampling.has_penalties),
        ("min_tokens", sampling.min_tokens > 0),
        ("logprobs", sampling.logprobs is not None),
    ):
        if is_asked:
            return f"{name} cannot be combined with decoding 'diffusion': leave it out or choose another mode"
    return None


def _prompt_targets(request: Request, computed: int, num_prefill: int) -> tuple[int, ...]:
    """The tokens after the prefill rows from ``computed`` on that lie in the prompt, if their log-probabilities are wanted."""
    if not request.owes_prompt_logprobs:
        return ()
    return request.message.prompt_token_ids[computed + 1 : computed + num_prefill + 1]


def _cut(logprobs: Sequence[TokenLogprobs], num_top: int | None) -> tuple[TokenLogprobs, ...]:
    """What one request asked for, of rows that were computed for the most demanding one of their step."""
    return () if num_top is None else tuple(replace(p, top=p.top[:num_top]) for p in logprobs)


def _until_stop(
    token_ids: tuple[int, ...], stop_token_ids: frozenset[int], wanted: int
) -> tuple[tuple[int, ...], FinishReason | None]:
    """The tokens up to and with the first one that ends the request, and why it ends."""
    for count, token in enumerate(token_ids, start=1):
        if token in stop_token_ids:
            return token_ids[:count], FinishReason.STOP
        if count == wanted:
            return token_ids[:count], FinishReason.LENGTH
    return token_ids, None


def _count(stats: SpeculationStats, judged: RequestResult) -> SpeculationStats:
    drafted = judged.num_drafts > 1
    return SpeculationStats(
        num_forwards=stats.num_forwards + 1,
        num_spec_steps=stats.num_spec_steps + drafted,
        num_draft_tokens=stats.num_draft_tokens + (judged.num_drafts - 1 if drafted else 0),
        num_accepted_draft_tokens=stats.num_accepted_draft_tokens + (len(judged.token_ids) - 1 if drafted else 0),
    )
