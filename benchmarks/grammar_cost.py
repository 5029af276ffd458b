"""What a grammar costs: the request that follows it, and the requests beside it.

Three grammars. One lets every text through, so its answers are those of free text and the difference is the price of the
machinery alone: masks, walks of the drafts, the read from the device. One allows the answers that the model was trained on, and
no others: a grammar that it agrees with. One asks for a JSON object, which the bundled model has never seen, so that it and its
drafts are lost: the worst case.

Batches are free, with one constrained member, or constrained all through, and every batch of prompts runs in all cases in
turn, so that a machine that slows down slows down all of them. ``step`` is the median CPU time of the steps in which every
member decodes, which other work on the machine disturbs less than the clock; ``x free`` its ratio to the free batch of the same
prompts and round, as a median. A batch advances together, so that is what each neighbour pays. Tokens per second are by the
clock.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from llguidance import LLMatcher

from benchmarks.bundled import MAX_TOKENS, build_engine
from benchmarks.report import table
from engine.core import EngineCore
from engine.messages import GenerateRequest, GrammarSpec
from engine.models.transformer import Transformer
from engine.sampling_params import DecodingMode, SamplingParams
from server.grammar import json_grammar
from training.corpus.build import build_corpus

BATCH = 8
ANSWER = {"type": "object", "properties": {"answer": {"type": "string"}}, "required": ["answer"], "additionalProperties": False}
MODES = {
    "ar": (DecodingMode.AR, None, 1),
    "linear k=8": (DecodingMode.LINEAR, 8, 1),
    "tidar k=8 branches=1": (DecodingMode.TIDAR, 8, 1),
    "tidar k=8 branches=all": (DecodingMode.TIDAR, 8, None),
}
FREE = ("free", 0)
CASES = (FREE, ("any text", 1), ("any text", BATCH), ("known answer", 1), ("known answer", BATCH), ("json", 1), ("json", BATCH))
"""A grammar, and how many of a batch follow it."""


@dataclass(frozen=True, slots=True)
class GrammarRow:
    """One mode and one case, over all rounds. ``step_ratio`` is over the free batch beside it."""

    mode: str
    grammar: str
    constrained: int
    batch: int
    tokens_per_forward: float
    tokens_per_second: float
    cpu_ms_per_step: float
    step_ratio: float


@dataclass(frozen=True, slots=True)
class _Run:
    """One batch from its start to its end; ``step`` is the median CPU time of the steps in which every member decoded."""

    seconds: float
    tokens: int
    forwards: int
    step: float
    answers: tuple[tuple[int, ...], ...]


def _grammars() -> dict[str, GrammarSpec]:
    known = " | ".join(json.dumps(answer) for answer in sorted({item.answer for item in build_corpus().items}))
    return {
        "any text": GrammarSpec(LLMatcher.grammar_from_regex("(?s:.*)")),
        "known answer": GrammarSpec(LLMatcher.grammar_from_lark(f"start: {known}")),
        "json": GrammarSpec(asyncio.run(json_grammar(ANSWER, "schema"))),
    }


def _run(core: EngineCore, prompts: Sequence[Sequence[int]], grammar: GrammarSpec | None, count: int) -> _Run:
    """One batch; the first ``count`` of it follow the grammar."""
    for i, prompt in enumerate(prompts):
        sampling = SamplingParams(MAX_TOKENS, temperature=0.0)
        core.add(GenerateRequest(str(i), tuple(prompt), sampling, grammar=grammar if i < count else None))
    answers: list[list[int]] = [[] for _ in prompts]
    steps, is_whole = list[float](), True
    before, begun = core.scheduler.stats().forwards, time.perf_counter()
    while core.has_work:
        decodes, step_begun = is_whole and all(answers), time.process_time()
        outputs = core.step().outputs
        if decodes:
            steps.append(time.process_time() - step_begun)
        for output in outputs:
            answers[int(output.request_id)] += output.token_ids
            is_whole = is_whole and output.finish_reason is None
    seconds, forwards = time.perf_counter() - begun, core.scheduler.stats().forwards - before
    return _Run(seconds, sum(map(len, answers)), forwards, statistics.median(steps), tuple(map(tuple, answers)))


def measure(model: Transformer, prompts: Sequence[Sequence[int]], rounds: int) -> list[GrammarRow]:
    """All modes and cases, ``rounds`` times after one that warms up. Raises SystemExit if an answer differs from ``ar``'s."""
    cores = {name: build_engine(model, mode, k, branches, BATCH) for name, (mode, k, branches) in MODES.items()}
    grammars, whole = _grammars(), len(prompts) - len(prompts) % BATCH
    runs: dict[tuple[str, str, int], list[_Run]] = {(mode, *case): [] for mode in MODES for case in CASES}
    expected: dict[tuple[str, int, int], tuple[tuple[int, ...], ...]] = {}
    for number in range(rounds + 1):
        for start in range(0, whole, BATCH):
            for (mode, grammar, count), found in runs.items():
                run = _run(cores[mode], prompts[start : start + BATCH], grammars.get(grammar), count)
                # A grammar that allows every text changes nothing.
                same_as = FREE if grammar == "any text" else (grammar, count)
                if run.answers != expected.setdefault((*same_as, start), run.answers):
                    raise SystemExit(f"{mode} gave other tokens than ar with {count} of {BATCH} under {grammar!r}")
                if number > 0:
                    found.append(run)
    return [_row(mode, grammar, count, runs) for mode, grammar, count in runs]


def _row(mode: str, grammar: str, count: int, runs: dict[tuple[str, str, int], list[_Run]]) -> GrammarRow:
    found, free = runs[mode, grammar, count], runs[mode, *FREE]
    requests = BATCH * len(found)
    return GrammarRow(
        mode,
        grammar,
        count,
        BATCH,
        (sum(r.tokens for r in found) - requests) / (sum(r.forwards for r in found) - requests),
        statistics.median(r.tokens / r.seconds for r in found),
        1000 * statistics.median(r.step for r in found),
        statistics.median(r.step / beside.step for r, beside in zip(found, free, strict=True)),
    )


def report(rows: Sequence[GrammarRow]) -> str:
    """The table."""
    header = ("configuration", "grammar", "constrained", "tokens/forward", "tokens/s", "step, CPU ms", "x free")
    cells = [
        (
            r.mode,
            r.grammar,
            f"{r.constrained} of {r.batch}",
            f"{r.tokens_per_forward:.2f}",
            f"{r.tokens_per_second:.0f}",
            f"{r.cpu_ms_per_step:.2f}",
            f"{r.step_ratio:.2f}",
        )
        for r in rows
    ]
    return table(header, cells)
