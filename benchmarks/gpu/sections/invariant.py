"""How often a batch changes an answer without ``--batch-invariant``, and what the option costs."""

from __future__ import annotations

import functools

from transformers import AutoTokenizer

from benchmarks.bundled import MODEL
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.engines import AR, PAGE, ROOM, Limits, StepRig, plan_name, tidar
from benchmarks.gpu.random_model import random_model
from benchmarks.gpu.record import Cell, Record
from benchmarks.gpu.sections.base import Cells, Section, attempt, tabulate
from benchmarks.prompts import prompt_sets
from engine.build import build_engine_core
from engine.config import CacheConfig, DecodeConfig, EngineConfig, SchedulerConfig
from engine.messages import GenerateRequest
from engine.sampling_params import DecodingMode, SamplingParams
from kernels.backend import select_kernels

MODES = {"ar, alone": (DecodingMode.AR, 1), "ar": (DecodingMode.AR, 16), "linear": (DecodingMode.LINEAR, 16),
         "tidar": (DecodingMode.TIDAR, 16)}  # fmt: skip


def run(bench: Bench, part: str) -> Cells:
    """Answers of the bundled model alone and in a batch, then steps, with the option and without it."""
    prompts = prompt_sets(AutoTokenizer.from_pretrained(MODEL), bench.size(48, 2))["new"]
    for is_on in (False, True):
        expected: list[tuple[int, ...]] = []
        for name, (mode, batch) in MODES.items():
            found: Cell = {"what": "answers of the bundled model", "invariant": is_on, "mode": name}
            try:
                given = _answers(bench, prompts, mode, batch, is_on)
            except Exception as error:  # an option that fails is a finding
                yield found | {"error": f"{type(error).__name__}: {str(error)[:300]}"}
                break
            expected = expected or given
            differing = sum(a != b for a, b in zip(given, expected, strict=True))
            yield found | {"answers": len(given), "differing": differing, "rate": differing / len(given)}
    yield from _costs(bench)


def _answers(
    bench: Bench, prompts: list[list[int]], mode: DecodingMode, batch: int, is_invariant: bool
) -> list[tuple[int, ...]]:
    """Greedy and sampled by turns, each request with a seed of its own."""
    config = EngineConfig(
        str(MODEL),
        dtype="float32" if bench.is_dry else "bfloat16",
        device=str(bench.device),
        kernels=bench.kernel_names[0],
        max_model_len=512,
        cache=CacheConfig(num_pages=1 + batch * 8),
        scheduler=SchedulerConfig(batch),
        decode=DecodeConfig(DecodingMode.TIDAR, None, 2),
        batch_invariant=is_invariant,
    )
    core = build_engine_core(config)
    answers: dict[str, list[int]] = {str(i): [] for i in range(len(prompts))}
    for i, prompt in enumerate(prompts):
        sampling = SamplingParams(bench.size(96, 6), seed=i, temperature=0.7 * (i % 2))
        core.add(GenerateRequest(str(i), tuple(prompt), sampling, mode))
    while core.has_work:
        for output in core.step().outputs:
            answers[output.request_id] += output.token_ids
    return [tuple(answer) for answer in answers.values()]


def _costs(bench: Bench) -> Cells:
    model, context = "8b", bench.size(1024, 64)
    batches = bench.pick((1, 8, 32), (1,))
    for is_on in (False, True):
        name, config = bench.kernel_names[0], bench.config(model)
        invariant = functools.partial(select_kernels, name, bench.device, bench.dtype, config.num_kv_heads, True)
        network = random_model(config, bench.dtype, bench.device, invariant() if is_on else bench.kernels(name, model))
        pages = 1 + max(batches) * (context + ROOM) // PAGE
        rig = StepRig(bench, network, Limits(max(batches), context + ROOM, pages), {"batch_invariant": is_on})
        for batch in batches:
            for plan in bench.pick((AR, tidar(16, 1), tidar(8, 8)), (AR,)):
                cell: Cell = {"what": f"step of {model}", "invariant": is_on, "batch": batch, "plan": plan_name(plan)}
                yield attempt(cell, lambda r=rig, b=batch, p=plan: {"ms": r.ms(b, p, context)[0]})
        del rig, network
        bench.release()


def show(records: list[Record]) -> str:
    """Rates of mismatches; milliseconds of steps."""
    columns = (("what", "what", ""), ("invariant", "invariant", ""), ("mode", "mode", ""), ("answers", "answers", "d"),
               ("differing", "differing", "d"), ("batch", "batch", "d"), ("plan", "plan", ""), ("ms", "ms", ".3f"))  # fmt: skip
    return tabulate(records, columns)


SECTION = Section("invariant", "how often does a batch change an answer, and what does invariance cost?", run, show, 240.0)
