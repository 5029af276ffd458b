"""What steps cost: seconds at the loads and rows that were measured, and in between."""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class CostTable:
    """Seconds of a step, measured: ``seconds[i][j]`` at ``num_requests[i]`` requests with ``rows[i][j]`` rows in all.

    Both ascend. Between measured points the cost is linear. Behind the last one a row is taken to cost what it costs there on
    average, which is its full price: what was not measured should not look cheap.
    ``uncaptured`` is the least that a step takes which is launched operation by operation, where others are replayed; else 0.
    ``per_kv_token`` is added for each token in the cache of a request, ``per_row_token`` for each row and token that it sees.
    """

    num_requests: tuple[int, ...]
    rows: tuple[tuple[int, ...], ...]
    seconds: tuple[tuple[float, ...], ...]
    per_kv_token: float = 0.0
    per_row_token: float = 0.0
    uncaptured: float = 0.0

    @staticmethod
    def of_plain(values: Mapping[str, Any]) -> CostTable:
        """From what ``asdict`` gives, lists for tuples. Raises TypeError for other fields."""
        return CostTable(**{name: _as_tuples(value) for name, value in values.items()})

    def cost(self, num_requests: int, rows: float, context: float = 0.0) -> float:
        """Seconds of a step of ``num_requests`` requests with ``rows`` rows in all and ``context`` cached tokens each."""
        base = self._base(num_requests, rows / num_requests)
        return base + context * (num_requests * self.per_kv_token + rows * self.per_row_token)

    def cost_in_places(self, num_requests: int, places: int, rows_each: float, context: float) -> float:
        """Seconds of a step with ``places`` for requests, each of ``rows_each`` rows, some of which nobody has: a place that is
        nobody's costs rows, but has no tokens in the cache.
        """
        return self.cost(places, places * rows_each, context * num_requests / places)

    def _base(self, num_requests: int, rows_each: float) -> float:
        after = bisect.bisect_left(self.num_requests, num_requests)
        near = slice(max(0, after - 1), after + 1)
        counts = self.num_requests[near]
        seconds = [
            _interpolate(rows, seconds, rows_each * n)
            for n, rows, seconds in zip(counts, self.rows[near], self.seconds[near], strict=True)
        ]
        return _interpolate(counts, seconds, num_requests)


def _as_tuples(value: Any) -> Any:
    return tuple(_as_tuples(v) for v in value) if isinstance(value, list) else value


def _interpolate(xs: Sequence[float], ys: Sequence[float], x: float) -> float:
    """Piecewise linear through ascending ``xs``; constant in front of the first, proportional behind the last."""
    if x <= xs[0]:
        return ys[0]
    if x > xs[-1]:
        return ys[-1] * x / xs[-1]
    i = bisect.bisect_left(xs, x)
    return ys[i - 1] + (ys[i] - ys[i - 1]) * (x - xs[i - 1]) / (xs[i] - xs[i - 1])
