"""Where a step's tokens end, against the rule for one request."""

from __future__ import annotations

import random

import numpy as np

from engine.stopping import StopTable


def scalar_rule(tokens: list[int], stops: set[int], wanted: int) -> tuple[list[int], bool, bool]:
    """The tokens up to and with the first that ends the request; whether a stop id did, or the limit."""
    for count, token in enumerate(tokens, start=1):
        if token in stops:
            return tokens[:count], True, False
        if count == wanted:
            return tokens[:count], False, True
    return tokens, False, False


def test_a_step_is_cut_as_each_of_its_requests_would_be() -> None:
    rng = random.Random(4)
    met = {"stop": 0, "limit": 0, "stop at the limit": 0, "somebody else's stop": 0}
    for _ in range(300):
        size, width = rng.randint(1, 12), rng.randint(1, 6)
        stops = [set(rng.sample((1, 2, 3, 900), rng.choice((0, 0, 1, 2)))) for _ in range(size)]
        counts = [rng.randint(0, width) for _ in range(size)]
        wanted = [rng.randint(1, width + 2) for _ in range(size)]
        # What stands behind the emitted tokens means nothing, stop id or not.
        tokens = [[rng.randrange(12) for _ in range(width)] for _ in range(size)]
        table = StopTable()
        for own in stops:
            table.add(own)
        emitted = table.cut(np.array(tokens), np.array(counts), np.array(wanted), stops.__getitem__)
        for row in range(size):
            expected, is_stopped, is_last = scalar_rule(tokens[row][: counts[row]], stops[row], wanted[row])
            assert emitted.of(row) == tuple(expected)
            assert (emitted.is_stopped_N[row], emitted.is_last_N[row]) == (is_stopped, is_last)
            met["stop"] += is_stopped
            met["limit"] += is_last
            met["stop at the limit"] += is_stopped and len(expected) == wanted[row]
            met["somebody else's stop"] += any(t in other for other in stops for t in expected) and not is_stopped
        table.check_integrity(stops)
    assert min(met.values()) > 20, met


def test_a_stop_id_counts_as_long_as_one_of_its_requests_runs() -> None:
    table = StopTable()
    table.add({5, 150_000})
    table.add({5})
    table.remove({5, 150_000})
    table.check_integrity([{5}])
    asked: list[int] = []

    def stops(row: int) -> set[int]:
        asked.append(row)
        return {5}

    tokens = np.array([[150_000, 200_000], [7, 5]])
    emitted = table.cut(tokens, np.array([2, 2]), np.array([9, 9]), stops)
    assert emitted.counts_N.tolist() == [2, 2]
    assert emitted.is_stopped_N.tolist() == [False, True]
    assert asked == [1], "only requests that emitted somebody's stop id are looked at"
