"""Tokens per second of the whole loop: every fixed plan and ``auto``, by batch, with an acceptance that a coin imposes.

Weights are random, so the acceptance has to be imposed, and every name says so. One engine as the server would start it serves
all cells: ``auto`` first, on what the start has captured and timed; then the fixed plans, whose steps are captured if the start
left them out.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.engines import PAGE, Limits, build_core, engine_config, facts
from benchmarks.gpu.loop import Window, decode_window, device_ms, drain, make_requests, together
from benchmarks.gpu.random_model import random_model
from benchmarks.gpu.record import Cell, Record
from benchmarks.gpu.sections.base import Cells, Section, attempt, engine_lines, tabulate
from benchmarks.gpu.shapes import BLOCK_LENGTH, step_work
from engine.config import DecodeConfig
from engine.core import EngineCore
from engine.cuda_graphs import Capture
from engine.decode.acceptance import Acceptance
from engine.decode.goodput import PLAIN, PlanShape, expect
from engine.decode.policy import Drafting
from engine.memory import DeviceMemory
from engine.sampling_params import DecodingMode
from engine.step import DraftPlan
from engine.warm_up import plans_of

BATCHES = (1, 8, 32, 256, 128)
TOKENS_EACH = {1: 384, 8: 384, 32: 256, 128: 160, 256: 128}
ROUNDS = {1: 5}
"""A single request is a small sample of coins, so it is repeated with other seeds."""

FIXED = {
    "ar": (DecodingMode.AR, PlanShape(1, 0)),
    "linear 16": (DecodingMode.LINEAR, PlanShape(16, 0)),
    **{f"tidar 16x{b}": (DecodingMode.TIDAR, PlanShape(16, b)) for b in (7, 1, 3, 16)},
    "tidar 8x8": (DecodingMode.TIDAR, PlanShape(8, 8)),
    "tidar 8x1": (DecodingMode.TIDAR, PlanShape(8, 1)),
    "tidar 4x1": (DecodingMode.TIDAR, PlanShape(4, 1)),
    "linear 4": (DecodingMode.TIDAR, PlanShape(4, 0)),
}
MAX_CELL_SECONDS = 12.0
MAX_ROWS = 2048


def run(bench: Bench, part: str) -> Cells:
    """Parts ``plans`` and ``long``."""
    model, kind = part.rsplit(".", 1)
    yield from _long(bench, model) if kind == "long" else _plans(bench, model)


def _plans(bench: Bench, model: str) -> Cells:
    """``ar`` and ``auto`` at every batch, which the targets are about, then the other plans; depth 0 at last."""
    batches, capture = list(bench.pick(BATCHES, (1, 2))), bench.capture
    core = start(bench, model, max(batches), bench.size(4096, 512), capture=capture)
    yield facts(core)
    for batch, name in order(batches, list(FIXED)[1 : 3 if bench.is_dry else None]):
        yield cell(bench, core, model, name, batch) | capture.figures
    core.depth = 0
    for batch in batches[:3]:
        for name in ("ar", "tidar 16x7"):
            yield cell(bench, core, model, name, batch) | capture.figures


def order(batches: Sequence[int], fixed: Sequence[str]) -> Iterator[tuple[int, str]]:
    """The cells, those that matter most first: a part may be cut."""
    yield from ((batch, name) for batch in batches for name in ("ar", "auto"))
    for batch in batches:
        for name in fixed:
            if all(batch * plan.num_rows <= MAX_ROWS for plan in FIXED[name][1].steps(has_anchor=False)):
                yield batch, name


def _long(bench: Bench, model: str) -> Cells:
    """Many requests from their prompts to their ends, by ``ar``, against the roofline of exactly that work."""
    count, tokens = bench.size(256, 3), bench.size(1024, 32)
    capture = bench.capture
    core = start(bench, model, count, 2 * tokens + PAGE, DecodingMode.AR, bench.size(8192, 256), capture=capture)
    yield facts(core) | capture.figures
    found: Cell = {"model": model, "name": f"ar, {count} requests of {tokens}/{tokens}", "plan": "ar, long", "batch": count}

    def measure() -> Cell:
        decode_window(core, make_requests(count, PAGE, 32, DecodingMode.AR, 1, 0), 2, 8, MAX_CELL_SECONDS)
        before, begun = core.scheduler.stats(), time.perf_counter()
        for request in make_requests(count, tokens, tokens, DecodingMode.AR, 2, 0):
            core.add(request)
        emitted, seconds = drain(core), time.perf_counter() - begun
        after = core.scheduler.stats()
        floor = long_floor_seconds(bench, model, count, tokens)
        return {
            "tokens_per_second": emitted / seconds,
            "roofline_tokens_per_second": count * tokens / floor,
            "of_roofline": floor / seconds * emitted / (count * tokens),
            "preemptions": after.num_preemptions - before.num_preemptions,
            "wall_ms": 1000 * seconds / (after.num_steps - before.num_steps),
            "kv_tokens": core.info.num_pages * PAGE,
            "depth": core.depth,
        }

    yield attempt(found, measure)


def long_floor_seconds(bench: Bench, model: str, count: int, tokens: int) -> float:
    """Prompts at the matrix product's rate, then one step a token at the larger of both ceilings."""
    config, ceilings = bench.config(model), bench.ceilings
    limits = (ceilings.bytes_per_second, ceilings.flops_per_second)
    prefill = step_work(config, 1, DraftPlan(count * tokens, 0, 1), tokens // 2, bench.dtype.itemsize).floor_ms(*limits)
    steps = (step_work(config, count, DraftPlan(1, 0, 1), tokens + i, bench.dtype.itemsize) for i in range(tokens))
    return (prefill + sum(work.floor_ms(*limits) for work in steps)) / 1000


def start(
    bench: Bench,
    model: str,
    max_num_seqs: int,
    max_model_len: int,
    mode: DecodingMode = DecodingMode.AUTO,
    max_rows: int = MAX_ROWS,
    progress: Callable[[str], None] = print,
    memory: DeviceMemory | None = None,
    capture: Capture | None = None,
) -> EngineCore:
    """An engine with everything that a start does, and an imposed acceptance. With a ``memory`` it sizes its pages itself."""
    network = random_model(bench.config(model), bench.dtype, bench.device, bench.kernels(bench.kernel_names[0], model))
    decode = DecodeConfig(mode, BLOCK_LENGTH, 1, synthetic_acceptance=bench.acceptance(model))
    pages = 1 + max_num_seqs * max_model_len // PAGE
    limits = Limits(max_num_seqs, max_model_len, pages, min(max_rows, bench.size(max_rows, 256)))
    config = engine_config(bench, network.config, limits, decode, share_prefixes=True)
    if memory is not None:
        config = dataclasses.replace(config, cache=dataclasses.replace(config.cache, num_pages=None))
    return build_core(config, network, max_model_len, capture or bench.capture, progress, memory)


def cell(bench: Bench, core: EngineCore, model: str, name: str, batch: int) -> Cell:
    """One plan at one batch."""
    chance = bench.acceptance(model)
    label = name if name == "ar" else f"{name}, synthetic_acceptance={chance}"
    found: Cell = {"model": model, "name": label, "plan": name, "batch": batch, "depth": core.depth}
    return attempt(found, lambda: _measure(bench, core, name, batch, chance))


def _measure(bench: Bench, core: EngineCore, name: str, batch: int, chance: float) -> Cell:
    mode, shape = FIXED.get(name, (DecodingMode.AUTO, None))
    if mode is DecodingMode.TIDAR and shape is not None:
        core.scheduler.planner.use(mode, Drafting(shape.block_length, shape.num_branches))
    _capture(core, batch, mode)
    replays = core.graphs.num_replays if core.graphs is not None else 0
    steps = core.scheduler.stats().num_steps
    windows: list[Window] = []
    busy: list[float] = []

    def watch(core: EngineCore) -> None:
        if not busy and (not bench.is_dry or name == "ar"):
            busy.append(device_ms(core, bench.size(10, 1), not bench.is_dry))

    for seed in range(ROUNDS.get(batch, 1) if not bench.is_dry else 1):
        requests = make_requests(batch, bench.size(1024, 70), bench.size(2048, 64), mode, seed)
        warm_up = bench.size(96 if mode is DecodingMode.AUTO and seed == 0 else 16, 4)
        tokens = bench.size(TOKENS_EACH.get(batch, 128), 8)
        windows.append(decode_window(core, requests, warm_up, tokens, MAX_CELL_SECONDS, watch))
    window = together(windows)
    all_steps = max(1, core.scheduler.stats().num_steps - steps)
    replayed = (core.graphs.num_replays - replays) / all_steps if core.graphs is not None else 0.0
    figures = _figures(window, shape, chance) | {"replayed": replayed}
    return figures | ({"device_ms": busy[0], "idle_ms": max(0.0, figures["wall_ms"] - busy[0])} if busy else {})


def _capture(core: EngineCore, batch: int, mode: DecodingMode) -> None:
    """Have the steps of a fixed plan captured, also those that the start found no time for."""
    if core.graphs is not None and mode is not DecodingMode.AUTO:
        plans = plans_of([core.scheduler.planner.policy_of(mode)], is_auto=False)
        core.graphs.prepare(batch, [plan for plan in plans if plan == PLAIN or batch * plan.num_rows <= MAX_ROWS])


def _figures(window: Window, shape: PlanShape | None, chance: float) -> Cell:
    figures: Cell = {
        "tokens_per_second": window.tokens_per_second,
        "tokens_per_forward": window.tokens_per_forward,
        "expected_tokens_per_forward": None if shape is None else expected_tokens(shape, chance),
        "chosen": window.plan,
        "preemptions": window.stats["num_preemptions"],
        **window.per_step_ms(),
    }
    if shape is not None:
        # The coins of the window are a sample; what the plan gives on average follows from the chance alone.
        factor = expected_tokens(shape, chance) / window.tokens_per_forward
        figures["expected_tokens_per_second"] = window.tokens_per_second * factor
    return figures


def expected_tokens(shape: PlanShape, chance: float) -> float:
    """Tokens a step of a request in the steady state, where every draft is accepted with the same chance."""
    return expect(shape, Acceptance.known([chance] * (shape.block_length - 1))).tokens_per_step


def over_ar(records: list[Record]) -> list[Record]:
    """The records with each speed over that of ``ar`` at the same model, batch and depth."""
    base = {}
    for found in (c for r in records for c in r.cells if c.get("plan") == "ar" and "tokens_per_second" in c):
        base[found["model"], found["batch"], found["depth"]] = found["tokens_per_second"]
    return [
        dataclasses.replace(
            record,
            cells=[
                c | {"over_ar": c["tokens_per_second"] / base[key]}
                if "tokens_per_second" in c and (key := (c["model"], c["batch"], c["depth"])) in base
                else c
                for c in record.cells
            ],
        )
        for record in records
    ]


def show(records: list[Record]) -> str:
    """Tokens per second, over ``ar``, and where the time of a step goes."""
    columns = (
        ("batch", "batch", "d"),
        ("depth", "depth", "d"),
        ("name", "name", ""),
        ("tokens/s", "tokens_per_second", ".0f"),
        ("x ar", "over_ar", ".2f"),
        ("expected/s", "expected_tokens_per_second", ".0f"),
        ("tokens/forward", "tokens_per_forward", ".2f"),
        ("wall ms", "wall_ms", ".3f"),
        ("device ms", "device_ms", ".3f"),
        ("host ms", "host_ms", ".3f"),
        ("replayed", "replayed", ".2f"),
        ("/ roofline", "of_roofline", ".2f"),
        ("chosen", "chosen", ""),
    )
    return "\n".join([tabulate(over_ar(records), columns), *engine_lines(records)])


SECTION = Section(
    "throughput",
    "how many tokens per second does the whole loop give, by plan and batch, at an imposed acceptance?",
    run,
    show,
    300.0,
    per_model=True,
    kinds=("plans", "long"),
)
