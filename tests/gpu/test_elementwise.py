"""The other operations of a step on the GPU, against the same formulas as on the CPU."""

from __future__ import annotations

import pytest
import torch

from kernels.backend import REFERENCE, Kernels, triton_kernels
from kernels.philox.reference import gumbel
from kernels.rope_kv_write.metadata import RopeMetadata
from tests.gpu.waiting import no_waiting
from tests.kernels.checks import (
    EPS,
    NAN,
    ROPE_CASES,
    SHAPES,
    RopeCase,
    check_add_rms_norm,
    check_philox,
    check_rms_norm,
    check_rope_kv_write,
    check_swiglu,
    normal,
    rms,
    turned,
)

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES_OF_MODELS = [(1, 4096), (72, 4096), (300, 1536), (33, 12288), (2, 40000)]
ROPE_OF_MODELS = {
    "Qwen3-8B": RopeCase(heads=32, kv_heads=8, head_dim=128, page=64, scale=False),
    "Qwen2.5-1.5B": RopeCase(heads=12, kv_heads=2, head_dim=128, page=64, norm=False, scale=False),
    "Ministral-3-8B": RopeCase(heads=32, kv_heads=8, head_dim=128, page=64, norm=False),
}


@pytest.fixture(scope="module", params=["reference", "triton"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return REFERENCE if request.param == "reference" else triton_kernels(num_kv_heads=2)


@pytest.mark.smoke_where(kernels="triton", dtype=torch.bfloat16, shape=(72, 4096))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES + SHAPES_OF_MODELS)
@pytest.mark.parametrize("check", [check_rms_norm, check_add_rms_norm, check_swiglu])
def test_rows(kernels, check, shape, dtype, device):
    check(kernels, shape, dtype, device)


@pytest.mark.smoke_where(kernels="triton", dtype=torch.bfloat16, case="Qwen3-8B")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ROPE_CASES | ROPE_OF_MODELS)
def test_rope_kv_write(kernels, case, dtype, device):
    check_rope_kv_write(kernels, (ROPE_CASES | ROPE_OF_MODELS)[case], dtype, device)


class Layer:
    """Everything of a layer but attention and projections, in the sizes of Qwen3-8B, on inputs that stay in place."""

    def __init__(self, kernels: Kernels, rows: int, device: torch.device) -> None:
        self.kernels, options = kernels, {"dtype": torch.bfloat16, "device": device}
        self.x, self.residual = normal(rows, 4096, **options), normal(rows, 4096, **options, seed=1)
        self.weight, self.qk_norm = normal(4096, **options, seed=2), normal(2, 128, **options, seed=3)
        self.qkv, self.gate_up = normal(rows, 48, 128, **options, seed=4), normal(rows, 2 * 12288, **options, seed=5)
        self.cache = tuple(torch.full((4, 8, 64, 128), NAN, **options) for _ in range(2))
        self.angles = torch.outer(torch.arange(200.0, device=device).double(), 10000.0 ** -torch.linspace(0, 1, 64).to(device))
        cos, sin = self.angles.cos().float(), self.angles.sin().float()
        tables = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        self.positions, self.slots = (torch.zeros(rows, dtype=torch.long, device=device) for _ in range(2))
        self.rope = kernels.prepare_rope(RopeMetadata(*tables, None, self.positions, self.slots, 64), 32, 8, torch.bfloat16)

    def run(self) -> tuple[torch.Tensor, ...]:
        ops = self.kernels
        normed, total = ops.add_rms_norm(self.x, self.residual.clone(), self.weight, EPS)
        rotated = ops.rope_kv_write(self.qkv, self.qk_norm, EPS, self.rope, self.cache)
        return normed, total, *rotated, ops.swiglu(self.gate_up), ops.rms_norm(self.x, self.weight, EPS)


def test_error_is_not_above_that_of_plain_torch(device):
    """The reference in the same data type rounds after every operation; the kernels round once."""
    layers = [Layer(kernels, 72, device) for kernels in (triton_kernels(8), REFERENCE)]
    gate, up = layers[0].gate_up.double().chunk(2, -1)
    swiglu = gate * torch.sigmoid(gate) * up
    query = turned(rms(layers[0].qkv[:, :32], layers[0].qk_norm[0]), layers[0].angles[layers[0].positions])
    errors = [
        [(out.double() - exact).norm() for out, exact in ((o[5], swiglu), (o[2], query))] for o in (x.run() for x in layers)
    ]
    for ours, theirs in zip(*errors, strict=True):
        assert ours <= 1.01 * theirs


@pytest.mark.smoke
def test_nothing_waits_for_the_device(device):
    layer = Layer(triton_kernels(8), 5, device)
    layer.run()  # compiles
    torch.cuda.synchronize()
    with no_waiting():
        layer.run()


@pytest.mark.smoke
def test_a_captured_layer_follows_positions_and_slots(device):
    """Captured once, replayed with other positions, slots and activations: the same bits as a fresh launch."""
    layer = Layer(triton_kernels(8), 5, device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        layer.run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = layer.run()
    for seed, slots in enumerate(([64, 65, 0, 130, 255], [0, 0, 0, 0, 0], [200, 100, 70, 64, 0])):
        layer.qkv.copy_(normal(*layer.qkv.shape, dtype=torch.bfloat16, device=device, seed=10 + seed))
        layer.positions.copy_(torch.tensor([seed, 199, 3, 3 + seed, 77]))
        layer.slots.copy_(torch.tensor(slots))
        for cache in layer.cache:
            cache.fill_(NAN)
        graph.replay()
        replayed = [cache.clone() for cache in layer.cache]
        for cache in layer.cache:
            cache.fill_(NAN)
        for ours, fresh in zip((*outputs, *replayed), (*layer.run(), *layer.cache), strict=True):
            torch.testing.assert_close(ours, fresh, rtol=0, atol=0, equal_nan=True)


def test_page_offsets_beyond_32_bits(device):
    """A cache of more than 2^31 numbers: offsets of its last pages do not fit 32 bits."""
    num_pages = 2**31 // (8 * 64 * 128) + 10
    if torch.cuda.mem_get_info()[0] < 2 * 2 * num_pages * 8 * 64 * 128 + 2**30:
        pytest.skip("too little GPU memory is free")
    layer = Layer(triton_kernels(8), 1, device)
    layer.cache = tuple(torch.zeros(num_pages, 8, 64, 128, dtype=torch.bfloat16, device=device) for _ in range(2))
    layer.slots.fill_(num_pages * 64 - 1)
    _, _, _, k, v, _, _ = layer.run()
    for cache, written in zip(layer.cache, (k, v), strict=True):
        assert torch.equal(cache[-1, :, -1], written[0])


def test_philox_integers_are_those_of_the_cpu(device):
    check_philox(device)


def test_noise_is_that_of_the_cpu_but_for_last_bits(device):
    seeds, positions = torch.tensor([0, -5, 2**62]), torch.tensor([0, 9, 131071])
    here, there = (gumbel(seeds.to(d), positions.to(d), 5001, torch.float32).cpu() for d in (torch.device("cpu"), device))
    upper = here > -2  # below, float32 is coarse and logarithms may round differently
    torch.testing.assert_close(there[upper], here[upper], atol=2e-5, rtol=1e-5)
