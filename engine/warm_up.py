"""What an engine does before it serves: it captures the steps that it will replay, and times its draft plans on that path.

Both are bounded in time, cheap steps come before dear ones, and what is left out is told: steps that were not captured run
operation by operation, and ``auto`` leaves them alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch

from engine.config import SchedulerConfig
from engine.cuda_graphs import ALL_NEEDS, GREEDY, StepGraphs
from engine.decode.auto import GoodputPolicy
from engine.decode.costs import CostTable
from engine.decode.goodput import PLAIN, Execution, PlanShape, plan_shapes
from engine.decode.measure import StepTimer, measure_costs, powers_of_two
from engine.decode.policy import Drafting, DraftPolicy
from engine.input_batch import SamplingNeeds
from engine.step import DraftPlan

MAX_CAPTURE_SECONDS = 60.0

MEASURED_CONTEXT = 4096
"""Most cached tokens of a request at which the cost of attention is timed."""


def plans_of(policies: Iterable[DraftPolicy], is_auto: bool) -> list[DraftPlan]:
    """The plans of whole steps that these policies may take, each once; ``is_auto``: those that ``auto`` compares as well."""
    plans = [PLAIN]
    for policy in policies:
        if isinstance(policy, Drafting):
            more = plan_shapes(policy.block_length, not policy.has_anchor) if is_auto else ()
            shapes = (PlanShape(policy.block_length, policy.num_branches), *more)
            plans += [plan for shape in shapes for plan in shape.steps(policy.has_anchor)]
    return list(dict.fromkeys(plans))


@torch.inference_mode()
def capture_steps(
    graphs: StepGraphs,
    plans: Sequence[DraftPlan],
    needs: Iterable[SamplingNeeds],
    max_rows: int,
    progress: Callable[[str], None],
    seconds: float = MAX_CAPTURE_SECONDS,
) -> int:
    """Capture the plans for every bucket of requests, as far as rows, memory and time allow; returns how many were left out.

    ``needs``: what the sampling of the requests to come will mostly need. Every step is captured with them and for greedy
    decoding, then with all options, which serves every other request. The step that needs most memory is captured before
    all others: they share its memory, but a step that needs more than those before it would take its own beside theirs.
    """
    pairs = [(n, plan) for n in graphs.sizes.buckets for plan in plans]
    sizes = sorted((n * plan.num_rows, n, plan) for n, plan in pairs if n * plan.num_rows <= max_rows)
    first = tuple(dict.fromkeys((GREEDY, *needs)))
    steps = [(n, plan, need) for wanted in (first, (ALL_NEEDS,)) for _, n, plan in sizes for need in wanted]
    steps = list(dict.fromkeys((steps[-1], *steps)))
    deadline, too_large, left_out, problem = math.inf, math.inf, 0, ""
    for done, (num_requests, plan, need) in enumerate(steps):
        num_rows = num_requests * plan.num_rows
        is_late = time.perf_counter() > deadline
        if is_late or num_rows >= too_large:
            left_out, problem = left_out + 1, f"{seconds:.0f} s are over" if is_late else problem
            continue
        try:
            graphs.prepare(num_requests, [plan], need)
        except torch.OutOfMemoryError:
            too_large, left_out, problem = num_rows, left_out + 1, "there is no memory left for them"
        if done == 0:
            # It has compiled what the others only launch.
            deadline = time.perf_counter() + seconds
        if done % 32 == 0:
            progress(f"captured {done - left_out} of {len(steps)} steps")
    progress(
        f"{left_out} of {len(steps)} steps are not captured: {problem}" if left_out else f"captured all {len(steps)} steps"
    )
    return left_out


def follow_goodput(
    configured: Drafting,
    timer: StepTimer,
    uncaptured_timer: StepTimer,
    graphs: StepGraphs | None,
    limits: SchedulerConfig,
    is_ahead: bool,
    max_context: int,
    num_tokens: int,
    keep: Callable[[Callable[[], CostTable]], CostTable],
) -> GoodputPolicy:
    """Time the draft plans, and return the policy that picks among them. ``keep`` may know the costs from an earlier start.

    ``uncaptured_timer`` times steps that are not replayed. ``is_ahead``: as in ``Execution``. ``max_context``: the most tokens
    that a request may have in the cache; ``num_tokens``: those that the cache has room for.
    """
    # Where memory sufficed for no capture at all, every step is launched operation by operation.
    sizes = graphs.sizes if graphs is not None and graphs.num_captured else None
    counts = powers_of_two(limits.max_num_seqs) if sizes is None else sizes.buckets
    room = (limits.max_num_batched_tokens, min(max_context, MEASURED_CONTEXT), num_tokens)

    def measured() -> CostTable:
        costs = measure_costs(timer, configured.block_length, counts, *room, configured.has_anchor, sizes)
        return costs if sizes is None else replace(costs, uncaptured=uncaptured_timer(1, PLAIN, 0))

    execution = Execution(sizes, is_ahead, limits.max_num_batched_tokens, configured.has_anchor)
    return GoodputPolicy(configured, keep(measured), execution)
