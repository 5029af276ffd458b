"""All that stands between the merged projection and attention: q/k norm, RoPE, the scale of queries, and the K/V write.

Plain torch with gradients (training runs it without a cache); also the CPU path.

* Norm: each head of q and k by its root mean square (Zhang and Sennrich, arXiv 1910.07467), one weight for all query heads and
  one for all key heads.
* RoPE (Su et al., arXiv 2104.09864) in the half-split layout of Hugging Face checkpoints: a head vector ``(a, b)``, split in
  halves, becomes ``(a cos - b sin, b cos + a sin)``. With the sign folded into the sine table, ``sin = (-s, s)``, this is
  ``x * cos + swap_halves(x) * sin``: three operations for queries and keys together.

Shapes: qkv [R, H + 2 G, D], caches [pages, G, page_size, D].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.rope_kv_write.metadata import RopeMetadata


@dataclass(frozen=True, slots=True)
class Prepared:
    """The per-step work of the reference: table rows, and the page and offset of every slot.

    ``head_kind`` [H + G] spreads the two rows of a norm weight over heads, so that q and k are normalised together.
    """

    num_heads: int
    head_kind: Tensor
    cos_R1D: Tensor
    sin_R1D: Tensor
    query_scale_R11: Tensor | None
    places: tuple[Tensor, Tensor] | None


def prepare(metadata: RopeMetadata, num_heads: int, num_kv_heads: int, dtype: torch.dtype) -> Prepared:
    """Read the tables at the rows' positions and split the slots, once for all layers. ``dtype`` is that of qkv."""
    positions, slots, scale = metadata.positions, metadata.slots, metadata.query_scale
    return Prepared(
        num_heads,
        torch.arange(num_heads + num_kv_heads, device=positions.device).ge_(num_heads),
        metadata.cos.index_select(0, positions).to(dtype).unsqueeze(1),
        metadata.sin.index_select(0, positions).to(dtype).unsqueeze(1),
        None if scale is None else scale.index_select(0, positions).to(dtype)[:, None, None],
        None if slots is None else (slots // metadata.page_size, slots % metadata.page_size),
    )


def rope_kv_write(
    qkv: Tensor, qk_norm: Tensor | None, eps: float, prepared: Prepared, cache: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q [R, H, D], k and v [R, G, D], and write k and v to their slots of ``cache``, a layer's (keys, values).

    ``qk_norm`` [2, D] holds the weights of queries and of keys, None where they are not normalised. ``cache`` is None where
    nothing is kept. The inputs stay as they are; v is a view of ``qkv``. The null page may be written to or not.
    """
    num_rotated = len(prepared.head_kind)
    qk, v = qkv[:, :num_rotated], qkv[:, num_rotated:]
    if qk_norm is not None:
        qk = F.rms_norm(qk, qk.shape[-1:], None, eps) * qk_norm.index_select(0, prepared.head_kind)
    swapped = qk.roll(qk.shape[-1] // 2, dims=-1)
    qk = torch.addcmul(qk * prepared.cos_R1D, swapped, prepared.sin_R1D)
    q, k = qk[:, : prepared.num_heads], qk[:, prepared.num_heads :]
    if prepared.query_scale_R11 is not None:
        q = q * prepared.query_scale_R11
    if cache is not None:
        assert prepared.places is not None, "a cache without slots"
        for kept, rows in zip(cache, (k, v), strict=True):
            kept.transpose(1, 2).index_put_(prepared.places, rows)
    return q, k, v
