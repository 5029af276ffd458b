"""Comparisons of a linear layer with ``x W^T + b`` in float64, for any implementation, weight and device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.linear.weight import QuantizedWeight, Weight, quantize
from tests.kernels.checks import close, normal

Linear = Callable[[Tensor, Weight, Tensor | None], Tensor]

SIZES = [(64, 64), (70, 100), (200, 192)]
"""Outputs and inputs: whole tiles, odd ones, and more outputs than a tile."""


def poisoned(values: Tensor) -> Tensor:
    """The same numbers as rows inside a larger tensor that is NaN all around (and, in eight bits, too)."""
    rows, columns = values.shape
    surroundings = torch.full((rows + 2, columns + 16), float("nan"), device=values.device).to(values.dtype)
    surroundings[1:-1, :columns] = values
    return surroundings[1:-1, :columns]


def check_linear(
    linear: Linear, rows: int, size: tuple[int, int], dtype: torch.dtype, device: torch.device, *, bias: bool, quantized: bool
) -> None:
    """Inputs and weights have strides and NaN around them; the sum over a row is of order 1."""
    width_out, width_in = size
    x = poisoned(normal(rows, width_in, dtype=dtype, device=device))
    dense = normal(width_out, width_in, dtype=torch.float32, device=device, seed=1) * width_in**-0.5
    offset = normal(width_out, dtype=dtype, device=device, seed=2) if bias else None
    weight: Weight = poisoned(dense.to(dtype))
    exact = weight.double() if isinstance(weight, Tensor) else None
    if quantized:
        whole = quantize(dense)
        weight = QuantizedWeight(poisoned(whole.values), whole.scale)
        exact = whole.dequantize(torch.float64)
    expected = torch.nn.functional.linear(x.double(), exact, None if offset is None else offset.double())
    close(linear(x, weight, offset), expected, dtype)


def check_rows_do_not_matter_to_each_other(linear: Linear, dtype: torch.dtype, device: torch.device, rows: int) -> None:
    """Every row has the same bits alone, at another place, and among other neighbours."""
    width_out, width_in = 96, 160
    x = normal(rows, width_in, dtype=dtype, device=device)
    weight = normal(width_out, width_in, dtype=dtype, device=device, seed=1)
    together = linear(x, weight, None)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(3)).to(device)
    assert torch.equal(linear(x[order], weight, None), together[order])
    for first, last in ((0, 1), (rows - 1, rows), (rows // 3, rows // 3 + 7)):
        assert torch.equal(linear(x[first:last], weight, None), together[first:last])
        assert torch.equal(linear(torch.cat((x[first:last], 1e4 * x)), weight, None)[: last - first], together[first:last])
