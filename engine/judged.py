"""A judged step as the scheduler reads it: the columns of its plan and its result, for the requests that still run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from engine.step import BoolArray, IntArray, StepPlan, StepResult

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class JudgedStep:
    """Columns over N requests; ``rows`` are their numbers in the plan, in order, None where it is all of them.

    The four counts are those of ``RequestResult``: tokens emitted, drafts verified, held and committed.
    """

    slots_N: IntArray
    shapes_N6: IntArray
    max_computed_N: IntArray
    num_emitted_N: IntArray
    num_verified_N: IntArray
    num_held_N: IntArray
    num_committed_N: IntArray
    token_ids_NK: IntArray
    rows_N: IntArray | None

    @staticmethod
    def of(plan: StepPlan, result: StepResult, is_live_N: BoolArray) -> JudgedStep:
        """The rows of requests that are still those for which the step was launched."""
        rows = None if is_live_N.all() else np.flatnonzero(is_live_N)

        def live(column: IntArray) -> IntArray:
            return column if rows is None else column.take(rows, axis=0)

        counts = live(result.counts)
        return JudgedStep(
            live(plan.slots),
            live(plan.shapes),
            live(plan.max_computed),
            counts[:, 0],
            counts[:, 1],
            counts[:, 2],
            counts[:, 3],
            live(result.token_ids),
            rows,
        )

    @property
    def is_hit(self) -> BoolArray:
        """Whether a branch was hit, [N]."""
        return self.num_held_N > 1

    def by_row(self, sparse: Mapping[int, T]) -> dict[int, T]:
        """What the result has for few requests, by their row here."""
        if self.rows_N is None or not sparse:
            return dict(sparse)
        row_of = {number: row for row, number in enumerate(self.rows_N.tolist())}
        return {row_of[number]: value for number, value in sparse.items() if number in row_of}
