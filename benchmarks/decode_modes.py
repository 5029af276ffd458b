"""Speed of every decode mode on the bundled model, beside Transformers' ``generate`` on the same weights, in one run.

Each round runs every configuration once, in turn, so that a machine that slows down slows down all of them; the figures are
medians over rounds. Answers are greedy and must equal those of ``ar`` or the run fails. Speeds count prefill and decode.
The second table is what grammars cost (``benchmarks/grammar_cost.py``).
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import grammar_cost
from benchmarks.bundled import MAX_TOKENS, MODEL, Sample, build_engine, load_bundled, run_engine
from benchmarks.prompts import prompt_sets
from benchmarks.report import finish, table
from engine.sampling_params import DecodingMode

Run = Callable[[], tuple[Sample, list[tuple[int, ...]]]]
"""Runs a configuration once: what it took, and the answers."""


@dataclass(frozen=True, slots=True)
class Row:
    """One configuration on one prompt set; speeds are medians over rounds, ``speedup`` is over ``ar`` at the same batch."""

    prompts: str
    name: str
    batch: int
    tokens_per_second: float
    tokens_per_forward: float
    tokens_per_pass_with_prefill: float
    rows_per_step: float
    ms_per_step: float
    speedup: float


def run_transformers(
    model: Any, prompts: list[list[int]], batch: int, pad: int, eos: int
) -> tuple[Sample, list[tuple[int, ...]]]:
    """The same prompts through ``generate``, left-padded in batches."""
    answers: list[tuple[int, ...]] = []
    begun = time.perf_counter()
    for start in range(0, len(prompts), batch):
        chunk = prompts[start : start + batch]
        width = max(map(len, chunk))
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in chunk])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in chunk])
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=MAX_TOKENS, do_sample=False, pad_token_id=pad, eos_token_id=eos
        )
        for row in out[:, width:].tolist():
            answers.append(tuple(row[: row.index(eos) + 1] if eos in row else row))
    seconds, tokens = time.perf_counter() - begun, sum(map(len, answers))
    return Sample(seconds, tokens, tokens, 0, 0), answers


def plans(quick: bool) -> list[tuple[str, DecodingMode, int | None, int | None]]:
    """(name, mode, block length, branches) of every engine configuration."""
    found: list[tuple[str, DecodingMode, int | None, int | None]] = [
        ("ar", DecodingMode.AR, None, 1),
        ("auto", DecodingMode.AUTO, None, 1),
    ]
    for k in (8,) if quick else (4, 8):
        found.append((f"linear k={k}", DecodingMode.LINEAR, k, 1))
        for branches in (1, None) if quick else (1, 2, 3, None):
            count = "all" if branches is None else str(branches)
            found.append((f"tidar k={k} branches={count}", DecodingMode.TIDAR, k, branches))
    return found


def measure(runs: dict[str, Run], rounds: int) -> dict[str, list[Sample]]:
    """Run every configuration once a round. Raises SystemExit if an answer differs from that of ``ar``."""
    samples: dict[str, list[Sample]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        expected: list[tuple[int, ...]] | None = None
        for name, run in runs.items():
            sample, answers = run()
            if name == "ar":
                expected = answers
            elif expected is not None and name != "transformers generate" and answers != expected:
                raise SystemExit(f"{name} gave other tokens than ar: speed is not reported on a wrong result")
            if number > 0:  # the first round warms up
                samples[name].append(sample)
    return samples


def summarise(prompts: str, batch: int, samples: dict[str, list[Sample]], num_prompts: int) -> list[Row]:
    """Medians of one prompt set and batch size."""

    def speed(name: str) -> float:
        return statistics.median(s.tokens / s.seconds for s in samples[name])

    rows = []
    for name, found in samples.items():
        s = found[0]
        decode_steps = s.forwards - num_prompts
        rows.append(
            Row(
                prompts,
                name,
                batch,
                speed(name),
                (s.tokens - num_prompts) / decode_steps,
                s.tokens / s.forwards,
                s.rows / s.steps if s.steps else float("nan"),
                1000 * statistics.median(x.seconds / x.steps for x in found) if s.steps else float("nan"),
                speed(name) / speed("ar"),
            )
        )
    return rows


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=48, help="prompts a set (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--quick", action="store_true", help="fewer plans, for a first look")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="also write the JSON line to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = load_bundled()
    peer = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    rows: list[Row] = []
    for set_name, prompts in prompt_sets(tokenizer, arguments.prompts).items():
        for batch in arguments.batch:
            cores = {name: build_engine(model, mode, k, b, batch) for name, mode, k, b in plans(arguments.quick)}
            runs: dict[str, Run] = {name: functools.partial(run_engine, core, prompts) for name, core in cores.items()}
            runs["transformers generate"] = functools.partial(
                run_transformers, peer, prompts, batch, tokenizer.pad_token_id, model.config.eos_token_ids[0]
            )
            rows += summarise(set_name, batch, measure(runs, arguments.rounds), len(prompts))
    grammar_rows = grammar_cost.measure(model, prompt_sets(tokenizer, arguments.prompts)["known"], arguments.rounds)
    header = (
        "prompts",
        "configuration",
        "batch",
        "tokens/s",
        "tokens/forward",
        "with prefill",
        "rows/step",
        "ms/step",
        "x ar",
    )
    cells = [
        (r.prompts, r.name, str(r.batch), f"{r.tokens_per_second:.0f}", f"{r.tokens_per_forward:.2f}",
         f"{r.tokens_per_pass_with_prefill:.2f}", f"{r.rows_per_step:.1f}", f"{r.ms_per_step:.2f}", f"{r.speedup:.2f}")
        for r in rows
    ]  # fmt: skip
    print(table(header, cells))
    print(f"\n{grammar_cost.report(grammar_rows)}")
    finish("decode_modes", {"modes": [asdict(r) for r in rows], "grammars": [asdict(r) for r in grammar_rows]}, arguments.out)


if __name__ == "__main__":
    main()
