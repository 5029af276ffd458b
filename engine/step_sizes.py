"""The sizes that steps are captured in, and which of them a plan is replayed in: arithmetic alone.

A captured step is *uniform*: it has places for a number of requests from a short list, and the same rows for each of them. A
plan is replayed in the smallest one that covers it, unless that would be mostly padding.
"""

from __future__ import annotations

import bisect
from typing import NamedTuple

from engine.step import DraftPlan, IntArray

REQUEST_BUCKETS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 160, 192, 256, 320, 384, 448, 512)
"""Numbers of requests that a step is captured for, below ``max_num_seqs``, which is one too."""

FREE_ROWS, MOST_PADDING = 256, 2
"""A captured step of up to ``FREE_ROWS`` rows may have any number of padding rows, a larger one ``MOST_PADDING`` times the
plan's rows at most. Rows are free while the weights have to be streamed anyway, and somewhat beyond that they still cost
less than launching a step operation by operation."""


class StepSize(NamedTuple):
    """A captured step: places for so many requests, all with the rows of one plan."""

    num_requests: int
    plan: DraftPlan

    @property
    def num_rows(self) -> int:
        """Rows of the step."""
        return self.num_requests * self.plan.num_rows


class StepSizes:
    """The sizes at hand for an engine of at most ``max_num_seqs`` requests."""

    def __init__(self, max_num_seqs: int) -> None:
        self.buckets = (*(n for n in REQUEST_BUCKETS if n < max_num_seqs), max_num_seqs)
        """Numbers of requests, ascending."""
        self._by_places: dict[int, list[StepSize]] = {places: [] for places in self.buckets}
        self._level: dict[StepSize, int] = {}

    def size_of(self, num_requests: int, plan: DraftPlan) -> StepSize:
        """The size that serves so many requests with this plan."""
        return StepSize(self.num_places(num_requests), plan)

    def add(self, size: StepSize, level: int) -> None:
        """A size is at hand from now on, for requests whose sampling is of this level (``SamplingNeeds.level``) or below."""
        if size not in self._level:
            bisect.insort(self._by_places[size.num_requests], size, key=lambda size: size.num_rows)
        self._level[size] = max(level, self._level.get(size, 0))

    def num_places(self, num_requests: int) -> int:
        """Requests that a captured step of so many has room for."""
        return self.buckets[bisect.bisect_left(self.buckets, num_requests)]

    def covers(self, num_requests: int, plan: DraftPlan, level: int = 0) -> bool:
        """Whether a step of so many requests that all have this plan, with sampling of this level, is replayed."""
        blocks = {(plan.block_length, plan.has_anchor)} if plan.num_branches else set()
        size = self._smallest(num_requests, plan.num_drafts, plan.num_branches, blocks, level)
        return size is not None and _is_worth_it(size, num_requests * plan.num_rows)

    def find(self, plans_N4: IntArray, level: int = 0) -> StepSize | None:
        """The size in which requests with these plans (fields of ``DraftPlan``) are replayed: that with the fewest rows.

        None where there is none that covers them and their level, or only one that is much larger.
        """
        size = self.covering(plans_N4, level)
        num_rows = int((plans_N4[:, 0] + plans_N4[:, 1] * (plans_N4[:, 2] + plans_N4[:, 3])).sum())
        return size if size is not None and _is_worth_it(size, num_rows) else None

    def covering(self, plans_N4: IntArray, level: int = 0) -> StepSize | None:
        """The size with the fewest rows that has room for these plans, however much of it would be padding."""
        run_N2 = plans_N4[plans_N4[:, 1] > 0, 2:]
        if len(run_N2) and (run_N2 == run_N2[0]).all():
            run_N2 = run_N2[:1]  # as mostly: a set of hundreds takes its time
        blocks = {(block, bool(anchor)) for block, anchor in run_N2.tolist()}
        return self._smallest(len(plans_N4), int(plans_N4[:, 0].max()), int(plans_N4[:, 1].max()), blocks, level)

    def _smallest(
        self, num_requests: int, drafts: int, branches: int, blocks: set[tuple[int, bool]], level: int
    ) -> StepSize | None:
        """``drafts`` and ``branches`` of a request at most; ``blocks``: lengths and anchors of the branches' blocks."""
        for size in self._by_places[self.num_places(num_requests)]:
            plan = size.plan
            fits = plan.num_drafts >= drafts and plan.num_branches >= branches and self._level[size] >= level
            if fits and blocks <= {(plan.block_length, plan.has_anchor)}:
                return size
        return None


def _is_worth_it(size: StepSize, num_rows: int) -> bool:
    """Whether a step of so many rows should be replayed in this size, and not be launched without its padding."""
    return size.num_rows <= max(FREE_ROWS, MOST_PADDING * num_rows)
