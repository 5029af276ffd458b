"""What a step costs on this machine: timed on the real path, with requests that do not exist.

Every step lays out, runs and judges the rows of requests that have pages of their own: many requests that all read one page
would find it in a GPU's L2 cache, and cached tokens would look cheaper than they are. A step is launched before the one before
it is read, as the loop does on a GPU, so that the host's work is not part of its time. Measuring is bounded: shapes are timed
from the cheapest on, and those that no time is left for are extrapolated by the table.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from engine.decode.costs import CostTable
from engine.decode.goodput import plan_shapes
from engine.decode.pending import PendingResult
from engine.decode.tidar import TidarDecoder
from engine.sampling_params import DecodingMode, SamplingParams
from engine.step import Admission, DraftPlan, ScheduledRequest, StepPlan
from engine.step_sizes import StepSizes

REPEATS = 3

MAX_SECONDS, MAX_SECONDS_CAPTURED = 2.0, 12.0
"""For all measurements. Where steps are captured there are many more sizes, and what was measured is kept."""

SHARE_OF_CONTEXT = 0.4
"""Of this time, what may go into the cost of cached tokens."""

ROWS_APART = 1.25
"""Fewer rows than this many times those of the size before are not timed: what a step costs follows its rows."""

MANY_ROWS = 64
"""Rows of a request at which the cost of attending to cached tokens is timed, at most."""

Launch = Callable[[StepPlan], PendingResult]
"""Puts a step on the device, on the path that requests take."""

StepTimer = Callable[[int, DraftPlan, int], float]
"""Seconds of a step of so many requests that all have one plan and so many tokens in the cache."""


def step_timer(launch: Launch, decoder: TidarDecoder, block_length: int, num_pages: int) -> StepTimer:
    """Times steps of an engine that serves nobody yet. Its slots and pages are written; a later admission resets them.

    ``num_pages``: those of the cache, the null page included. Where they do not suffice, requests have some in common.
    """
    sampling = SamplingParams(1 << 20, temperature=0.0)
    batch, page_size = decoder.batch, decoder.rows.page_size
    most = batch.block_table_SP.shape[1]

    @torch.inference_mode()
    def timed(num_requests: int, plan: DraftPlan, context: int) -> float:
        admissions = tuple(Admission(i, context, (0,), (), DecodingMode.TIDAR, sampling) for i in range(num_requests))
        each = min(most, -(-(context + block_length) // page_size))
        pages = ((i, j, 1 + (i * each + j) % (num_pages - 1)) for i in range(num_requests) for j in range(each))
        decoder.admit(StepPlan.of(0, (), admissions, pages))
        step = StepPlan.of(0, [ScheduledRequest(i, (), plan, context) for i in range(num_requests)])

        def start() -> PendingResult:
            # The step before has moved them.
            batch.num_computed_S[:num_requests] = context
            batch.num_held_S[:num_requests] = block_length
            return launch(step)

        start().read()
        pending, seconds, begun = start(), [], time.perf_counter()
        for _ in range(REPEATS):
            following = start()
            pending.read()
            pending, ended = following, time.perf_counter()
            seconds.append(ended - begun)
            begun = ended
        pending.read()
        decoder.survival.reset()
        return statistics.median(seconds)

    return timed


def measure_costs(
    timer: StepTimer,
    block_length: int,
    counts: Sequence[int],
    max_rows: int,
    max_context: int,
    num_tokens: int,
    has_anchor: bool = False,
    captured: StepSizes | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> CostTable:
    """Time the plans' rows at these ``counts`` of requests, and what tokens in the cache add.

    ``max_context``: the most tokens that a request has in the cache when that is timed; ``num_tokens``: room for all of them.
    ``captured``: the sizes of captured steps, None where steps are not captured; a plan in another size is left out.
    """
    shapes = plan_shapes(block_length, has_short_blocks=not has_anchor)
    full = [shape.plan(has_anchor) for shape in shapes]
    plans = _apart({plan.num_rows: plan for plan in full})
    counts = [n for n in counts if n <= max_rows]
    timer(1, plans[min(plans)], 0)  # the first step of all pays for what is built once
    seconds = MAX_SECONDS if captured is None else MAX_SECONDS_CAPTURED
    begun = clock()

    def is_possible(n: int, each: int) -> bool:
        return n * each <= max_rows and (captured is None or captured.covers(n, plans[each]))

    timed: dict[int, dict[int, float]] = {n: {} for n in counts}
    for _, n, each in sorted((n * each, n, each) for n in counts for each in plans if is_possible(n, each)):
        # However slow the machine is, the cheapest step is timed: a table needs a point.
        if any(timed.values()) and clock() > begun + seconds * (1 - SHARE_OF_CONTEXT):
            break
        timed[n][each] = timer(n, plans[each], 0)
    measured = [n for n in counts if timed[n]]
    probes = [
        (n, each, context)
        for context in sorted({max_context // 4, max_context} - {0})
        for n in _spread([n for n in measured if n * (context + block_length) <= num_tokens] or measured[:1])
        for each in _spread([each for each in timed[n] if each <= MANY_ROWS] or [min(timed[n])])
    ]
    added: list[tuple[int, int, int, float, float]] = []
    for n, each, context in sorted(probes, key=lambda probe: probe[0] * probe[1] * probe[2]):
        if added and clock() > begun + seconds:
            break
        added.append((n, each, context, timer(n, plans[each], context), timed[n][each]))
    return CostTable(
        tuple(measured),
        tuple(tuple(n * each for each in sorted(timed[n])) for n in measured),
        tuple(_ascending([timed[n][each] for each in sorted(timed[n])]) for n in measured),
        *_context_costs(added),
    )


def _apart(plans: dict[int, DraftPlan]) -> dict[int, DraftPlan]:
    """Of plans by their rows, those that are ``ROWS_APART``, and the largest, behind which rows count their full price."""
    kept: dict[int, DraftPlan] = {}
    for rows in sorted(plans):
        if not kept or rows >= ROWS_APART * max(kept) or rows == max(plans):
            kept[rows] = plans[rows]
    return kept


def _spread(values: Sequence[int]) -> list[int]:
    """The first, the last and one in the middle of ascending values, each once."""
    return sorted({values[0], values[len(values) // 2], values[-1]})


def _ascending(seconds: Sequence[float]) -> tuple[float, ...]:
    """The closest ascending numbers: more rows never cost less, and what looks so is noise.

    Neighbours out of order are replaced by their mean (pooling of adjacent violators), which an outlier moves less than it
    would move a running maximum.
    """
    pools: list[list[float]] = []
    for value in seconds:
        pools.append([value])
        while len(pools) > 1 and statistics.fmean(pools[-2]) > statistics.fmean(pools[-1]):
            last = pools.pop()
            pools[-1] += last
    return tuple(statistics.fmean(pool) for pool in pools for _ in pool)


def _context_costs(added: Sequence[tuple[int, int, int, float, float]]) -> tuple[float, float]:
    """Seconds per cached token, and per row and cached token: least squares, neither below zero.

    ``added``: requests, rows of each, cached tokens of each, seconds with them and without. Errors are taken to grow with the
    seconds, so that each difference counts by its share of them.
    """
    requests, rows, context, with_context, without = np.array(added, dtype=np.float64).T
    tokens = requests * context
    design = np.stack((tokens, rows * tokens), axis=1) / with_context[:, None]
    target = (with_context - without) / with_context
    both = np.linalg.lstsq(design, target, rcond=None)[0]
    if (both >= 0).all():
        return float(both[0]), float(both[1])
    alone = [max(0.0, float(column @ target / (column @ column))) for column in design.T]
    fits = [(alone[0], 0.0), (0.0, alone[1])]
    return min(fits, key=lambda fit: float(np.square(design @ fit - target).sum()))


def powers_of_two(most: int) -> list[int]:
    """1, 2, 4 ... below ``most``, and ``most``."""
    powers = [1]
    while powers[-1] * 2 <= most:
        powers.append(powers[-1] * 2)
    return powers if powers[-1] == most else [*powers, most]
