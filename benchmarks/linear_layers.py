"""Linear layers of the bundled model's shapes at the row counts of a step: ``F.linear``, transposed and packed weights.

``python -m benchmarks.linear_layers``. Every variant runs once a round, in turn, and finds the caches as the others left them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.report import finish, table
from kernels.linear import reference
from kernels.linear.packed import PackedLinear

SHAPES = [(512, 256), (256, 256), (1280, 256), (256, 640)] * 4 + [(2048, 256)]
ROWS = (1, 2, 8, 16, 72, 128)
ROUNDS, WARM_UP = 100, 10


def variants() -> dict[str, Callable[[dict[int, Tensor]], None]]:
    """Each runs all matrices once on inputs by width."""
    weights = [torch.randn(shape) for shape in SHAPES]
    transposed = [w.t().contiguous() for w in weights]
    packed = PackedLinear()

    def run_reference(inputs: dict[int, Tensor]) -> None:
        for w in weights:
            reference.linear(inputs[w.shape[1]], w)

    def run_transposed(inputs: dict[int, Tensor]) -> None:
        for w in transposed:
            torch.mm(inputs[w.shape[0]], w)

    def run_packed(inputs: dict[int, Tensor]) -> None:
        for w in weights:
            packed(inputs[w.shape[1]], w)

    return {"F.linear": run_reference, "transposed": run_transposed, "packed": run_packed}


@torch.inference_mode()
def main() -> None:
    """Measure and print microseconds for all matrices once, medians over rounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the JSON line to this file")
    arguments = parser.parse_args()
    runs = variants()
    results: list[dict[str, float]] = []
    for rows in ROWS:
        inputs = {width: torch.randn(rows, width) for width in (256, 640)}
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for number in range(WARM_UP + ROUNDS):
            for name, run in runs.items():
                begun = time.perf_counter()
                run(inputs)
                if number >= WARM_UP:
                    seconds[name].append(time.perf_counter() - begun)
        results.append({"rows": rows, **{name: 1e6 * statistics.median(values) for name, values in seconds.items()}})
    header = ("rows", *runs, "F.linear / packed")
    cells = [(str(int(r["rows"])), *(f"{r[name]:.0f}" for name in runs), f"{r['F.linear'] / r['packed']:.2f}") for r in results]
    print(table(header, cells))
    finish("linear_layers", results, arguments.out)


if __name__ == "__main__":
    main()
