"""Plain-torch attention with the step's mask over a paged cache; also the CPU path.

``out = softmax(q [K_prefix; K_step]^T * scale + mask) [V_prefix; V_step]``: a row sees its request's whole prefix in the
cache, and among the rows of the step those that ``kernels.mask_layout`` lets it see (arXiv 2511.08923, section 3.2). Keys and
values of the step's own rows come straight from the projections: those of masks are never stored anywhere.

Whole pages are gathered and slots at or beyond the prefix length get a score of -inf. So every slot of the caches has to
hold finite numbers, of any size: zeros from the start, or what earlier tokens left. A NaN or an infinity would leak through
``0 * NaN``. Clearing the gathered slots would rule that out, at the price of one more pass over keys and one over values,
about a third of a call at 512 cached tokens on a CPU, for a fault that a sound model cannot make.

Shapes: q [R, H, D]; k, v [R, G, D]; caches [pages, G, page_size, D].
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.mask_layout import visible
from kernels.paged_attention.metadata import AttentionMetadata


@dataclass(frozen=True, slots=True)
class _Group:
    """B requests with equally many rows, attended to as one padded batch [B, rows]; ``pages`` are flat, P a request."""

    rows: Tensor | None
    num_requests: int
    pages: Tensor
    mask: Tensor


@dataclass(frozen=True, slots=True)
class Prepared:
    """The per-step work of the reference: groups of requests with their additive masks."""

    groups: tuple[_Group, ...]


def prepare(metadata: AttentionMetadata, page_size: int, group_size: int, dtype: torch.dtype) -> Prepared:
    """Group the requests by their number of rows and expand the mask, once for all layers.

    ``group_size`` is the number of query heads per key/value head.
    """
    starts = metadata.row_starts
    by_rows: dict[int, list[int]] = defaultdict(list)
    for i in range(len(starts) - 1):
        by_rows[starts[i + 1] - starts[i]].append(i)
    single = len(by_rows) == 1
    return Prepared(
        tuple(_group(metadata, members, rows, page_size, group_size, dtype, single) for rows, members in by_rows.items())
    )


def _group(
    metadata: AttentionMetadata,
    members: list[int],
    num_rows: int,
    page_size: int,
    group_size: int,
    dtype: torch.dtype,
    single: bool,
) -> _Group:
    device = metadata.limit.device
    max_pages = max(-(-metadata.max_prefix[i] // page_size) for i in members)
    if single:
        rows, limit, branch = None, metadata.limit.view(-1, num_rows), metadata.branch.view(-1, num_rows)
        pages, prefix = metadata.block_table[:, :max_pages], metadata.prefix_lengths
    else:
        first = torch.tensor([metadata.row_starts[i] for i in members], device=device)
        rows = first[:, None] + torch.arange(num_rows, device=device)
        limit, branch = metadata.limit[rows], metadata.branch[rows]
        chosen = torch.tensor(members, device=device)
        pages, prefix = metadata.block_table[chosen, :max_pages], metadata.prefix_lengths[chosen]
    in_prefix = torch.arange(max_pages * page_size, device=device) < prefix[:, None]
    seen = torch.cat((in_prefix[:, None].expand(-1, num_rows, -1), visible(limit, branch)), dim=-1)
    mask = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, float("-inf"))
    # Query heads that share a key/value head become extra rows, so that keys are never repeated.
    mask = mask[:, None, None].expand(-1, 1, group_size, -1, -1).flatten(2, 3)
    return _Group(rows, len(members), pages.flatten(), mask)


def paged_attention(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, prepared: Prepared, scale: float
) -> Tensor:
    """Return the attention output [R, H, D] of a step's rows."""
    if len(prepared.groups) == 1 and prepared.groups[0].rows is None:
        return _attend(q, k, v, k_cache, v_cache, prepared.groups[0], scale)
    out = torch.empty_like(q)
    for group in prepared.groups:
        assert group.rows is not None
        rows = group.rows.flatten()
        out[rows] = _attend(q[rows], k[rows], v[rows], k_cache, v_cache, group, scale)
    return out


def _attend(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, group: _Group, scale: float) -> Tensor:
    (num_q_rows, num_heads, head_dim), num_kv_heads = q.shape, k.shape[1]
    size = group.num_requests

    def keys(step: Tensor, cache: Tensor) -> Tensor:
        # index_select takes half the time of indexing with a tensor.
        pages = cache.index_select(0, group.pages).unflatten(0, (size, len(group.pages) // size))
        prefix = pages.transpose(1, 2).flatten(2, 3)
        return torch.cat((prefix, step.view(size, -1, num_kv_heads, head_dim).transpose(1, 2)), dim=2)

    packed = q.view(size, -1, num_kv_heads, num_heads // num_kv_heads, head_dim).permute(0, 2, 3, 1, 4).flatten(2, 3)
    out = F.scaled_dot_product_attention(packed, keys(k, k_cache), keys(v, v_cache), attn_mask=group.mask, scale=scale)
    out = out.view(size, num_kv_heads, num_heads // num_kv_heads, -1, head_dim).permute(0, 3, 1, 2, 4)
    return out.reshape(num_q_rows, num_heads, head_dim)
