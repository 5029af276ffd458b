"""How much memory of its own a process takes while it loads a checkpoint: ``python3 -m`` this module prints it as JSON.

A process of its own, because what another one has freed is taken again without a trace. Files that are mapped, as checkpoints
are, do not count, and neither does a high-water mark of before: the memory is looked at again and again while the loader runs.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors.torch import save_file

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.random_model import random_model
from benchmarks.gpu.shapes import TINY
from engine.models.loader import load_model
from engine.models.places import named_tensors
from kernels.backend import REFERENCE

INTERVAL_SECONDS = 0.001


@dataclass(frozen=True, slots=True)
class Growth:
    """Bytes of the process's own memory before something ran, at most meanwhile, and after it."""

    before: int
    peak: int
    after: int

    @property
    def peak_grew_by(self) -> int:
        """Beyond what there was before."""
        return self.peak - self.before


def own_bytes() -> int:
    """Memory of this process that is no file's (``RssAnon``)."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise OSError("/proc/self/status does not tell RssAnon")
    return 1024 * int(found.group(1))


def growth(run: Callable[[], object]) -> Growth:
    """Look at the memory, from another thread, while something runs; what it returns is held until the end."""
    before, seen, is_over = own_bytes(), [0], threading.Event()

    def watch() -> None:
        while not is_over.wait(INTERVAL_SECONDS):
            seen.append(own_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        kept = run()
    finally:
        is_over.set()
        watcher.join()
    after = own_bytes()
    del kept
    return Growth(before, max(before, after, *seen), after)


def load_tiny_model(bench: Bench) -> None:
    """The first load of a process, and the first use of a device, take memory of their own: let a tiny model be it."""
    with tempfile.TemporaryDirectory() as folder:
        tensors = named_tensors(random_model(TINY, bench.dtype, bench.device, REFERENCE))
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, Path(folder) / "model.safetensors")
        load_model(Path(folder), TINY, bench.dtype, bench.device, kernels=REFERENCE)


def main(arguments: list[str] | None = None) -> None:
    """Load a folder's weights as a model of the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args(arguments)
    bench = Bench(options.folder, options.dry_run)
    load_tiny_model(bench)
    config = bench.config(options.model)
    found = growth(lambda: load_model(options.folder, config, bench.dtype, bench.device, kernels=REFERENCE))
    print(json.dumps(asdict(found) | {"peak_grew_by": found.peak_grew_by}))


if __name__ == "__main__":
    main()
