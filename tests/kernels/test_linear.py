"""Packed linear layers against the reference, at row counts on both sides of the layout hint."""

import pytest
import torch

from kernels.linear import packed, reference

pytestmark = pytest.mark.skipif(not packed.is_available(), reason="this build of torch has no oneDNN")


@pytest.mark.parametrize("rows", [1, 2, 7, 16, 33, 130])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("width_in", "width_out"), [(256, 512), (33, 7), (640, 256)])
def test_packed_equals_reference(rows, bias, width_in, width_out):
    generator = torch.Generator().manual_seed(rows)
    x, weight = torch.randn(rows, width_in, generator=generator), torch.randn(width_out, width_in, generator=generator)
    offset = torch.randn(width_out, generator=generator) if bias else None
    linear = packed.PackedLinear()
    for _ in range(2):
        torch.testing.assert_close(linear(x, weight, offset), reference.linear(x, weight, offset), atol=2e-4, rtol=1e-5)


def test_other_dtypes_and_large_weights_are_left_to_the_reference(monkeypatch):
    linear = packed.PackedLinear()
    x, weight = torch.randn(3, 8).double(), torch.randn(5, 8).double()
    assert torch.equal(linear(x, weight), reference.linear(x, weight))
    monkeypatch.setattr(packed, "PACKED_BYTES", 100)
    assert torch.equal(linear(x.float(), weight.float()), reference.linear(x.float(), weight.float()))


def test_weights_that_share_an_address_after_one_is_gone_are_not_confused():
    linear = packed.PackedLinear()
    x = torch.randn(2, 4)
    for seed in range(5):
        weight = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(linear(x, weight), reference.linear(x, weight))
