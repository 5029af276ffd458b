"""What running streams notice of long prompts that arrive: the time between the pieces of a stream."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections import defaultdict

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.engines import facts
from benchmarks.gpu.loop import decode_window, drain, make_requests
from benchmarks.gpu.record import Cell, Record
from benchmarks.gpu.sections.base import Cells, Section, attempt, engine_lines, tabulate
from benchmarks.gpu.sections.throughput import start
from engine.core import EngineCore
from engine.sampling_params import DecodingMode

NUM_STREAMS, PROMPT_TOKENS, NUM_ARRIVALS = 16, 8192, 6
SECONDS_BETWEEN = 0.5
_SEEDS = itertools.count(1000)
"""Of prompts: none may be found in the cache, where those of another cell are."""

ROWS = (512, 2048)
"""Rows of a step: a prompt is computed in chunks that fit beside the streams."""


def run(bench: Bench, model: str) -> Cells:
    """With arrivals and without, by ``auto`` and by ``ar``, for small and for large steps.

    One engine serves all of them: what bounds a step is a setting of its scheduler alone. A start costs most of the time.
    """
    longest, rows, capture = bench.size(PROMPT_TOKENS, 200), bench.pick(ROWS, (64, 128)), bench.capture
    room = longest + bench.size(4096, 256)
    core = start(bench, model, bench.size(NUM_STREAMS, 2) + 2, room, max_rows=max(rows), capture=capture)
    yield facts(core) | capture.figures
    limits = core.scheduler.config
    for most in rows:
        core.scheduler.config = dataclasses.replace(limits, max_num_batched_tokens=most)
        decode_window(core, make_requests(2, longest, 32, DecodingMode.AR, 99 + most, 0), 2, 4, 10.0)  # compiles for the chunks
        for mode in (DecodingMode.AUTO, DecodingMode.AR):
            for arrivals in (bench.size(NUM_ARRIVALS, 1), 0):
                cell = {"mode": mode.value, "synthetic_acceptance": bench.acceptance(model), "max_rows": most,
                        "arrivals": arrivals}  # fmt: skip
                yield attempt(cell, lambda mode=mode, n=arrivals: _measure(bench, core, mode, n))


def _measure(bench: Bench, core: EngineCore, mode: DecodingMode, arrivals: int) -> Cell:
    streams = make_requests(bench.size(NUM_STREAMS, 2), bench.size(1024, 40), bench.size(3000, 100), mode, 7)
    prompts = make_requests(arrivals, bench.size(PROMPT_TOKENS, 200), 8, mode, next(_SEEDS), 0)
    for request in streams:
        core.add(request)
    waiting = {request.request_id for request in streams}
    while waiting:
        waiting -= {output.request_id for output in core.step().outputs if output.token_ids}
    interval = SECONDS_BETWEEN if not bench.is_dry else 0.0
    begun = time.perf_counter()
    due = [(begun + interval * (1 + i), request) for i, request in enumerate(prompts)]
    pending = {request.request_id for request in prompts}
    last: dict[str, float] = {}
    gaps: dict[str, list[float]] = defaultdict(list)
    tokens = 0
    while pending or time.perf_counter() < begun + 4 * interval:
        while due and time.perf_counter() >= due[0][0]:
            core.add(due.pop(0)[1])
        outputs, now = core.step().outputs, time.perf_counter()
        for output in outputs:
            if output.request_id in pending:
                pending -= {output.request_id} if output.finish_reason is not None else set()
            elif output.token_ids:
                tokens += len(output.token_ids)
                gaps[output.request_id].append(now - last[output.request_id]) if output.request_id in last else None
                last[output.request_id] = now
    seconds = time.perf_counter() - begun
    for request in streams:
        core.abort(request.request_id)
    drain(core)
    return _figures([gap for of_stream in gaps.values() for gap in of_stream], tokens / seconds)


def _figures(gaps: list[float], tokens_per_second: float) -> Cell:
    if len(gaps) < 2:
        return {"tokens_per_second": tokens_per_second}
    percentiles = statistics.quantiles(gaps, n=100, method="inclusive")
    return {
        "gap_p50_ms": 1000 * percentiles[49],
        "gap_p99_ms": 1000 * percentiles[98],
        "gap_max_ms": 1000 * max(gaps),
        "tokens_per_second": tokens_per_second,
    }


def show(records: list[Record]) -> str:
    """The gaps between pieces; a piece is what one step gave a stream."""
    columns = (("mode", "mode", ""), ("rows a step", "max_rows", "d"), ("prompts", "arrivals", "d"),
               ("p50 ms", "gap_p50_ms", ".2f"), ("p99 ms", "gap_p99_ms", ".2f"), ("max ms", "gap_max_ms", ".1f"),
               ("streams' tokens/s", "tokens_per_second", ".0f"))  # fmt: skip
    return "\n".join([tabulate(records, columns), *engine_lines(records)])


SECTION = Section("streams", "how long do 16 streams wait while prompts of 8k tokens arrive?", run, show, 200.0, per_model=True)
