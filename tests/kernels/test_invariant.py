"""Operations whose bits must not depend on the number of rows, on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.lanewise import lanewise
from kernels.linear import reference
from kernels.linear.choice import measured_anew
from kernels.linear.invariant import TILE_ROWS, InvariantLinear, check
from kernels.linear.weight import quantize
from kernels.philox.reference import gumbel
from kernels.process_logits.reference import process_logits
from kernels.rms_norm.reference import add_rms_norm, rms_norm
from kernels.rope_kv_write import reference as rope_kv_write
from kernels.rope_kv_write.metadata import RopeMetadata
from kernels.sampling.reference import sample_tokens
from kernels.swiglu import invariant as invariant_swiglu
from kernels.swiglu import reference as swiglu_reference
from tests.kernels.linear_checks import check_linear, check_rows_do_not_matter_to_each_other
from tests.kernels.sampling_cases import MASK, MIXED, random_logits, sampling_of

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def alone_and_together(function: Callable[[Tensor], Tensor], rows: Tensor) -> None:
    together = function(rows)
    for first, last in ((0, 1), (5, 6), (3, 40), (len(rows) - 1, len(rows))):
        assert torch.equal(function(rows[first:last]), together[first:last])
        assert torch.equal(function(rows[first:last].clone()), together[first:last])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 8, 33])
def test_the_invariant_linear_layer_is_a_linear_layer(rows, quantized, dtype):
    check_linear(InvariantLinear(), rows, (64, 96), dtype, CPU, bias=True, quantized=quantized)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_linear_layer_gives_a_row_the_same_bits_in_any_batch(dtype):
    check_rows_do_not_matter_to_each_other(InvariantLinear(), dtype, CPU, rows=77)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("size", [(512, 256), (256, 640), (2048, 256), (64, 1536), (24, 16)])
def test_the_shapes_of_small_models_pass_the_check(size):
    weight = torch.randn(size, generator=torch.Generator().manual_seed(1))
    InvariantLinear().check([weight, weight.clone(), quantize(weight)], torch.float32, 100, lambda message: None, measured_anew)


def test_the_check_finds_a_row_that_depends_on_its_place_or_its_neighbours():
    weight = torch.ones(8, 8)
    for leak in (
        lambda x: torch.arange(len(x))[:, None] * 1e-6 * x,
        lambda x: 1e-6 * x.sum(0),
        lambda x: x * (len(x) != TILE_ROWS),
    ):
        with pytest.raises(ValueError, match="a weight of 8 x 8 in float32 gives a row other bits at another place"):
            check(lambda x, w, b, leak=leak: reference.linear(x + leak(x), w, b), [weight], torch.float32, 8)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [640, 2048, 33, 7])
def test_swiglu(width, dtype):
    gate_up = torch.randn(97, 2 * width, generator=torch.Generator().manual_seed(width)).to(dtype)
    alone_and_together(invariant_swiglu.swiglu, gate_up)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    expected = swiglu_reference.swiglu(gate_up.double())
    torch.testing.assert_close(invariant_swiglu.swiglu(gate_up).double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("function", [torch.sigmoid, F.silu, torch.exp])
def test_an_elementwise_function_is_one_of_its_argument(function):
    numbers = torch.randn(101, 777, generator=torch.Generator().manual_seed(0))
    alone_and_together(lambda x: lanewise(function, x), numbers)
    torch.testing.assert_close(lanewise(function, numbers), function(numbers))
    assert lanewise(function, numbers[:0]).shape == (0, 777)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("vocab_size", [2048, 2051, 33_001])
def test_sampling_of_a_row_does_not_see_the_others(vocab_size):
    """Truncation, noise, the token, and raw log-probabilities, to the last bit; what the others ask for does not matter."""
    logits, position = random_logits(len(MIXED), vocab_size, torch.float32, CPU), torch.arange(len(MIXED)) + 5
    sampling = sampling_of(MIXED, CPU)
    processed, noise = process_logits(logits, sampling, MASK), gumbel(sampling.seed, position, vocab_size, torch.float32)
    tokens, logprobs = sample_tokens(logits, None, sampling, position, MASK), logits.log_softmax(dim=-1)
    for i, row in enumerate(MIXED):
        one, alone = slice(i, i + 1), sampling_of((row,), CPU)
        assert torch.equal(process_logits(logits[one], alone, MASK), processed[one])
        assert torch.equal(sample_tokens(logits[one], None, alone, position[one], MASK), tokens[one])
        assert torch.equal(logits[one].log_softmax(dim=-1), logprobs[one])
        assert torch.equal(gumbel(sampling.seed[one], position[one], vocab_size, torch.float32), noise[one])


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [256, 4096, 33])
def test_norms_see_one_row_each(width, dtype):
    x, residual = torch.randn(2, 97, width, generator=torch.Generator().manual_seed(width)).to(dtype)
    weight = torch.randn(width, generator=torch.Generator().manual_seed(1)).to(dtype)
    alone_and_together(lambda rows: rms_norm(rows, weight, 1e-6), x)
    both = torch.cat((x, residual), dim=1)
    alone_and_together(lambda rows: torch.cat(add_rms_norm(*rows.split(width, dim=1), weight, 1e-6), dim=1), both)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128, 6])
def test_rotation_sees_one_row_each(head_dim, dtype):
    positions = torch.randperm(200, generator=torch.Generator().manual_seed(0))[:97]
    tables = torch.randn(2, 200, head_dim, generator=torch.Generator().manual_seed(1))
    qkv = torch.randn(97, 10 * head_dim, generator=torch.Generator().manual_seed(2)).to(dtype)
    norm = torch.randn(2, head_dim, generator=torch.Generator().manual_seed(3)).to(dtype)

    def rotate(rows: Tensor) -> Tensor:
        """The last column says which position a row has."""
        metadata = RopeMetadata(*tables, None, positions[rows[:, -1].long()], None, 64)
        prepared = rope_kv_write.prepare(metadata, 6, 2, dtype)
        qkv = rows[:, :-1].reshape(len(rows), 10, head_dim)
        return torch.cat([t.flatten(1) for t in rope_kv_write.rope_kv_write(qkv, norm, 1e-6, prepared, None)], dim=1)

    alone_and_together(rotate, torch.cat((qkv, torch.arange(97)[:, None].to(dtype)), dim=1))
