"""Linear layers on a GPU: the library or a tile of the Triton kernel, whichever was faster on this device."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from kernels.linear import reference, triton
from kernels.linear.choice import ChoiceTable, Keep, LayerShape, Tile, measure
from kernels.linear.weight import QuantizedWeight, Weight

_REPLAYS = 5

_MAX_ERROR, _CHECKED_OUTPUTS = 0.05, 256
"""Of an output over all rows, over what it should be: ten times the roundings of an 8-bit mantissa. A wrong tile is off by all
of it. So many outputs are looked at from either end."""

_COLD_BYTES = 256 * 2**20
"""A timed graph streams at least this much where the model has it, so that no weight is still in the cache."""


class TunedLinear:
    """``linear`` by a table of choices, which is empty (the library everywhere) until ``tune`` has measured one."""

    def __init__(self, table: ChoiceTable | None = None) -> None:
        self.table = table or ChoiceTable()

    def __call__(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        return apply(x, weight, bias, self.table.tile(LayerShape.of(weight), len(x)))

    def tune(
        self, weights: Sequence[Weight], dtype: torch.dtype, max_rows: int, progress: Callable[[str], None], keep: Keep
    ) -> ChoiceTable:
        """Measure on the model's own weights, before anything is captured; steps have at most ``max_rows`` rows."""

        def measured() -> ChoiceTable:
            timer = GraphTimer(weights, dtype)
            table = measure(list(timer.weights), max_rows, timer.num_processors, timer, progress)
            for shape, rows, tile in timer.wrong:
                progress(f"tile {tile} is not used: it is wrong at {rows} rows of {shape.width_out} x {shape.width_in}")
            return table

        self.table = keep(measured)
        return self.table


def apply(x: Tensor, weight: Weight, bias: Tensor | None, tile: Tile | None) -> Tensor:
    """One linear layer by a tile, or by the library."""
    return reference.linear(x, weight, bias) if tile is None else triton.linear(x, weight, bias, tile=tile)


class GraphTimer:
    """Times calls inside a CUDA graph, where a step makes them: no launch from the host, one weight after the other."""

    def __init__(self, weights: Sequence[Weight], dtype: torch.dtype) -> None:
        self.dtype, self.device = dtype, weights[0].device
        self.weights: dict[LayerShape, list[Weight]] = defaultdict(list)
        for weight in weights:
            self.weights[LayerShape.of(weight)].append(weight)
        self.num_processors = int(torch.cuda.get_device_properties(self.device).multi_processor_count)
        self.wrong: list[tuple[LayerShape, int, Tile]] = []
        self.widens_fp8 = torch.cuda.get_device_capability(self.device) >= (8, 9)

    @torch.inference_mode()
    def __call__(self, shape: LayerShape, rows: int, tile: Tile | None) -> float:
        """Seconds of one call; infinite if the device cannot run the tile, or computes something else with it."""
        if tile is not None and shape.element_size == 1 and not self.widens_fp8:
            return math.inf
        size = shape.width_out * shape.width_in * shape.element_size
        weights = self.weights[shape][: -(-_COLD_BYTES // size)]
        x = torch.randn(rows, shape.width_in, dtype=self.dtype, device=self.device)

        def run() -> None:
            for weight in weights:
                apply(x, weight, None, tile)

        try:
            run()  # compiles
        except OutOfResources:
            return math.inf
        if tile is not None and not _is_right(x, weights[0], tile):
            self.wrong.append((shape, rows, tile))
            return math.inf
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return _fastest(graph.replay) / len(weights)


def _is_right(x: Tensor, weight: Weight, tile: Tile) -> bool:
    """Whether a tile's outputs, the first and the last ones, are those of float32 but for roundings of 16 bits."""
    values, scale = (weight.values, weight.scale) if isinstance(weight, QuantizedWeight) else (weight, None)

    def ends(tensor: Tensor) -> Tensor:
        return torch.cat((tensor[:_CHECKED_OUTPUTS].float(), tensor[-_CHECKED_OUTPUTS:].float()))

    expected = x.float() @ ends(values).T
    if scale is not None:
        expected *= ends(scale)
    error = ends(apply(x, weight, None, tile).T).T - expected
    return bool((error.square().mean(0).sqrt() <= _MAX_ERROR * expected.square().mean(0).sqrt()).all())


def _fastest(replay: Callable[[], None]) -> float:
    """Seconds of the fastest of a few replays, the first of which only warms up."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(_REPLAYS + 1)]
    replay()
    for event in events[:-1]:
        event.record()
        replay()
    events[-1].record()
    events[-1].synchronize()
    return float(min(a.elapsed_time(b) for a, b in itertools.pairwise(events))) / 1e3
