"""What a step costs on this machine: timed on the real path, with requests that do not exist.

Every step lays out, runs and judges the rows of requests that have pages of their own: many requests that all read one page
would find it in a GPU's L2 cache, and cached tokens would look cheaper than they are. It is bounded in time: shapes are timed
from the cheapest on, and those that no time is left for are extrapolated by the table.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from engine.decode.goodput import CostTable, plan_shapes
from engine.decode.pending import PendingResult
from engine.decode.tidar import TidarDecoder
from engine.sampling_params import DecodingMode, SamplingParams
from engine.step import Admission, DraftPlan, ScheduledRequest, StepPlan
from engine.step_sizes import StepSizes

MAX_SECONDS = 2.0
REPEATS = 3

MANY_ROWS = 64
"""Rows at which the cost of attending to cached tokens is timed."""

Launch = Callable[[StepPlan], PendingResult]
"""Puts a step on the device, on the path that requests take."""

StepTimer = Callable[[int, DraftPlan, int], float]
"""Seconds of a step of so many requests that all have one plan and so many tokens in the cache."""


def step_timer(launch: Launch, decoder: TidarDecoder, block_length: int, num_pages: int) -> StepTimer:
    """Times steps of an engine that serves nobody yet. Its slots and pages are written; a later admission resets them.

    ``num_pages``: those of the cache, the null page included. Where they do not suffice, requests have some in common.
    """
    sampling = SamplingParams(1 << 20, temperature=0.0)
    page_size, most = decoder.rows.page_size, decoder.batch.block_table_SP.shape[1]

    @torch.inference_mode()
    def timed(num_requests: int, plan: DraftPlan, context: int) -> float:
        admissions = tuple(Admission(i, context, (0,), (), DecodingMode.TIDAR, sampling) for i in range(num_requests))
        each = min(most, -(-(context + block_length) // page_size))
        pages = ((i, j, 1 + (i * each + j) % (num_pages - 1)) for i in range(num_requests) for j in range(each))
        admit = StepPlan.of(0, (), admissions, pages)
        step = StepPlan.of(0, [ScheduledRequest(i, (), plan, context) for i in range(num_requests)])
        seconds = []
        for _ in range(REPEATS):
            decoder.batch.update(admit)
            decoder.batch.num_held_S[:num_requests] = block_length
            begun = time.perf_counter()
            launch(step).read()
            seconds.append(time.perf_counter() - begun)
        decoder.survival.reset()
        return statistics.median(seconds)

    return timed


def measure_costs(
    timer: StepTimer,
    block_length: int,
    counts: Sequence[int],
    max_rows: int,
    max_context: int,
    has_anchor: bool = False,
    captured: StepSizes | None = None,
) -> CostTable:
    """Time the plans' rows at these ``counts`` of requests, and what tokens in the cache add.

    ``captured``: the sizes of captured steps, None where steps are not captured; a plan in another size is left out.
    """
    shapes = plan_shapes(block_length, has_short_blocks=not has_anchor)
    full = [DraftPlan(s.block_length, s.num_branches, s.block_length, has_anchor) for s in shapes]
    plans = {plan.num_rows: plan for plan in full}
    counts = [n for n in counts if n <= max_rows]
    timer(1, plans[min(plans)], 0)  # the first step of all pays for what is built once
    deadline = time.perf_counter() + MAX_SECONDS
    rows: dict[int, list[int]] = {n: [] for n in counts}
    seconds: dict[int, list[float]] = {n: [] for n in counts}
    for total, n, each in sorted((n * each, n, each) for n in counts for each in plans):
        is_possible = total <= max_rows and (captured is None or captured.covers(n, plans[each]))
        # However slow the machine is, the cheapest step is timed: a table needs a point.
        if is_possible and (time.perf_counter() < deadline or not any(rows.values())):
            # More rows never cost less: what looks so is noise.
            seconds[n].append(max(timer(n, plans[each], 0), *seconds[n][-1:], 0.0))
            rows[n].append(total)
    measured = [n for n in counts if rows[n]]
    return CostTable(
        tuple(measured),
        tuple(tuple(rows[n]) for n in measured),
        tuple(tuple(seconds[n]) for n in measured),
        *_context_costs(timer, plans, max_context),
    )


def _context_costs(timer: StepTimer, plans: dict[int, DraftPlan], context: int) -> tuple[float, float]:
    """Seconds per cached token, and per row and cached token, from one request with few rows and with more."""
    few, more = min(plans), max(rows for rows in plans if rows <= MANY_ROWS)
    added = {n: max(0.0, timer(1, plans[n], context) - timer(1, plans[n], 0)) / context for n in (few, more)}
    per_row = max(0.0, added[more] - added[few]) / max(1, more - few)
    return max(0.0, added[few] - few * per_row), per_row


def powers_of_two(most: int) -> list[int]:
    """1, 2, 4 ... below ``most``, and ``most``."""
    powers = [1]
    while powers[-1] * 2 <= most:
        powers.append(powers[-1] * 2)
    return powers if powers[-1] == most else [*powers, most]
