"""Counters of the engine, turned into the frozen snapshot that the server scrapes."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.messages import EngineStats
from engine.request import Request
from engine.step import RequestResult, ScheduledRequest


@dataclass(slots=True)
class EngineCounters:
    """Totals since the engine started. A verifying step with ``n > 1`` is one draft, ``n - 1`` draft tokens."""

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

    def count_admission(self, request: Request, num_cached: int) -> None:
        """A request was admitted for the first time."""
        self.prompt_tokens += request.num_prompt_tokens
        self.prefix_cache_queries += request.num_prompt_tokens
        self.prefix_cache_hits += num_cached

    def count_share(self, share: ScheduledRequest, result: RequestResult, num_emitted: int) -> None:
        """A request's share of a step was judged; ``num_emitted`` of its tokens were kept."""
        plan = share.draft_plan
        self.prefill_rows += len(share.prefill_token_ids)
        self.draft_rows += plan.num_drafts
        self.mask_rows += plan.num_branches * plan.branch_rows
        self.generation_tokens += num_emitted
        if plan.num_rows:
            self.forwards += 1
        if plan.num_branches and result.num_drafts:
            hit = result.num_held > 1
            self.branch_hits += hit
            self.branch_misses += not hit
        if result.num_drafts > 1:
            accepted = len(result.token_ids) - 1
            self.num_drafts += 1
            self.num_draft_tokens += result.num_drafts - 1
            self.num_accepted_tokens += accepted
            missing = result.num_drafts - 1 - len(self.accepted_per_position)
            self.accepted_per_position.extend([0] * missing)
            for position in range(accepted):
                self.accepted_per_position[position] += 1

    def snapshot(
        self,
        num_running: int,
        num_waiting: int,
        kv_cache_usage: float,
        plan: str = "",
        plan_goodput: tuple[tuple[str, float], ...] = (),
    ) -> EngineStats:
        """Freeze the counters beside the gauges of the moment."""
        values = {name: getattr(self, name) for name in self.__slots__ if name != "accepted_per_position"}
        return EngineStats(
            num_running=num_running,
            num_waiting=num_waiting,
            kv_cache_usage=kv_cache_usage,
            accepted_per_position=tuple(self.accepted_per_position),
            plan=plan,
            plan_goodput=plan_goodput,
            **values,
        )
