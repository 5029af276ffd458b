"""Where the tokens of a step end: at a stop id, or at the last token that is wanted."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np

from engine.step import BoolArray, IntArray


@dataclass(frozen=True, slots=True, eq=False)
class Emitted:
    """The tokens of N requests that are kept: ``counts`` of each, one request after the other in ``token_ids``."""

    counts_N: IntArray
    token_ids: IntArray
    is_stopped_N: BoolArray
    is_last_N: BoolArray

    def of(self, row: int) -> tuple[int, ...]:
        """The tokens of one request."""
        end = int(self.counts_N[: row + 1].sum())
        return tuple(self.token_ids[end - int(self.counts_N[row]) : end].tolist())


class StopTable:
    """Which token ids end somebody's answer. Only steps in which one of them is emitted look at whose it is."""

    def __init__(self) -> None:
        # One entry per id up to the greatest, and one more that is always 0, for all ids behind it.
        self._users: IntArray = np.zeros(1, dtype=np.int64)

    def add(self, stop_token_ids: Collection[int]) -> None:
        """A request with these stop ids begins to run."""
        missing = max(stop_token_ids, default=0) + 2 - len(self._users)
        if missing > 0:
            self._users = np.concatenate((self._users, np.zeros(missing, dtype=np.int64)))
        self._users[list(stop_token_ids)] += 1

    def remove(self, stop_token_ids: Collection[int]) -> None:
        """A request with these stop ids runs no longer."""
        self._users[list(stop_token_ids)] -= 1

    def cut(
        self,
        token_ids_NK: IntArray,
        counts_N: IntArray,
        wanted_N: IntArray,
        stop_token_ids: Callable[[int], Collection[int]],
    ) -> Emitted:
        """Keep at most ``wanted`` of ``counts`` tokens, up to and with the first stop id of their own request.

        ``stop_token_ids`` tells those of a row. A stop id at the last wanted token is a stop.
        """
        counts_N = np.minimum(counts_N, wanted_N)
        is_stopped_N = np.zeros(len(counts_N), dtype=bool)
        token_ids = _front(token_ids_NK, counts_N)
        is_candidate = self._users.take(token_ids, mode="clip") > 0
        if is_candidate.any():
            rows = np.unique(np.repeat(np.arange(len(counts_N)), counts_N)[is_candidate])
            for row in rows.tolist():
                stops = stop_token_ids(row)
                tokens = token_ids_NK[row, : counts_N[row]].tolist()
                first = next((i for i, token in enumerate(tokens) if token in stops), None)
                if first is not None:
                    counts_N[row], is_stopped_N[row] = first + 1, True
            token_ids = _front(token_ids_NK, counts_N)
        return Emitted(counts_N, token_ids, is_stopped_N, (counts_N == wanted_N) & ~is_stopped_N)

    def check_integrity(self, running: Collection[Collection[int]]) -> None:
        """Raise AssertionError unless the table counts exactly these requests' stop ids."""
        users = np.zeros_like(self._users)
        for stop_token_ids in running:
            users[list(stop_token_ids)] += 1
        assert (users == self._users).all(), "the table of stop ids has lost count"


def _front(token_ids_NK: IntArray, counts_N: IntArray) -> IntArray:
    """The first ``counts`` entries of each row, one row after the other."""
    front: IntArray = token_ids_NK[np.arange(token_ids_NK.shape[1]) < counts_N[:, None]]
    return front
