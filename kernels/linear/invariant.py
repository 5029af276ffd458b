"""Linear layers on a CPU that give a row the same bits alone and in any batch: the contract of ``kernels.linear.reference``.

A library picks its loops, and with them the order of the additions, by the shape of the product. So every product here has one
shape, ``TILE_ROWS`` rows; what the tile holds beside a row does not matter, because rows are never added to each other. That a
row's place in the tile does not matter either is true of most kernels but promised by none: ``check`` finds out on the
machine, before anything is served.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kernels.linear import packed, reference
from kernels.linear.choice import Keep
from kernels.linear.weight import QuantizedWeight, Weight

Linear = Callable[[Tensor, Weight, Tensor | None], Tensor]

TILE_ROWS = 8
"""Few, since a decode step of plain decoding has one row; more would serve larger steps a little better."""


class InvariantLinear:
    """``linear`` for inference. Packs weights like ``PackedLinear`` where that can be done."""

    def __init__(self) -> None:
        self._product = packed.PackedLinear() if packed.is_available() else reference.linear

    def __call__(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        if isinstance(weight, QuantizedWeight):
            weight = weight.dequantize(x.dtype)
            product: Linear = reference.linear
        else:
            product = self._product
        out = x.new_empty(len(x), weight.shape[0])
        # One buffer, so that the tile always lies at a whole vector in memory. What earlier rows leave in it is harmless.
        tile = x.new_zeros(TILE_ROWS, x.shape[1])
        for rows, results in zip(x.split(TILE_ROWS), out.split(TILE_ROWS), strict=True):
            tile[: len(rows)] = rows
            results.copy_(product(tile, weight, bias)[: len(rows)])
        return out

    def check(
        self, weights: Sequence[Weight], dtype: torch.dtype, max_rows: int, progress: Callable[[str], None], keep: Keep
    ) -> None:
        """Raise ValueError where this machine does not keep the promise for the model's weights."""
        progress("checking that linear layers are batch-invariant")
        check(self, weights, dtype, TILE_ROWS)


def check(linear: Linear, weights: Sequence[Weight], dtype: torch.dtype, num_rows: int) -> None:
    """Raise ValueError if a weight's product gives a row other bits at another of ``num_rows`` places, or beside other rows
    or fewer of them. One weight of each shape is looked at.
    """
    for weight in {tuple(w.shape): w for w in weights}.values():
        generator = torch.Generator(weight.device).manual_seed(0)
        x, others = torch.randn(2, num_rows, weight.shape[1], generator=generator, device=weight.device).to(dtype)
        expected = linear(x, weight, None)
        for place in range(num_rows):
            moved = torch.cat((others[:place], x))[:num_rows]
            is_same_moved = torch.equal(linear(moved, weight, None)[place:], expected[: num_rows - place])
            if not is_same_moved or not torch.equal(linear(x[place:], weight, None), expected[place:]):
                raise ValueError(
                    f"a product with a weight of {weight.shape[0]} x {weight.shape[1]} in {str(dtype).removeprefix('torch.')} "
                    "gives a row other bits at another place on this machine: start without --batch-invariant"
                )
