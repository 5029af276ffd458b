"""Comparisons of the elementwise operations and of the noise with their definitions, for any implementation and device."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.backend import Kernels
from kernels.philox import reference as philox_reference
from tests.kernels.cases import TOLERANCE

EPS = 1e-5


def close(out: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Check data type and values; ``expected`` is float64."""
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def normal(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    """Standard normal numbers, equal on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def rms(x: Tensor, weight: Tensor) -> Tensor:
    """The formula, in float64."""
    x = x.double()
    return x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


def check_rms_norm(kernels: Kernels, dtype: torch.dtype, device: torch.device) -> None:
    """Rows of very different sizes, one of them zero."""
    x = (
        normal(5, 96, dtype=dtype, device=device)
        * torch.tensor([1.0, 0.0, 1e-3, 30.0, 1.0], device=device, dtype=dtype)[:, None]
    )
    weight = normal(96, dtype=dtype, device=device, seed=1)
    close(kernels.rms_norm(x, weight, EPS), rms(x, weight), dtype)


def check_add_rms_norm(kernels: Kernels, dtype: torch.dtype, device: torch.device) -> None:
    """The second result is the sum in the data type, and the first is its norm."""
    x, residual = normal(2, 7, 64, dtype=dtype, device=device)
    weight, before = normal(64, dtype=dtype, device=device, seed=1), (x.clone(), residual.clone())
    total = x + residual
    normed, new_residual = kernels.add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(new_residual, total)
    assert torch.equal(x, before[0]), "the input is not written to"
    close(normed, rms(total, weight), dtype)


def check_rope(kernels: Kernels, dtype: torch.dtype, device: torch.device) -> None:
    """Pair ``(d, d + D/2)`` as a complex number, multiplied by ``e^(i angle)``."""
    rows, heads, head_dim = 6, 3, 16
    x = normal(rows, heads, head_dim, dtype=dtype, device=device)
    positions = torch.tensor([0, 1, 5, 5, 100, 4095], dtype=torch.float64, device=device)
    exponent = torch.arange(head_dim // 2, dtype=torch.float64, device=device) * 2 / head_dim
    angles = torch.outer(positions, 10000.0**-exponent)
    cos = torch.cat((angles.cos(), angles.cos()), -1).to(dtype)
    sin = torch.cat((-angles.sin(), angles.sin()), -1).to(dtype)
    a, b = x.double().chunk(2, -1)
    turned = torch.complex(a, b) * torch.polar(torch.ones_like(angles), angles)[:, None]
    close(kernels.rope(x, cos, sin), torch.cat((turned.real, turned.imag), -1), dtype)


def check_swiglu(kernels: Kernels, dtype: torch.dtype, device: torch.device) -> None:
    """``gate * sigmoid(gate) * up``, gate first; large inputs saturate and do not overflow."""
    gate_up = normal(5, 48, dtype=dtype, device=device)
    gate_up[0, 0], gate_up[0, 1] = -200.0, 200.0
    gate, up = gate_up.double()[:, :24], gate_up.double()[:, 24:]
    close(kernels.swiglu(gate_up), gate * torch.sigmoid(gate) * up, dtype)


def check_kv_write(kernels: Kernels, page: int, dtype: torch.dtype, device: torch.device) -> None:
    """Rows in scattered slots; two rows share a slot of the null page; everything else stays as it was."""
    pages, heads, head_dim, rows = 6, 2, 8, 9
    qkv = normal(rows, 3 * heads, head_dim, dtype=dtype, device=device)
    k, v = qkv[:, heads : 2 * heads], qkv[:, 2 * heads :]
    k_cache, v_cache = normal(2, pages, heads, page, head_dim, dtype=dtype, device=device, seed=1)
    k_before, v_before = k_cache.clone(), v_cache.clone()
    places = (torch.randperm((pages - 1) * page, generator=torch.Generator().manual_seed(2)) + page)[:rows].tolist()
    places[3] = places[7] = 0
    kernels.kv_write(k, v, k_cache, v_cache, torch.tensor(places, device=device))
    for row, place in enumerate(places):
        if place:
            k_before[place // page, :, place % page] = k[row]
            v_before[place // page, :, place % page] = v[row]
    assert torch.equal(k_cache[1:], k_before[1:])
    assert torch.equal(v_cache[1:], v_before[1:])
    assert torch.equal(k_cache[0, :, 1:], k_before[0, :, 1:]), "only the slot that was named is written"


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
