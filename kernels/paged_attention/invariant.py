"""Batch-invariant attention in plain torch for the CPU: the contract of ``kernels.paged_attention.reference``, at more cost.

The bits of a clean row's output depend on nothing but its own query and the keys and values at positions ``0..p``, ``p`` its
own position: not on the other requests of the step, nor on where the step begins, that is, on whether it is the row of an
``ar`` step, a draft, or in the middle of a prompt. The argument:

1. Keys lie in tiles of 64 positions that count from the request's first token. A key of the step stands where the cache will
   have it, with the bits that the cache will have. The step's mask rows follow in tiles of their own.
2. Rows lie in tiles of one size, padded. So every matrix product is of one shape, one item of a batch. What an item gives
   depends neither on its number nor on how many there are, and no row of it on the others or on its place.
3. The largest score of a row is exact in any order. Sums within a tile of keys are of one length; tiles are added in the order
   of their positions. Exponentials go through ``kernels.lanewise``.
4. Keys that a row does not see, of other rows in its tile and of longer requests, have weight zero, and adding zero is exact.

Point 2 is a property of the library, which ``tests/kernels/test_invariant_attention.py`` looks at. MKL kept it in float32 and
float64 with 1 to 8 threads, but for one case: where there are fewer items than threads, a product in float64 is shared out and
its bits change. So small batches are padded.

A mask row does not depend on the other requests either. How its own request is cut into steps decides which masks share a tile.

float16 and bfloat16 are computed in float32. Every slot of the caches has to hold finite numbers, as for the reference.

Shapes: q [R, H, D]; k, v [R, G, D]; caches [pages, G, page_size, D]. Suffixes: B requests of a tile, T tiles of keys, M query
vectors of a tile (rows times query heads of a key/value head), N keys of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.lanewise import lanewise
from kernels.mask_layout import CLEAN
from kernels.paged_attention.metadata import AttentionMetadata

_KEYS = 64
_QUERIES = 32
"""Sizes of a tile. Queries are whole rows, padded up to a multiple of this."""

_LOWEST = -1.0e30
"""Largest score of a row that sees nothing: finite, so that its weights are ``exp(-inf) = 0`` and not NaN."""


@dataclass(frozen=True, slots=True)
class _Tile:
    """The rows of one number in several requests: row numbers [B, M / group], which of them exist, and what they see.

    ``requests`` [B], None for all of them. ``unseen`` [B, 1, T, M, N].
    """

    requests: Tensor | None
    rows: Tensor
    exists: Tensor
    unseen: Tensor


@dataclass(frozen=True, slots=True)
class Prepared:
    """The per-step work: where keys are put, and the tiles of rows.

    ``pages`` [requests, P] are gathered; clean rows go to ``places`` (request, position); all rows, where there are mask rows,
    to ``step_places`` behind ``num_clean_tiles`` tiles. ``num_tiles`` counts both.
    """

    pages: Tensor
    clean_rows: Tensor
    places: tuple[Tensor, Tensor]
    step_places: tuple[Tensor, Tensor]
    num_tiles: int
    has_masks: bool
    group_size: int
    tiles: tuple[_Tile, ...]


def prepare(metadata: AttentionMetadata, page_size: int, group_size: int, dtype: torch.dtype) -> Prepared:
    """Cut rows and keys into tiles and expand the mask, once for all layers.

    ``group_size`` is the number of query heads per key/value head. The mask is the same for every ``dtype``.
    """
    starts, device = metadata.device_row_starts, metadata.limit.device
    num_rows = starts.diff()
    request = torch.arange(len(num_rows), device=device).repeat_interleave(num_rows)
    index = torch.arange(len(request), device=device) - starts[request]
    positions = metadata.prefix_lengths[request] + index
    clean_rows = (metadata.branch == CLEAN).nonzero().squeeze(1)
    has_masks = len(clean_rows) < len(request)
    most_rows, longest = int(num_rows.max()), max(metadata.max_prefix)
    num_clean_tiles = -(-(longest + most_rows) // _KEYS)
    num_step_tiles = -(-most_rows // _KEYS) if has_masks else 0
    tile_rows = max(1, _QUERIES // group_size)
    return Prepared(
        pages=metadata.block_table[:, : -(-longest // page_size)],
        clean_rows=clean_rows,
        places=(request[clean_rows], positions[clean_rows]),
        step_places=(request, num_clean_tiles * _KEYS + index),
        num_tiles=num_clean_tiles + num_step_tiles,
        has_masks=has_masks,
        group_size=group_size,
        tiles=tuple(
            _tile(metadata, first, tile_rows, group_size, num_clean_tiles, num_step_tiles)
            for first in range(0, most_rows, tile_rows)
        ),
    )


def _tile(
    metadata: AttentionMetadata, first: int, tile_rows: int, group_size: int, num_clean_tiles: int, num_step_tiles: int
) -> _Tile:
    """Rows ``first..first+tile_rows-1`` of every request that has them; missing ones repeat its last row."""
    starts, device = metadata.device_row_starts, metadata.limit.device
    num_rows = starts.diff()
    chosen = (num_rows > first).nonzero().squeeze(1)
    index = first + torch.arange(tile_rows, device=device)
    exists = index < num_rows[chosen, None]
    rows = torch.minimum(starts[chosen, None] + index, starts[chosen + 1, None] - 1)
    seen_end = metadata.prefix_lengths[chosen, None] + metadata.limit[rows].clamp(min=0)
    seen = torch.arange(num_clean_tiles * _KEYS, device=device) < seen_end[..., None]
    if num_step_tiles:
        key = torch.arange(num_step_tiles * _KEYS, device=device)
        keys = torch.minimum(starts[chosen, None] + key, starts[chosen + 1, None] - 1)
        key_branch = metadata.branch[keys].masked_fill(key >= num_rows[chosen, None], CLEAN)
        in_branch = (key_branch != CLEAN)[:, None] & (key_branch[:, None] == metadata.branch[rows][..., None])
        seen = torch.cat((seen, in_branch), dim=-1)
    seen = seen.unflatten(-1, (-1, _KEYS)).transpose(1, 2).repeat_interleave(group_size, dim=2)
    unseen = ~F.pad(seen, (0, 0, 0, -seen.shape[2] % _QUERIES)).unsqueeze(1)
    return _Tile(None if len(chosen) == len(num_rows) else chosen, rows, exists, unseen)


def paged_attention(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, prepared: Prepared, scale: float
) -> Tensor:
    """Return the attention output [R, H, D] of a step's rows."""
    keys, values = _lay_out(k, k_cache, prepared), _lay_out(v, v_cache, prepared)
    out = torch.empty_like(q)
    for tile in prepared.tiles:
        chosen = slice(None) if tile.requests is None else tile.requests
        # [B, G, M, D]: query heads that share a key/value head become extra rows.
        rows = q[tile.rows].to(keys.dtype).unflatten(2, (-1, prepared.group_size)).transpose(1, 2).flatten(2, 3)
        mixed = _attend(F.pad(rows, (0, 0, 0, -rows.shape[2] % _QUERIES)), keys[chosen], values[chosen], tile.unseen, scale)
        mixed = mixed[:, :, : rows.shape[2]].unflatten(2, (-1, prepared.group_size)).transpose(1, 2).flatten(2, 3)
        out[tile.rows[tile.exists]] = mixed[tile.exists].to(q.dtype)
    return out


