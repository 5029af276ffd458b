"""Everything that a GPU has to show, in resumable parts of a few minutes: ``python3 -m benchmarks.gpu --out DIR``."""

from __future__ import annotations

import argparse
import gc
import time
from pathlib import Path

import torch

from benchmarks.gpu import record
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.calls import CALLS
from benchmarks.gpu.processes import end_when_asked
from benchmarks.gpu.report import write_report
from benchmarks.gpu.runner import all_parts, run_all, run_part
from benchmarks.gpu.shapes import MODELS


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.gpu", description=__doc__)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="where records and report are; a run goes on there"
    )
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument(
        "--section",
        nargs="+",
        default=[],
        metavar="NAME",
        help="only these sections or parts (step, step.8b.triton); report: none, but the report",
    )
    chosen.add_argument(
        "--call", type=int, choices=range(1, 1 + len(CALLS)), help="the parts of one of three runs of 9 minutes"
    )
    parser.add_argument("--model", nargs="+", choices=[*MODELS], default=[*MODELS], help="only these models (default: all)")
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="end by then, or half a minute later: every part is given its share"
    )
    parser.add_argument("--peers", type=Path, metavar="DIR", help="holds any of gpt-fast/, mini-sglang/, site/ (packages)")
    parser.add_argument("--retry", action="store_true", help="run again what failed or was cut short")
    parser.add_argument("--list", action="store_true", help="print the parts, the longest that each may take, and its question")
    parser.add_argument(
        "--dry-run", action="store_true", help="everything tiny, on the CPU, in one process: tests the benchmark"
    )
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run parts, then report; the exit status is 1 where a part failed."""
    options = parse(arguments)
    wanted = CALLS[options.call - 1] if options.call else {}
    try:
        parts = all_parts(options.model, [options.part] if options.part else options.section)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    if wanted:
        by_name = {part.name: part for part in parts}
        parts = [by_name[name] for name in wanted if name in by_name]
    if options.list:
        for part in parts:
            print(f"{part.name:32} {wanted.get(part.name, part.section.seconds):4.0f} s  {part.section.answers}")
        return 0
    if parts and not options.dry_run and not torch.cuda.is_available():
        raise SystemExit("torch finds no CUDA GPU: --dry-run runs everything tiny on the CPU")
    bench = Bench(options.out, options.dry_run, options.peers)
    if options.part:
        end_when_asked()
        gc.freeze()  # modules live on: collecting what an engine leaves need not look at them
        seconds = None if options.until is None else options.until - time.time()
        return int(run_part(bench, parts[0], seconds).status == "failed")
    arguments = None if options.dry_run else _child_arguments(options)
    left = run_all(bench, parts, options.minutes, arguments, wanted, options.retry)
    print(write_report(options.out), end="")
    if left:
        print(f"no time was left for {', '.join(part.name for part in left)}: run the same command again")
    return int(any(found.status == "failed" for found in record.read_all(options.out).values()))


def _child_arguments(options: argparse.Namespace) -> list[str]:
    peers = ["--peers", str(options.peers.resolve())] if options.peers is not None else []
    return ["--out", str(options.out.resolve()), *peers]


if __name__ == "__main__":
    raise SystemExit(main())
