"""Linear layers for few rows in Triton: the same contract as ``kernels.linear.reference``.

A step has 1 to about 256 rows, and its time is that of streaming the weights. Three things follow:

* **Split-K.** A matrix of 4,096 outputs makes 64 tiles, and a GPU has 132 processors. So the inner dimension is cut into
  ``split_k`` pieces, each a program of its own that writes a float32 partial sum, and a second kernel adds the pieces in the
  order of their numbers. No atomics: the same inputs give the same bits.
* **The weight is the left operand.** A program computes ``W x^T``, [BLOCK_N, BLOCK_M]: tensor cores want 64 rows on the left
  and are content with 16 columns on the right, so a step of 16 rows wastes nothing.
* **Eight-bit weights are widened in registers,** where the left operand of a tensor-core product may lie: half the bytes are
  streamed. e4m3 values are exact in 16 bits, and the scales multiply the finished float32 sum, so nothing is rounded twice.

A row's bits depend on its own values, the weight and the ``Tile`` alone: where in a tile it lies and what its neighbours hold
does not matter. ``invariant_linear`` makes use of that. Data types: float16, bfloat16, and float32 in full
precision (for tests).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.linear import invariant
from kernels.linear.choice import Keep, Tile, invariant_tile
from kernels.linear.weight import QuantizedWeight, Weight

_MERGE_COLUMNS = 512


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None, *, tile: Tile) -> Tensor:
    """Return [rows, out] for ``x`` [rows, in], ``weight`` [out, in] and ``bias`` [out], computed with one configuration.

    Rows of ``x`` and of the weight may have any stride, as long as the last one is 1. Raises Triton's OutOfResources when the
    tile does not fit the device.
    """
    values, scale = (weight.values, weight.scale) if isinstance(weight, QuantizedWeight) else (weight, None)
    (num_rows, width_in), width_out = x.shape, len(values)
    assert x.stride(1) == 1
    assert values.stride(1) == 1
    out = torch.empty(num_rows, width_out, dtype=x.dtype, device=x.device)
    if num_rows == 0:
        return out
    split = tile.split_k > 1
    split_steps = triton.cdiv(triton.cdiv(width_in, tile.split_k), tile.block_k)
    sums = torch.empty(tile.split_k, num_rows, width_out, dtype=torch.float32, device=x.device) if split else out
    # Row tiles vary fastest: those that share a weight tile run together and read it from the cache.
    grid = (triton.cdiv(num_rows, tile.block_m), triton.cdiv(width_out, tile.block_n), tile.split_k)
    _linear_kernel[grid](
        sums,
        x,
        values,
        scale,
        bias,
        num_rows,
        width_out,
        width_in,
        split_steps,
        x.stride(0),
        values.stride(0),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        SPLIT=split,
        EVEN_K=width_in % tile.block_k == 0,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if split:
        merge_grid = (num_rows, triton.cdiv(width_out, _MERGE_COLUMNS))
        _merge_kernel[merge_grid](
            out, sums, scale, bias, num_rows, width_out, SPLIT_K=tile.split_k, BLOCK=_MERGE_COLUMNS, num_warps=4
        )
    return out


def invariant_linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """``linear`` by a tile that depends on the weight's shape alone, so that a row's bits do not depend on the other rows."""
    return linear(x, weight, bias, tile=invariant_tile(weight.shape[0]))


def check_invariant(
    weights: Sequence[Weight], dtype: torch.dtype, max_rows: int, progress: Callable[[str], None], keep: Keep
) -> None:
    """Raise ValueError where this device does not keep the promise for the model's weights, or cannot widen them."""
    progress("checking that linear layers are batch-invariant")
    is_quantized = any(isinstance(weight, QuantizedWeight) for weight in weights)
    if is_quantized and torch.cuda.get_device_capability(weights[0].device) < (8, 9):
        raise ValueError("batch-invariant eight-bit weights need a GPU of compute capability 8.9: leave one of the two out")
    invariant.check(invariant_linear, weights, dtype, invariant_tile(0).block_m)


@triton.jit
def _scale_and_shift(sums, scale, bias, columns, seen):
    """The end of a linear layer, on sums whose last dimension is ``columns``. An absent ``scale`` or ``bias`` is None."""
    if scale is not None:
        sums *= tl.load(scale + columns, mask=seen, other=0.0)
    if bias is not None:
        sums += tl.load(bias + columns, mask=seen, other=0.0).to(tl.float32)
    return sums


# Not compiled anew for 1 row or for multiples of 16: what is timed at a bucket's rows is what runs at all others.
@triton.jit(do_not_specialize=["num_rows"])
def _linear_kernel(
    out,
    x,
    weight,
    scale,
    bias,
    num_rows,
    width_out,
    width_in,
    split_steps,
    x_stride,
    weight_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """One tile of the output, or of one piece's partial sums. Programs: (row tiles, column tiles, pieces)."""
    piece = tl.program_id(2)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    # A product with the constant tells the compiler that every piece starts at a whole block, so that loads stay wide.
    first = piece * split_steps * BLOCK_K
    last = tl.minimum(first + split_steps * BLOCK_K, width_in)
    inner = tl.arange(0, BLOCK_K)
    # Beyond the end the last row or column is read once more, and never stored: so the loop needs no mask for them.
    row_starts = tl.minimum(rows, num_rows - 1).to(tl.int64) * x_stride
    column_starts = tl.minimum(columns, width_out - 1).to(tl.int64) * weight_stride
    x_places = x + row_starts[None, :] + (first + inner)[:, None]
    weight_places = weight + column_starts[:, None] + (first + inner)[None, :]
    sums = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for start in range(first, last, BLOCK_K):
        if EVEN_K:
            w_tile = tl.load(weight_places)
            x_tile = tl.load(x_places)
        else:
            left = width_in - start
            w_tile = tl.load(weight_places, mask=inner[None, :] < left, other=0.0)
            x_tile = tl.load(x_places, mask=inner[:, None] < left, other=0.0)
        sums = tl.dot(w_tile.to(x_tile.dtype), x_tile, sums, input_precision="ieee")
        weight_places += BLOCK_K
        x_places += BLOCK_K
    result = tl.trans(sums)
    seen = (rows[:, None] < num_rows) & (columns[None, :] < width_out)
    places = rows[:, None].to(tl.int64) * width_out + columns[None, :]
    if SPLIT:
        tl.store(out + piece.to(tl.int64) * num_rows * width_out + places, result, mask=seen)
    else:
        result = _scale_and_shift(result, scale, bias, columns[None, :], columns[None, :] < width_out)
        tl.store(out + places, result.to(out.dtype.element_ty), mask=seen)


@triton.jit(do_not_specialize=["num_rows"])
def _merge_kernel(out, partial, scale, bias, num_rows, width_out, SPLIT_K: tl.constexpr, BLOCK: tl.constexpr):
    """Add the pieces of one row in the order of their numbers. Programs: (rows, blocks of columns)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    seen = columns < width_out
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for piece in tl.static_range(SPLIT_K):
        start = (tl.full((), piece, tl.int64) * num_rows + row) * width_out
        sums += tl.load(partial + start + columns, mask=seen, other=0.0)
    sums = _scale_and_shift(sums, scale, bias, columns, seen)
    tl.store(out + row * width_out + columns, sums.to(out.dtype.element_ty), mask=seen)
