"""Comparisons of the elementwise operations and of the noise with their definitions, for any implementation and device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.backend import Kernels
from kernels.philox import reference as philox_reference
from kernels.rope_kv_write.metadata import RopeMetadata
from tests.kernels.cases import TOLERANCE

EPS = 1e-5
NAN = float("nan")


def close(out: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Check data type and values; ``expected`` is float64."""
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def normal(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    """Standard normal numbers, equal on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def embedded(x: Tensor) -> Tensor:
    """The same numbers as a slice of a larger tensor that is NaN elsewhere, as q, k and v are of one projection."""
    wide = torch.full((len(x) + 1, x.shape[1] + 24, *x.shape[2:]), NAN, dtype=x.dtype, device=x.device)
    inside = wide[1:, 8 : 8 + x.shape[1]]
    inside.copy_(x)
    return inside


def rms(x: Tensor, weight: Tensor) -> Tensor:
    """The formula, in float64."""
    x = x.double()
    return x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


# Rows and columns of the operations on whole rows: none, one, odd ones, more than one block of a kernel.
SHAPES = [(0, 96), (1, 1), (1, 2050), (5, 96), (7, 257)]


def check_rms_norm(kernels: Kernels, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    """Rows of very different sizes, one of them zero."""
    size = torch.tensor([1.0, 0.0, 1e-3, 30.0])[torch.arange(shape[0]) % 4, None].to(device, dtype)
    x, weight = normal(*shape, dtype=dtype, device=device) * size, normal(shape[1], dtype=dtype, device=device, seed=1)
    for same in (x, embedded(x)):
        close(kernels.rms_norm(same, weight, EPS), rms(x, weight), dtype)
        assert torch.equal(same, x), "the input is not written to"


def check_add_rms_norm(kernels: Kernels, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    """The second result is the sum in the data type, and the first is its norm."""
    x, residual = normal(2, *shape, dtype=dtype, device=device)
    weight, before, total = normal(shape[1], dtype=dtype, device=device, seed=1), x.clone(), x + residual
    for same, other in ((x, residual.clone()), (embedded(x), embedded(residual))):
        normed, new_residual = kernels.add_rms_norm(same, other, weight, EPS)
        assert torch.equal(new_residual, total)
        assert torch.equal(same, before), "the input is not written to"
        close(normed, rms(total, weight), dtype)


def check_swiglu(kernels: Kernels, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    """``gate * sigmoid(gate) * up``, gate first; large inputs saturate and do not overflow."""
    rows, width = shape
    gate_up = normal(rows, 2 * width, dtype=dtype, device=device)
    gate_up[:1, 0], gate_up[-1:, width - 1] = -200.0, 200.0
    gate, up = gate_up.double().chunk(2, dim=-1)
    for same in (gate_up, embedded(gate_up)):
        close(kernels.swiglu(same), gate * torch.sigmoid(gate) * up, dtype)


@dataclass(frozen=True)
class RopeCase:
    """Sizes and options of what stands between projection and attention."""

    rows: int = 9
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    page: int = 16
    norm: bool = True
    scale: bool = True
    cache: bool = True


ROPE_CASES = {
    "everything": RopeCase(),
    "bundled model": RopeCase(head_dim=64, page=64, scale=False),
    "no norm": RopeCase(norm=False),
    "no cache": RopeCase(cache=False),
    "rotation alone": RopeCase(norm=False, scale=False, cache=False),
    "one row": RopeCase(rows=1, scale=False),
    "no rows": RopeCase(rows=0),
    "one head each": RopeCase(heads=3, kv_heads=3, page=4),
    "all share a head": RopeCase(heads=6, kv_heads=1),
    "odd sizes": RopeCase(heads=10, kv_heads=2, head_dim=20, page=12),
    "head of 4": RopeCase(head_dim=4),
    "head of 80": RopeCase(rows=5, heads=5, kv_heads=1, head_dim=80),
    "head of 96": RopeCase(rows=5, heads=2, head_dim=96),
    "head of 128": RopeCase(rows=5, head_dim=128, page=64),
}


def check_rope_kv_write(kernels: Kernels, case: RopeCase, dtype: torch.dtype, device: torch.device) -> None:
    """Against the definition in float64. What is not to be read is NaN, and what is not to be written stays NaN."""
    heads, kv_heads, rows = case.heads, case.kv_heads, case.rows
    qkv = embedded(normal(rows, heads + 2 * kv_heads, case.head_dim, dtype=dtype, device=device))
    qk_norm = normal(2, case.head_dim, dtype=dtype, device=device, seed=1) if case.norm else None
    metadata, angles, slots = _rope_metadata(case, torch.promote_types(dtype, torch.float32), device)
    k_cache = torch.full((7, kv_heads, case.page, case.head_dim), NAN, dtype=dtype, device=device)
    v_cache = torch.full((7, kv_heads, 2, case.page, case.head_dim), NAN, dtype=dtype, device=device)[:, :, 1]
    before = qkv.clone()

    prepared = kernels.prepare_rope(metadata, heads, kv_heads, dtype)
    q, k, v = kernels.rope_kv_write(qkv, qk_norm, EPS, prepared, (k_cache, v_cache) if case.cache else None)

    assert torch.equal(qkv, before), "the input is not written to"
    assert torch.equal(v, qkv[:, heads + kv_heads :])
    expected_q, expected_k = qkv.double()[:, :heads], qkv.double()[:, heads : heads + kv_heads]
    if qk_norm is not None:
        expected_q, expected_k = rms(expected_q, qk_norm[0]), rms(expected_k, qk_norm[1])
    expected_q, expected_k = turned(expected_q, angles), turned(expected_k, angles)
    if metadata.query_scale is not None:
        expected_q = expected_q * metadata.query_scale[metadata.positions].double()[:, None, None]
    close(q, expected_q, dtype)
    close(k, expected_k, dtype)
    for cache, written in ((k_cache, k), (v_cache, v)):
        expected = torch.full_like(cache, NAN)
        for row, slot in enumerate(slots):
            if case.cache and slot >= case.page:
                expected[slot // case.page, :, slot % case.page] = written[row]
        torch.testing.assert_close(cache[1:], expected[1:], rtol=0, atol=0, equal_nan=True)


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """Pair ``(d, d + D/2)`` of every head as a complex number, multiplied by ``e^(i angle)``, in float64."""
    a, b = x.double().chunk(2, -1)
    product = torch.complex(a, b) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat((product.real, product.imag), -1)


def _rope_metadata(case: RopeCase, dtype: torch.dtype, device: torch.device) -> tuple[RopeMetadata, Tensor, list[int]]:
    """Tables that are NaN where no row looks, scattered slots, two of them in the null page; angles and slots once more."""
    positions = torch.tensor([0, 1, 5, 5, 100, 4095, 7, 6, 8], device=device)[: case.rows]
    exponent = torch.arange(case.head_dim // 2, dtype=torch.float64, device=device) * 2 / case.head_dim
    angles = torch.outer(positions.double(), 10000.0**-exponent)
    cos, sin = (torch.full((4096, case.head_dim), NAN, dtype=dtype, device=device) for _ in range(2))
    cos[positions] = torch.cat((angles.cos(), angles.cos()), -1).to(dtype)
    sin[positions] = torch.cat((-angles.sin(), angles.sin()), -1).to(dtype)
    scale = torch.full((4096,), NAN, dtype=dtype, device=device)
    scale[positions] = 1 + positions.to(dtype) / 4096
    order = torch.randperm(6 * case.page, generator=torch.Generator().manual_seed(2)) + case.page
    slots = order[: case.rows]
    slots[3:8:4] = torch.tensor([0, 2])[: len(slots[3:8:4])]
    metadata = RopeMetadata(
        cos=cos,
        sin=sin,
        query_scale=scale if case.scale else None,
        positions=positions,
        slots=slots.to(device) if case.cache else None,
        page_size=case.page if case.cache else 0,
    )
    return metadata, angles, slots.tolist()


# Known answers of Philox4x32-10, published with Random123 (kat_vectors): counter, key, result.
PHILOX_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def check_philox(device: torch.device) -> None:
    """All known answers at once, as one batch."""

    def columns(part: int) -> tuple[Tensor, ...]:
        words = [[int(w, 16) for w in answer[part].split()] for answer in PHILOX_ANSWERS]
        return tuple(torch.tensor(column, device=device) for column in zip(*words, strict=True))

    c0, c1, c2, c3 = columns(0)
    k0, k1 = columns(1)
    for word, expected in zip(philox_reference.philox((k0, k1), (c0, c1, c2, c3)), columns(2), strict=True):
        assert torch.equal(word, expected)


NOISE_SEEDS = (0, 1, -1, 2**63 - 1, -(2**63), -(2**40) + 12345, 1)
NOISE_POSITIONS = (0, 0, 5, 131071, 7, 321, 2**31)


def check_philox_words(device: torch.device) -> None:
    """The integers inside of Triton kernels are the reference's, bit for bit."""
    from tests.kernels.noise_words import noise_words

    vocab_size = 5003
    seed, position = torch.tensor(NOISE_SEEDS), torch.tensor(NOISE_POSITIONS)
    key = ((seed & 0xFFFFFFFF)[:, None], ((seed >> 32) & 0xFFFFFFFF)[:, None])
    zero = torch.zeros_like(key[0])
    counter = torch.arange((vocab_size + 3) // 4)[None]
    words = philox_reference.philox(key, (counter, position[:, None], zero, zero))
    expected = torch.stack(torch.broadcast_tensors(*words), dim=-1).flatten(1)[:, :vocab_size]
    assert torch.equal(noise_words(seed.to(device), position.to(device), vocab_size).cpu(), expected)


def check_noise(device: torch.device) -> None:
    """Below -2, which no argmax takes, float32 is coarse and logarithms may round differently."""
    from kernels.philox import triton

    seed, position = torch.tensor(NOISE_SEEDS), torch.tensor(NOISE_POSITIONS)
    expected = philox_reference.gumbel(seed, position, 5003, torch.float64)
    noise = triton.gumbel(seed.to(device), position.to(device), 5003, torch.float32).cpu()
    upper = expected > -2
    torch.testing.assert_close(noise.double()[upper], expected[upper], atol=2e-5, rtol=1e-5)
    assert noise[~upper].max() < -1.99
