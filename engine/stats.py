"""Counters of the engine, turned into the frozen snapshot that the server scrapes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from engine.judged import JudgedStep
from engine.messages import EngineStats
from engine.request import Request
from engine.step import IntArray, columns


@dataclass(slots=True)
class EngineCounters:
    """Totals since the engine started. A verifying step with ``n > 1`` is one draft, ``n - 1`` draft tokens.

    ``launches``: captured steps that were replayed, and why others were not; see ``StepGraphs``, whose own
    counter it is and which counts in it; ``EngineCore`` empties it once, before there are requests.
    """

    num_steps: int = 0
    num_preemptions: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    accepted_per_position: list[int] = field(default_factory=list)
    prefill_rows: int = 0
    draft_rows: int = 0
    mask_rows: int = 0
    branch_hits: int = 0
    branch_misses: int = 0
    forwards: int = 0
    step_seconds: float = 0.0
    host_seconds: float = 0.0
    launch_seconds: float = 0.0
    launches: Counter[str] = field(default_factory=Counter)

    def count_admission(self, request: Request, num_cached: int) -> None:
        """A request was admitted for the first time."""
        self.prompt_tokens += request.num_prompt_tokens
        self.prefix_cache_queries += request.num_prompt_tokens
        self.prefix_cache_hits += num_cached

    def count_step(self, step: JudgedStep, num_kept: int) -> IntArray:
        """A step was judged, and ``num_kept`` of its tokens were kept; returns what it adds to ``SpeculationStats``, [N, 4]."""
        shapes, verified_N, num_branches_N = step.shapes_N6, step.num_verified_N, step.shapes_N6[:, 2]
        prefill, drafts, branches, *_ = shapes.sum(axis=0).tolist()
        self.prefill_rows += prefill
        self.draft_rows += drafts
        self.generation_tokens += num_kept
        if branches:
            self.mask_rows += int((num_branches_N * (shapes[:, 3] + shapes[:, 4])).sum())
            is_tried_N = (num_branches_N > 0) & (verified_N > 0)
            hits = int(np.count_nonzero(is_tried_N & step.is_hit))
            self.branch_hits += hits
            self.branch_misses += int(np.count_nonzero(is_tried_N)) - hits
        added = columns(len(verified_N), 4)
        added[:, 0] = (shapes[:, 1] + num_branches_N) > 0
        self.forwards += int(np.count_nonzero(added[:, 0]))
        most_verified = int(verified_N.max(initial=0))
        if most_verified > 1:
            self._count_drafts(added, verified_N, step.num_emitted_N, most_verified - 1)
        return added

    def _count_drafts(self, added: IntArray, verified_N: IntArray, emitted_N: IntArray, num_positions: int) -> None:
        """Drafts behind the certain one, and how many of them were accepted."""
        is_drafted_N = verified_N > 1
        accepted_N = (emitted_N - 1) * is_drafted_N
        added[:, 1], added[:, 2], added[:, 3] = is_drafted_N, (verified_N - 1) * is_drafted_N, accepted_N
        _, num_drafts, draft_tokens, accepted = added.sum(axis=0).tolist()
        self.num_drafts += num_drafts
        self.num_draft_tokens += draft_tokens
        self.num_accepted_tokens += accepted
        at_least = np.bincount(accepted_N)[:0:-1].cumsum()[::-1].tolist()
        self.accepted_per_position.extend([0] * (num_positions - len(self.accepted_per_position)))
        for position, count in enumerate(at_least):
            self.accepted_per_position[position] += count

    def snapshot(
        self,
        num_running: int,
        num_waiting: int,
        kv_cache_usage: float,
        plan: str = "",
        plan_goodput: tuple[tuple[str, float], ...] = (),
    ) -> EngineStats:
        """Freeze the counters beside the gauges of the moment."""
        values = {name: getattr(self, name) for name in self.__slots__ if name not in ("accepted_per_position", "launches")}
        return EngineStats(
            num_running=num_running,
            num_waiting=num_waiting,
            kv_cache_usage=kv_cache_usage,
            accepted_per_position=tuple(self.accepted_per_position),
            launches=tuple(self.launches.items()),
            plan=plan,
            plan_goodput=plan_goodput,
            **values,
        )
