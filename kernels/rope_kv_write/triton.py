"""q/k norm, RoPE, query scale and K/V write in one Triton kernel: the contract of ``kernels.rope_kv_write.reference``.

One program takes one row and one key/value head: that head's queries, its key and its value, a tile of ``group + 2`` head
vectors. Each is loaded once, in two halves ``a`` and ``b``, because RoPE (Su et al., arXiv 2104.09864) turns the pairs
``(a_i, b_i)``. Norm (RMSNorm, Zhang and Sennrich, arXiv 1910.07467), rotation and scale are computed in float32 and rounded
once. The table row is looked up by position inside the kernel, so nothing is gathered before.

q and k go to a new tensor, from where attention reads the step's own keys; k and v of rows with a slot outside the null page
also go to the cache. Head sizes: any even one. Nothing waits for the device or depends on data, so a graph can capture it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import ROPE_KV_WRITE, WarpSettings
from kernels.rope_kv_write.metadata import RopeMetadata


@dataclass(frozen=True, slots=True)
class Prepared:
    """The rows as they are: the kernel does the look-ups."""

    metadata: RopeMetadata
    num_heads: int
    num_kv_heads: int


def prepare(metadata: RopeMetadata, num_heads: int, num_kv_heads: int, dtype: torch.dtype) -> Prepared:
    """Nothing is computed: tables keep their precision, whatever the ``dtype`` of qkv."""
    assert all(t.is_contiguous() for t in (metadata.cos, metadata.sin, metadata.positions))
    assert metadata.slots is None or metadata.slots.is_contiguous()
    return Prepared(metadata, num_heads, num_kv_heads)


def rope_kv_write(
    qkv: Tensor,
    qk_norm: Tensor | None,
    eps: float,
    prepared: Prepared,
    cache: tuple[Tensor, Tensor] | None,
    settings: WarpSettings = ROPE_KV_WRITE,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v as the reference does. Any strides of ``qkv`` and caches, as long as the last one is 1."""
    metadata, num_heads, num_kv_heads = prepared.metadata, prepared.num_heads, prepared.num_kv_heads
    num_rotated, (num_rows, _, head_dim) = num_heads + num_kv_heads, qkv.shape
    out = torch.empty((num_rows, num_rotated, head_dim), dtype=qkv.dtype, device=qkv.device)
    # Where an argument is None the kernel is compiled without its part, and never touches the placeholder.
    keys, values = cache or (out.unsqueeze(0), out.unsqueeze(0))
    assert cache is None or metadata.slots is not None, "a cache without slots"
    assert all(t.stride(-1) == 1 for t in (qkv, keys, values))
    assert qk_norm is None or qk_norm.is_contiguous()
    tile, half = triton.next_power_of_2(num_heads // num_kv_heads + 2), triton.next_power_of_2(head_dim // 2)
    if num_rows:
        _rope_kv_write_kernel[(num_rows, num_kv_heads)](
            out,
            keys,
            values,
            qkv,
            out if qk_norm is None else qk_norm,
            metadata.cos,
            metadata.sin,
            out if metadata.query_scale is None else metadata.query_scale,
            metadata.positions,
            metadata.positions if metadata.slots is None else metadata.slots,
            eps,
            *qkv.stride()[:2],
            *keys.stride()[:3],
            *values.stride()[:3],
            HEADS=num_heads,
            KV_HEADS=num_kv_heads,
            HEAD_DIM=head_dim,
            PAGE=metadata.page_size,
            TILE=tile,
            HALF=half,
            NORM=qk_norm is not None,
            SCALE=metadata.query_scale is not None,
            WRITE=cache is not None,
            num_warps=settings.num_warps(tile * half),
        )
    return out[:, :num_heads], out[:, num_heads:], qkv[:, num_rotated:]


@triton.jit
def _rope_kv_write_kernel(
    out,
    k_cache,
    v_cache,
    qkv,
    qk_norm,
    cos,
    sin,
    query_scale,
    positions,
    slots,
    eps,
    row_stride,
    head_stride,
    k_page_stride,
    k_head_stride,
    k_slot_stride,
    v_page_stride,
    v_head_stride,
    v_slot_stride,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    HALF: tl.constexpr,
    NORM: tl.constexpr,
    SCALE: tl.constexpr,
    WRITE: tl.constexpr,
):
    """Program axis 0 is the row, axis 1 the key/value head. Tile entries: ``GROUP`` queries, the key, the value, padding."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    SECOND: tl.constexpr = HEAD_DIM // 2
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    entry = tl.arange(0, TILE)
    head = tl.where(entry < GROUP, kv_head * GROUP + entry, HEADS + kv_head + tl.where(entry == GROUP, 0, KV_HEADS))
    # Table rows, too, are read as whole tiles: the same numbers for every head come from the L1 cache, and not over barriers.
    pair = tl.broadcast_to(tl.arange(0, HALF)[None, :], [TILE, HALF])
    in_half = pair < SECOND
    loaded = (entry < GROUP + 2)[:, None] & in_half
    rotated = (entry <= GROUP)[:, None] & in_half
    source = qkv + row * row_stride + head[:, None] * head_stride + pair
    a = tl.load(source, mask=loaded, other=0.0)
    b = tl.load(source + SECOND, mask=loaded, other=0.0)

    if WRITE:
        slot = tl.load(slots + row)
        # The null page is only there to be skipped.
        kept = slot >= PAGE
        page = slot // PAGE
        offset = slot % PAGE
        is_value = ((entry == GROUP + 1) & kept)[:, None] & in_half
        v_target = v_cache + page * v_page_stride + kv_head * v_head_stride + offset * v_slot_stride + pair
        tl.store(v_target, a, mask=is_value)
        tl.store(v_target + SECOND, b, mask=is_value)

    a = a.to(tl.float32)
    b = b.to(tl.float32)
    if NORM:
        inverse = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / HEAD_DIM + eps)[:, None]
        weight = qk_norm + tl.where(entry < GROUP, 0, HEAD_DIM)[:, None] + pair
        a = a * inverse * tl.load(weight, mask=rotated, other=0.0).to(tl.float32)
        b = b * inverse * tl.load(weight + SECOND, mask=rotated, other=0.0).to(tl.float32)
    position = tl.load(positions + row)
    # The halves of a table row are alike but for the sign of the sine, which is plus in the second.
    c = tl.load(cos + position * HEAD_DIM + SECOND + pair, mask=rotated, other=0.0).to(tl.float32)
    s = tl.load(sin + position * HEAD_DIM + SECOND + pair, mask=rotated, other=0.0).to(tl.float32)
    first = a * c - b * s
    second = b * c + a * s
    if SCALE:
        factor = tl.where(entry < GROUP, tl.load(query_scale + position).to(tl.float32), 1.0)[:, None]
        first = first * factor
        second = second * factor
    first = first.to(out.dtype.element_ty)
    second = second.to(out.dtype.element_ty)
    target = out + (row * (HEADS + KV_HEADS) + head[:, None]) * HEAD_DIM + pair
    tl.store(target, first, mask=rotated)
    tl.store(target + SECOND, second, mask=rotated)
    if WRITE:
        is_key = ((entry == GROUP) & kept)[:, None] & in_half
        k_target = k_cache + page * k_page_stride + kv_head * k_head_stride + offset * k_slot_stride + pair
        tl.store(k_target, first, mask=is_key)
        tl.store(k_target + SECOND, second, mask=is_key)
