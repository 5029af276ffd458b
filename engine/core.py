"""The loop. Four lines hold everything: schedule, execute, judge, apply."""

from __future__ import annotations

import time
from collections import deque

import torch

from engine.cuda_graphs import StepGraphs
from engine.decode.pending import PendingResult
from engine.decode.tidar import TidarDecoder
from engine.grammar import CompiledGrammar, GrammarCompiler, GrammarError
from engine.messages import NO_TOKENS, EngineInfo, GenerateRequest, GrammarSpec, StepOutputs
from engine.model_runner import ModelRunner
from engine.scheduler import Scheduler
from engine.step import StepPlan


class EngineCore:
    """Steps the requests. ``depth`` 1 launches a step before the host has read the one before it; 0 does not."""

    def __init__(
        self,
        scheduler: Scheduler,
        decoder: TidarDecoder,
        runner: ModelRunner,
        grammars: GrammarCompiler,
        info: EngineInfo,
        depth: int = 0,
        graphs: StepGraphs | None = None,
    ) -> None:
        self.scheduler, self.decoder, self.runner, self.grammars = scheduler, decoder, runner, grammars
        self.info, self.depth, self.graphs = info, depth, graphs
        self._launched: deque[tuple[StepPlan, PendingResult]] = deque()
        if graphs is not None:
            # What was launched before there were requests does not count.
            graphs.launches.clear()
            scheduler.counters.launches = graphs.launches

    @property
    def has_work(self) -> bool:
        """Whether ``step`` has something to do."""
        return self.scheduler.has_work or bool(self._launched)

    def compile(self, spec: GrammarSpec) -> CompiledGrammar:
        """Compile a request's grammar; may be called from another thread. Raises GrammarError."""
        return self.grammars.compile(spec)

    def add(self, request: GenerateRequest, grammar: CompiledGrammar | None = None) -> None:
        """Queue a request; one that can never run is answered with an error output by the next step.

        ``grammar`` is that of the request, already compiled; otherwise it is compiled here, and everybody waits.
        """
        if request.grammar is not None and grammar is None:
            try:
                grammar = self.compile(request.grammar)
            except GrammarError as error:
                self.reject(request.request_id, str(error))
                return
        self.scheduler.add(request, grammar)

    def reject(self, request_id: str, problem: str) -> None:
        """Have the next step answer a request with an error output."""
        self.scheduler.reject(request_id, problem)

    def abort(self, request_id: str) -> None:
        """Drop a request; it gives no more output."""
        self.scheduler.abort(request_id)

    def step(self) -> StepOutputs:
        """Launch the next step if there is one, read the oldest launched one if it is due."""
        begun = time.perf_counter()
        counters = self.scheduler.counters
        others, tokens = self.scheduler.take_rejected(), NO_TOKENS
        plan = self.scheduler.schedule()
        scheduled = time.perf_counter()
        if plan is not None:
            self._launched.append((plan, launch(plan, self.decoder, self.runner, self.graphs)))
        launched = waited = applied = time.perf_counter()
        if self._launched and (plan is None or len(self._launched) > self.depth):
            oldest, pending = self._launched.popleft()
            pending.wait()
            waited = time.perf_counter()
            answers, tokens = self.scheduler.apply(oldest, pending.read())
            others += answers
            counters.num_steps += 1
            applied = time.perf_counter()
        counters.step_seconds += applied - begun
        counters.launch_seconds += launched - scheduled
        counters.host_seconds += (scheduled - begun) + (applied - waited)
        return StepOutputs(self.scheduler.stats(), tuple(others), tokens)


@torch.inference_mode()
def launch(plan: StepPlan, decoder: TidarDecoder, runner: ModelRunner, graphs: StepGraphs | None = None) -> PendingResult:
    """Put a step on the device: replayed where it was captured, else operation by operation."""
    decoder.admit(plan)
    replayed = graphs.launch(plan) if graphs is not None else None
    if replayed is not None:
        return replayed
    inputs = decoder.lay_out(plan)
    logits = runner.execute(inputs)
    return decoder.judge(plan, inputs, logits)
