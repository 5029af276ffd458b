"""Who runs in the next step, with which bounds, and what a judged step means for its requests.

There are no prefill and decode phases: a request's computed tokens catch up with its tokens, in chunks; the last token is
the certain draft of a decode step. Chunked prefill, prefix hits and resumption after preemption all follow from that.

With a loop depth of 1 a step is scheduled while the one before it has not been read. Everything here therefore works with
bounds: what a request has certainly and at most reached once its launched steps are done.

All requests of a step are planned and read together, as columns (``engine/request_table.py``); only those to which something
happens are looked at one by one. Shape suffixes: N requests of a step.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping

import numpy as np

from engine.answers import AnswerWriter, error_output
from engine.config import SchedulerConfig
from engine.decode.planner import DraftPlanner
from engine.decode.policy import DraftPolicy
from engine.grammar import CompiledGrammar
from engine.judged import JudgedStep
from engine.kv_cache_manager import KVCacheManager
from engine.messages import EngineStats, GenerateRequest, RequestOutput, TokenColumns
from engine.refusals import problem_with
from engine.request import Request, RequestStatus
from engine.request_table import RequestTable
from engine.reservation import PageReservation
from engine.sampling_params import DecodingMode
from engine.shares import BRANCHES, DRAFTS, PREFILL, TARGETS, Shares, together
from engine.stats import EngineCounters
from engine.step import Admission, IntArray, StepPlan, StepResult, columns
from engine.stopping import StopTable

NO_NUMBERS: IntArray = np.zeros(0, dtype=np.int64)


class Scheduler:
    """The queues and the only writer of requests and their table."""

    def __init__(
        self,
        config: SchedulerConfig,
        kv: KVCacheManager,
        policies: Mapping[DecodingMode, DraftPolicy],
        eos_token_ids: tuple[int, ...],
        max_model_len: int,
    ) -> None:
        self.config, self.kv, self.planner = config, kv, DraftPlanner(policies)
        self.eos_token_ids, self.max_model_len = frozenset(eos_token_ids), max_model_len
        self.waiting: deque[Request] = deque()
        self.requests: dict[str, Request] = {}
        self.table = RequestTable(config.max_num_seqs, max_model_len)
        self.stops = StopTable()
        self.counters = EngineCounters()
        self._pages = PageReservation(kv, self.table, lambda: self._preempt(self.running[-1]))
        self._answers = AnswerWriter(self.table)
        self._rejected: list[RequestOutput] = []
        self._step_id = 0
        self._launched: dict[int, tuple[StepPlan, IntArray]] = {}

    @property
    def running(self) -> list[Request]:
        """The requests that have a slot, oldest first."""
        return self.table.running

    @property
    def has_work(self) -> bool:
        """Whether a step could do something, or an answer waits to be handed out."""
        return bool(self.requests or self._rejected)

    def add(self, message: GenerateRequest, grammar: CompiledGrammar | None = None) -> None:
        """Queue a request. One that can never run is answered with an error by the next ``take_rejected``."""
        policy = self.planner.number_of(message.decoding)
        if policy is None:
            self.reject(message.request_id, f"this checkpoint cannot decode in mode {message.decoding.value!r}")
            return
        problem = problem_with(message, self.planner.policies[policy], self.max_model_len)
        if problem is None and message.request_id in self.requests:
            problem = f"the request id {message.request_id!r} is in use"
        if problem is not None:
            self.reject(message.request_id, problem)
            return
        stops = frozenset(message.sampling.stop_token_ids)
        if not message.sampling.ignore_eos or message.grammar is not None:
            stops |= self.eos_token_ids
        request = Request(message, policy, stops, np.array(message.prompt_token_ids, dtype=np.int32), grammar)
        self.requests[message.request_id] = request
        self.waiting.append(request)

    def reject(self, request_id: str, problem: str) -> None:
        """Have the next ``take_rejected`` answer a request with an error."""
        self._rejected.append(error_output(request_id, problem))

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
        budget, slots_N = self.config.max_num_batched_tokens, self.table.slots
        self.planner.begin_step(self.table.num_tokens_S[slots_N], self.table.level_S[slots_N])
        # Drafts and branches of running requests neither take the row of another one, nor keep a waiting one out of a free
        # slot, nor have a prompt of thousands of tokens computed by the row.
        for_prompts = budget // 4
        kept_back = for_prompts if self.waiting and self.table.free_slots else 0
        num_preemptions = self.counters.num_preemptions
        shares, updates = self._pages.reserve(self._wanted(slots_N).fit(budget, kept_back, for_prompts))
        self.table.launch(shares.slots_N, shares.shapes_N6)
        admissions: list[Admission] = []
        if self.waiting and num_preemptions == self.counters.num_preemptions:
            admissions, admitted, more = self._admit(budget - int(shares.num_rows().sum()))
            shares, updates = together([shares, admitted]), [*updates, *more]
        self._step_id += 1
        if not len(shares):
            return None
        prefill_token_ids, prompt_targets = self._prefill(shares)
        plan = StepPlan(
            self._step_id,
            shares.slots_N,
            shares.shapes_N6,
            shares.max_computed_N,
            prefill_token_ids,
            prompt_targets,
            tuple(admissions),
            updates[0] if len(updates) == 1 else np.concatenate(updates),
        )
        self._launched[plan.step_id] = plan, self.table.epoch_S[plan.slots]
        return plan

    def _wanted(self, slots_N: IntArray) -> Shares:
        """The shares of these requests if there were rows and pages for all."""
        table = self.table
        computed_N = self.kv.num_computed_S[slots_N] + table.prefill_in_flight_S[slots_N]
        num_tokens_N, verifies_N, policy_N = (c[slots_N] for c in (table.num_tokens_S, table.verifies_S, table.policy_S))
        # The drafts that were emitted already are no prefill tokens. With drafts in flight nothing is left to prefill.
        emitted_N = np.where(verifies_N > 0, 1, table.num_held_S[slots_N])
        # Tokens wanted at most, once the launched steps have emitted what they surely emit.
        wanted_N = table.max_length_S[slots_N] - num_tokens_N - verifies_N * table.decodes_in_flight_S[slots_N]
        shapes_N6 = columns(len(slots_N), 6)
        shapes_N6[:, PREFILL] = np.maximum(num_tokens_N - emitted_N - computed_N, 0)
        shapes_N6[:, DRAFTS:TARGETS] = self.planner.plans(policy_N, table.max_held_S[slots_N], wanted_N)
        return Shares(slots_N, shapes_N6, computed_N + table.drafts_in_flight_S[slots_N])

    def _admit(self, budget: int) -> tuple[list[Admission], Shares, list[IntArray]]:
        """Let waiting requests in while there are rows, slots and pages; plan what they compute in this step."""
        admissions: list[Admission] = []
        matched: list[IntArray] = []
        left, promised = budget, 0
        while self.waiting and self.table.free_slots and left > 0:
            request = self.waiting[0]
            slot = self.table.free_slots[-1]
            # Log-probabilities of the prompt need its rows to be computed.
            known = request.token_ids[:0] if request.owes_prompt_logprobs else request.token_ids
            num_cached = self.kv.match_prefix(slot, known, request.message.cache_salt)
            # Room for all its tokens and the first drafts, or it would soon be preempted again.
            needed = self.kv.pages_for(len(request.token_ids) + 1) - len(self.kv.page_ids(slot))
            if not self._pages.can_give(promised + needed):
                self.kv.free(slot)
                break
            self._start(self.waiting.popleft(), num_cached)
            admissions.append(self._admission(request, num_cached))
            pages = self.kv.page_ids(slot)
            matched.append(np.array([(slot, number, page) for number, page in enumerate(pages)], dtype=np.int64).reshape(-1, 3))
            left -= len(request.token_ids) - num_cached
            promised += needed
        shares = self._wanted(np.array([a.slot for a in admissions], dtype=np.int64)).fit(budget, 0)
        shares, updates = self._pages.reserve(shares)
        self.table.launch(shares.slots_N, shares.shapes_N6)
        return admissions, shares, [*matched, *updates]

    def _start(self, request: Request, num_cached: int) -> None:
        self.table.admit(request, self.planner.policies[request.policy].verifies)
        self.stops.add(request.stop_token_ids)
        request.status = RequestStatus.RUNNING
        if not request.scheduled_at:
            request.scheduled_at = time.monotonic()
            request.num_cached_tokens = num_cached
            self.counters.count_admission(request, num_cached)

    def _admission(self, request: Request, num_computed: int) -> Admission:
        message = request.message
        return Admission(
            slot=request.slot,
            num_computed=num_computed,
            prompt_token_ids=message.prompt_token_ids,
            output_token_ids=tuple(request.token_ids[request.num_prompt_tokens :].tolist()),
            mode=self.planner.policies[request.policy].mode,
            sampling=message.sampling,
            # min_tokens holds an EOS back even where it would not end the request.
            stop_token_ids=tuple(sorted(self.eos_token_ids.union(message.sampling.stop_token_ids))),
            matcher=request.grammar.start() if request.grammar else None,
            request_id=request.request_id,
        )

    def _prefill(self, shares: Shares) -> tuple[IntArray, IntArray]:
        """The tokens of all prefill rows, and those after them that lie in a prompt whose log-probabilities are wanted."""
        token_ids, targets = [NO_NUMBERS], [NO_NUMBERS]
        for row in np.flatnonzero(shares.shapes_N6[:, PREFILL]).tolist():
            slot, start = int(shares.slots_N[row]), int(shares.max_computed_N[row])
            end = start + int(shares.shapes_N6[row, PREFILL])
            token_ids.append(self.table.token_ids_SC[slot, start:end].astype(np.int64))
            request = self.table.requests[slot]
            if request is not None and request.owes_prompt_logprobs:
                targets.append(np.array(request.message.prompt_token_ids[start + 1 : end + 1], dtype=np.int64))
                shares.shapes_N6[row, TARGETS] = len(targets[-1])
        return (np.concatenate(token_ids), np.concatenate(targets)) if len(token_ids) > 1 else (NO_NUMBERS, NO_NUMBERS)

    def _preempt(self, request: Request) -> None:
        """Take a request's pages and slot away; it waits at the front and is recomputed. Its launched shares are dropped."""
        self.counters.num_preemptions += 1
        request.num_preemptions += 1
        self._leave(request)
        request.status = RequestStatus.WAITING
        self.waiting.appendleft(request)

    def _leave(self, request: Request) -> None:
        self.kv.free(request.slot)
        self.stops.remove(request.stop_token_ids)
        self.table.leave(request)

    def _finish(self, request: Request) -> None:
        if request.status is RequestStatus.RUNNING:
            self._leave(request)
        request.status = RequestStatus.FINISHED
        del self.requests[request.request_id]

    # -- apply ---------------------------------------------------------------------------------------------------------

    def apply(self, plan: StepPlan, result: StepResult) -> tuple[list[RequestOutput], TokenColumns]:
        """Commit what a judged step computed, append its tokens, finish what is finished; returns what there is to say."""
        assert plan.step_id == result.step_id, "a result belongs to another plan"
        table = self.table
        launched, epoch_N = self._launched.pop(plan.step_id)
        # Requests that were finished, aborted or preempted after this step was launched: their shares no longer count.
        step = JudgedStep.of(launched, result, table.epoch_S[plan.slots] == epoch_N)
        slots_N = step.slots_N
        table.settle(slots_N, step.shapes_N6, step.num_held_N)
        known_N = table.num_tokens_S[slots_N]
        is_first_N = known_N == table.num_prompt_S[slots_N]
        emitted = self.stops.cut(
            step.token_ids_NK,
            step.num_emitted_N,
            table.max_length_S[slots_N] - known_N,
            lambda row: self._request(int(slots_N[row])).stop_token_ids,
        )
        table.append(slots_N, emitted.counts_N, emitted.token_ids)
        # Behind a stop there are committed drafts that the request does not have.
        most_N = known_N + emitted.counts_N - self.kv.num_computed_S[slots_N]
        computed_N = np.minimum(step.shapes_N6[:, PREFILL] + step.num_committed_N, most_N)
        self.kv.commit(slots_N, computed_N, table.token_ids_SC)
        table.count(slots_N, self.counters.count_step(step, len(emitted.token_ids)))
        self.planner.observe(
            table.policy_S[slots_N],
            step.shapes_N6[:, DRAFTS:TARGETS],
            step.num_verified_N,
            step.num_committed_N,
            step.is_hit,
        )
        answers = self._answers.write(step, result, emitted, is_first_N)
        for request in answers.finished:
            self._finish(request)
        return answers.others, answers.tokens

    def _request(self, slot: int) -> Request:
        request = self.table.requests[slot]
        assert request is not None, "the slot is free"
        return request

    def stats(self) -> EngineStats:
        """A frozen snapshot for the server."""
        plan, expected = self.planner.plan_in_force
        return self.counters.snapshot(len(self.running), len(self.waiting), self.kv.pool.usage, plan, expected)

    def check_integrity(self) -> None:
        """Raise AssertionError unless queues, columns, launched steps and pages agree."""
        self.table.check_integrity()
        self.kv.check_integrity()
        self._pages.check_integrity()
        self.stops.check_integrity([r.stop_token_ids for r in self.running])
        assert {r.request_id for r in [*self.running, *self.waiting]} == set(self.requests), "a request is lost"
        in_flight_S2 = np.zeros((self.config.max_num_seqs, 2), dtype=np.int64)
        for plan, epoch_N in self._launched.values():
            is_live_N = self.table.epoch_S[plan.slots] == epoch_N
            in_flight_S2[plan.slots[is_live_N]] += plan.shapes[is_live_N, PREFILL:BRANCHES]
        columns_S2 = np.stack((self.table.prefill_in_flight_S, self.table.drafts_in_flight_S), axis=1)
        assert (in_flight_S2 == columns_S2).all(), "rows in flight are not those of the launched steps"
