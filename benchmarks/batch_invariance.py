"""What ``--batch-invariant`` costs on a CPU, and how often a batch or a decode mode changes bits without it.

``python -m benchmarks.batch_invariance``. Speed: every plan with and without the setting, once a round, in turn; medians over
rounds. Bits: the log-probabilities of every token of every answer and of the 20 likeliest tokens there, in a batch and mode,
beside those of the same request alone in ``ar``, up to where the tokens part. Half of the requests are greedy, half sampled.
"""

from __future__ import annotations

import argparse
import math
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer

from benchmarks.bundled import MAX_TOKENS, MODEL, build_engine, load_bundled, run_engine
from benchmarks.prompts import prompt_sets
from benchmarks.report import finish, table
from engine.core import EngineCore
from engine.messages import GenerateRequest, TokenLogprobs
from engine.models.transformer import Transformer
from engine.sampling_params import DecodingMode, SamplingParams

NUM_TOP = 20
PLANS = {
    "ar": (DecodingMode.AR, 1),
    "linear": (DecodingMode.LINEAR, 1),
    "tidar, 1 branch": (DecodingMode.TIDAR, 1),
    "tidar, all branches": (DecodingMode.TIDAR, None),
}


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens per second of a plan at a batch size, without the setting and with it."""

    plan: str
    batch: int
    plain: float
    invariant: float

    @property
    def cost(self) -> float:
        """How many times slower the setting is."""
        return self.plain / self.invariant


@dataclass(frozen=True, slots=True)
class Mismatches:
    """Of one plan at a batch size, beside each request alone in ``ar``: positions compared, those where a log-probability has
    other bits, the largest difference, answers, and those with other tokens.
    """

    plan: str
    batch: int
    invariant: bool
    tokens: int
    other_bits: int
    largest: float
    answers: int
    other_tokens: int


def measure_speed(models: dict[bool, Transformer], prompts: list[list[int]], batch: int, rounds: int) -> list[Speed]:
    """Interleaved rounds over plans and settings; the first one warms up."""
    cores = {
        (name, is_on): build_engine(models[is_on], mode, None, branches, batch)
        for name, (mode, branches) in PLANS.items()
        for is_on in models
    }
    samples: dict[tuple[str, bool], list[float]] = {key: [] for key in cores}
    for number in range(rounds + 1):
        for key, core in cores.items():
            sample = run_engine(core, prompts)[0]
            if number > 0:
                samples[key].append(sample.tokens / sample.seconds)
    return [Speed(name, batch, *(statistics.median(samples[name, is_on]) for is_on in (False, True))) for name in PLANS]


def logprobs(core: EngineCore, prompts: list[list[int]]) -> list[list[TokenLogprobs]]:
    """Tokens of every answer with their log-probabilities, each request with a seed of its own."""
    found: dict[str, list[TokenLogprobs]] = {str(i): [] for i in range(len(prompts))}
    for i, prompt in enumerate(prompts):
        sampling = SamplingParams(MAX_TOKENS, seed=i, temperature=float(i % 2), logprobs=NUM_TOP)
        core.add(GenerateRequest(str(i), tuple(prompt), sampling))
    while core.has_work:
        for output in core.step().outputs:
            found[output.request_id] += output.logprobs
    return list(found.values())


def count_mismatches(
    plan: str, batch: int, is_on: bool, given: list[list[TokenLogprobs]], alone: list[list[TokenLogprobs]]
) -> Mismatches:
    """Compare answers token by token, up to where they part."""
    gaps: list[float] = []  # the largest of each position
    for one, other in zip(given, alone, strict=True):
        for a, b in zip(one, other, strict=False):
            if a.token_id != b.token_id:
                break
            ours, theirs = (dict((*entry.top, (entry.token_id, entry.logprob))) for entry in (a, b))
            gaps.append(max(abs(value - theirs.get(token, math.inf)) for token, value in ours.items()))
    parted = sum([a.token_id for a in x] != [b.token_id for b in y] for x, y in zip(given, alone, strict=True))
    return Mismatches(
        plan, batch, is_on, len(gaps), sum(g > 0 for g in gaps), max(filter(math.isfinite, gaps)), len(given), parted
    )


def main() -> None:
    """Measure and report. Exits with an error if the setting does not keep its promise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=48, help="prompts of each set (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="also write the JSON line to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    models = {is_on: load_bundled(batch_invariant=is_on) for is_on in (False, True)}
    sets = prompt_sets(AutoTokenizer.from_pretrained(MODEL), arguments.prompts)
    mismatches: list[Mismatches] = []
    for is_on, model in models.items():
        prompts = sets["known"] + sets["new"]
        alone = logprobs(build_engine(model, DecodingMode.AR, None, 1, 1), prompts)
        for batch in arguments.batch:
            for name, (mode, branches) in PLANS.items():
                given = logprobs(build_engine(model, mode, None, branches, batch), prompts)
                mismatches.append(count_mismatches(name, batch, is_on, given, alone))
    bits = [
        (m.plan, str(m.batch), "on" if m.invariant else "off", str(m.tokens), str(m.other_bits), f"{m.largest:.1e}",
         f"{m.other_tokens} of {m.answers}")
        for m in mismatches
    ]  # fmt: skip
    print(table(("plan", "batch", "setting", "tokens", "other bits", "largest", "other tokens"), bits))
    if any(m.other_bits or m.other_tokens for m in mismatches if m.invariant):
        raise SystemExit("the setting does not keep its promise: its speed is not reported")
    speeds = [s for batch in arguments.batch for s in measure_speed(models, sets["new"], batch, arguments.rounds)]
    print(table(("plan", "batch", "tokens/s without", "with", "times slower"),
                [(s.plan, str(s.batch), f"{s.plain:.0f}", f"{s.invariant:.0f}", f"{s.cost:.2f}") for s in speeds]))  # fmt: skip
    results = {"speed": [asdict(s) | {"cost": s.cost} for s in speeds], "bits": [asdict(m) for m in mismatches]}
    finish("batch_invariance", results, arguments.out)


if __name__ == "__main__":
    main()
