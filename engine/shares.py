"""What the requests of one step get, while the step is being planned.

Shape suffixes: N requests of the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.step import IntArray

PREFILL, DRAFTS, BRANCHES, BLOCK, ANCHOR, TARGETS = range(6)
"""Columns of shapes, the fields of ``RequestShape``."""


@dataclass(slots=True, eq=False)
class Shares:
    """Columns over N requests, as they go into a ``StepPlan``. Arrays are new in each step, so a plan may keep them."""

    slots_N: IntArray
    shapes_N6: IntArray
    max_computed_N: IntArray

    def __len__(self) -> int:
        return len(self.slots_N)

    def num_rows(self) -> IntArray:
        """Rows of each request, [N]."""
        shapes = self.shapes_N6
        mask_rows_N = shapes[:, BRANCHES] * (shapes[:, BLOCK] + shapes[:, ANCHOR])
        rows: IntArray = shapes[:, PREFILL] + shapes[:, DRAFTS] + mask_rows_N
        return rows

    def keep(self, rows: IntArray) -> Shares:
        """The shares of these rows."""
        return Shares(self.slots_N[rows], self.shapes_N6.T[:, rows].T, self.max_computed_N[rows])

    def fit(self, budget: int, kept_back: int, for_prompts: int = 0) -> Shares:
        """Cut the shares to ``budget`` rows in all, at least one for each; leave out those that are empty.

        The requests in front come first, but they take neither the one row of a later request nor the ``kept_back`` ones, and
        their drafts and branches leave ``for_prompts`` rows to the prefill tokens of later ones, if those want so many.
        Branches are cut before drafts, and all of them before prefill tokens.
        """
        rows_N = self.num_rows()
        if int(rows_N.sum()) + len(self) + kept_back > budget:
            self._cut(budget, kept_back, for_prompts)
            rows_N = self.num_rows()
        return self if rows_N.all() else self.keep(np.flatnonzero(rows_N))

    def _cut(self, budget: int, kept_back: int, for_prompts: int) -> None:
        """Cut the shares one after the other."""
        cut, last, behind = [], len(self) - 1, int(self.shapes_N6[:, PREFILL].sum())
        for row, (prefill, drafts, branches, block, anchor, targets) in enumerate(self.shapes_N6.tolist()):
            left, behind = budget - (last - row), behind - prefill
            chunk = min(prefill, max(1, left - kept_back))
            # Drafts stand behind the whole prompt.
            left = max(1, left - max(kept_back, min(behind, for_prompts))) - chunk
            drafts = max(0, min(drafts, left))
            branches = max(0, min(branches, (left - drafts) // (block + anchor)))
            if chunk < prefill or drafts + branches == 0:
                drafts, branches, block, anchor = 0, 0, 1, 0
            budget -= chunk + drafts + branches * (block + anchor)
            cut.append((chunk, drafts, branches, block, anchor, targets))
        self.shapes_N6[:] = cut


def together(parts: Sequence[Shares]) -> Shares:
    """The shares of several groups of requests, one after the other."""
    if len(parts) == 1:
        return parts[0]
    return Shares(
        np.concatenate([p.slots_N for p in parts]),
        np.concatenate([p.shapes_N6 for p in parts]),
        np.concatenate([p.max_computed_N for p in parts]),
    )
