"""Linear layers on the GPU: the Triton kernel at every candidate tile, and the choice between it and the library."""

from __future__ import annotations

import functools

import pytest
import torch

from kernels.linear.choice import measured_anew
from kernels.linear.weight import quantize
from tests.kernels.checks import normal
from tests.kernels.linear_checks import SIZES, check_linear, check_rows_do_not_matter_to_each_other

DTYPES = [torch.bfloat16, torch.float16]
ROWS = [1, 16, 33, 72, 160, 256]
LAYERS = [(2048, 1536), (4096, 4096), (1536, 8960)]


def tiles(width_out: int, width_in: int, element_size: int, rows: int):
    from kernels.linear.choice import LayerShape, candidates

    processors = torch.cuda.get_device_properties(0).multi_processor_count
    return list(candidates(LayerShape(width_out, width_in, element_size), rows, processors))


def implementation(tile):
    from kernels.linear import triton

    return functools.partial(triton.linear, tile=tile)


def num_that_run(found, rows, size, dtype, device, quantized) -> int:
    """How many tiles the device has the shared memory for. They have to be right."""
    from triton.runtime.errors import OutOfResources

    num_run = 0
    for tile in found:
        try:
            check_linear(implementation(tile), rows, size, dtype, device, bias=True, quantized=quantized)
        except OutOfResources:
            continue
        num_run += 1
    return num_run


@pytest.mark.smoke
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("rows", [16, 72, 256])
def test_the_extremes_of_the_candidates(rows, quantized, device):
    """The first and the last, and the one that splits the sum most: all of them would be hundreds to compile."""
    found = tiles(4096, 4096, 1 if quantized else 2, rows)
    few = dict.fromkeys((found[0], found[-1], max(found, key=lambda tile: tile.split_k)))
    assert num_that_run(few, rows, (4096, 4096), torch.bfloat16, device, quantized) >= 1


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("size", [*SIZES, *LAYERS], ids=str)
def test_every_candidate(size, rows, dtype, quantized, device):
    found = tiles(*size, 1 if quantized else 2, rows)
    assert num_that_run(found, rows, size, dtype, device, quantized) >= 3


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_inputs_give_the_same_bits(dtype, device):
    x, weight = normal(16, 4096, dtype=dtype, device=device), normal(4096, 4096, dtype=dtype, device=device, seed=1)
    run = implementation(next(t for t in tiles(4096, 4096, 2, 16) if t.split_k > 1))
    first = run(x, weight)
    assert all(torch.equal(run(x, weight), first) for _ in range(20))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tile_gives_a_row_the_same_bits_in_any_batch(dtype, device):
    for tile in tiles(96, 160, 2, 64):
        check_rows_do_not_matter_to_each_other(implementation(tile), dtype, device, rows=300)


def test_the_choice_is_measured_and_computes_what_the_library_does(device):
    from kernels.linear.tuned import TunedLinear

    dtype = torch.bfloat16
    dense = [normal(1536, 2048, dtype=dtype, device=device, seed=i) for i in range(4)]
    weights = [*dense, *(quantize(w) for w in dense)]
    linear = TunedLinear()
    table = linear.tune(weights, dtype, 512, print, measured_anew)
    print("\n".join(table.lines()))
    assert table.measurements[0].library_seconds > 0
    for rows in (1, 40, 256, 500):
        x = normal(rows, 2048, dtype=dtype, device=device)
        for weight in weights:
            exact = x.double() @ (weight.double() if isinstance(weight, torch.Tensor) else weight.dequantize(torch.float64)).T
            torch.testing.assert_close(linear(x, weight).double(), exact, atol=0.5, rtol=2e-2)


def test_a_choice_is_captured_and_replayed(device):
    from kernels.linear.tuned import TunedLinear

    weight = normal(4096, 4096, dtype=torch.bfloat16, device=device)
    linear = TunedLinear()
    linear.tune([weight], torch.bfloat16, 16, print, measured_anew)
    x = normal(16, 4096, dtype=torch.bfloat16, device=device, seed=1)
    expected = linear(x, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = linear(x, weight)
    x.mul_(2.0)
    graph.replay()
    assert torch.equal(out, 2 * expected), "a power of two changes no rounding"