def _lay_out(step: Tensor, cache: Tensor, prepared: Prepared) -> Tensor:
    """Keys or values by position, the step's in their places, and after them the step's rows: [requests, G, T, N, D]."""
    num_requests, num_pages = prepared.pages.shape
    num_heads, page_size, head_dim = cache.shape[1:]
    dtype = torch.promote_types(cache.dtype, torch.float32)
    places = torch.zeros(num_requests, num_heads, prepared.num_tiles * _KEYS, head_dim, dtype=dtype, device=cache.device)
    pages = cache.index_select(0, prepared.pages.flatten()).unflatten(0, (num_requests, num_pages))
    width = min(num_pages * page_size, places.shape[2])
    places[:, :, :width] = pages.transpose(1, 2).flatten(2, 3)[:, :, :width]
    by_position = places.transpose(1, 2)
    by_position[prepared.places] = step[prepared.clean_rows].to(dtype)
    if prepared.has_masks:
        by_position[prepared.step_places] = step.to(dtype)
    tiles: Tensor = places.unflatten(2, (-1, _KEYS))
    return tiles


def _attend(q_BGMD: Tensor, k_BGTND: Tensor, v_BGTND: Tensor, unseen_B1TMN: Tensor, scale: float) -> Tensor:
    """Softmax over all tiles of keys of each row, weights summed tile by tile; [B, G, M, D]."""
    shape = k_BGTND.shape[:3]
    q_IMD = _items(q_BGMD.unsqueeze(2).expand(-1, -1, shape[2], -1, -1))
    scores = torch.bmm(q_IMD, _items(k_BGTND).transpose(1, 2))[: shape.numel()].unflatten(0, shape)
    scores = scores.mul_(scale).masked_fill_(unseen_B1TMN, float("-inf"))
    peak = scores.amax(dim=(2, 4), keepdim=True).clamp_(min=_LOWEST)
    weights = lanewise(torch.exp, scores.sub_(peak))
    totals = weights.sum(dim=-1, keepdim=True)
    sums = torch.bmm(_items(weights), _items(v_BGTND))[: shape.numel()].unflatten(0, shape)
    total, acc = totals[:, :, 0], sums[:, :, 0]
    for t in range(1, shape[2]):
        total, acc = total + totals[:, :, t], acc + sums[:, :, t]
    out: Tensor = acc / total.masked_fill(total == 0, 1.0)
    return out


def _items(x: Tensor) -> Tensor:
    """The last two dimensions as items of a batch, contiguous, at least as many as threads."""
    items = x.flatten(0, 2).contiguous()
    missing = torch.get_num_threads() - len(items)
    return items if missing <= 0 else F.pad(items, (0, 0, 0, 0, 0, missing))
