"""The Triton linear layer, interpreted where there is no GPU, against ``x W^T + b`` in float64."""

from __future__ import annotations

import functools

import pytest
import torch

from kernels.linear.choice import Tile
from tests.kernels.linear_checks import SIZES, check_linear, check_rows_do_not_matter_to_each_other

TILES = [Tile(16, 64, 32), Tile(16, 32, 64, split_k=3), Tile(32, 64, 32, split_k=2)]


def implementation(tile: Tile):
    from kernels.linear import triton

    return functools.partial(triton.linear, tile=tile)


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("rows", [1, 5, 33])
def test_linear(rows, size, tile, device):
    check_linear(implementation(tile), rows, size, torch.float32, device, bias=False, quantized=False)


@pytest.mark.parametrize("tile", TILES[:2], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("quantized", [False, True])
def test_bias_and_eight_bit_weights(dtype, tile, quantized, device):
    check_linear(implementation(tile), 5, (70, 100), dtype, device, bias=True, quantized=quantized)


def test_no_rows(device):
    out = implementation(TILES[0])(torch.empty(0, 8, device=device), torch.ones(6, 8, device=device))
    assert out.shape == (0, 6)


@pytest.mark.parametrize("tile", [Tile(16, 64, 32), Tile(16, 64, 32, split_k=2)], ids=str)
def test_a_tile_gives_a_row_the_same_bits_in_any_batch(tile, device):
    check_rows_do_not_matter_to_each_other(implementation(tile), torch.float32, device, rows=40)


def test_pieces_are_added_in_the_order_of_their_numbers(device):
    """``(1e8 + 1) - 1e8`` is 0 in float32, and any other order of the three gives 1."""
    x = torch.ones(1, 96, device=device)
    weight = torch.zeros(16, 96, device=device)
    weight[:, 0], weight[:, 32], weight[:, 64] = 1e8, 1.0, -1e8
    out = implementation(Tile(16, 16, 32, split_k=3))(x, weight)
    assert torch.equal(out, torch.zeros(1, 16, device=device))
