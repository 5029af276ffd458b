"""Weights in eight bits: how far they may be from the originals, and that a linear layer computes with exactly them."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from kernels.linear import reference
from kernels.linear.packed import PackedLinear
from kernels.linear.weight import FP8, FP8_MAX, QuantizedWeight, quantize, with_scale


def random_weight(width_out: int, width_in: int) -> torch.Tensor:
    """Rows of very different sizes, one of them zero, one with an outlier."""
    weight = torch.randn(width_out, width_in, generator=torch.Generator().manual_seed(0))
    weight *= torch.logspace(-6, 4, width_out)[:, None]
    weight[1], weight[2, 3] = 0.0, 1e6
    return weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_is_half_a_step_of_e4m3(dtype):
    """Three mantissa bits: a step is at most 1/8 of a number, and below 2^-6 it is 2^-9 of the row's scale."""
    weight = random_weight(64, 256).to(dtype)
    quantized = quantize(weight)
    assert (quantized.values.dtype, quantized.scale.dtype) == (FP8, torch.float32)
    exact, found = weight.double(), quantized.dequantize(torch.float64)
    largest_error = torch.maximum(exact.abs() / 16, quantized.scale.double()[:, None] / 2**10)
    assert torch.all((found - exact).abs() <= largest_error * (1 + 1e-6))
    assert torch.all(found[1] == 0)


def test_every_row_uses_the_whole_range_and_nothing_overflows():
    quantized = quantize(random_weight(64, 256))
    largest = quantized.values.float().abs().amax(dim=1)
    assert torch.all(largest[[0, *range(2, 64)]] == FP8_MAX)
    assert not quantized.values.float().isnan().any()


def test_values_that_e4m3_holds_come_back_as_they_were():
    values = torch.arange(256, dtype=torch.uint8).view(FP8).float()
    values = values[~values.isnan()]
    weight = torch.stack([values, values * 2.0**-20])
    assert torch.equal(quantize(weight).dequantize(torch.float32), weight)


@pytest.mark.parametrize("linear", [reference.linear, PackedLinear()], ids=["reference", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_linear_layer_computes_with_the_dequantised_weight(linear, dtype):
    weight = quantize(random_weight(24, 40)[:, :] / 1e4)
    generator = torch.Generator().manual_seed(1)
    x, bias = torch.randn(7, 40, generator=generator).to(dtype), torch.randn(24, generator=generator).to(dtype)
    exact = F.linear(x.double(), weight.dequantize(torch.float64), bias.double())
    torch.testing.assert_close(linear(x, weight, bias).double(), exact, atol=1e-4, rtol=1e-6)


def test_a_float16_layer_has_room_for_values_before_they_are_scaled():
    """448 times 448 times 40 is beyond float16; scaled first, it is not."""
    weight = QuantizedWeight(torch.full((2, 40), 448.0).to(FP8), torch.full((2,), 1 / 448))
    x = torch.full((1, 40), 448.0, dtype=torch.float16)
    assert torch.equal(reference.linear(x, weight), torch.full((1, 2), 448.0 * 40, dtype=torch.float16))


def test_a_scale_makes_a_quantised_weight():
    values, scale = torch.zeros(2, 3).to(FP8), torch.ones(2)
    assert with_scale(values, None) is values
    assert with_scale(values, scale).shape == (2, 3)
