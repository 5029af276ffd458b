"""The attention of one tile: the loops over its keys, and the merge of partial results. Device functions only.

The state of a row is that of the online softmax (Dao, FlashAttention-2, arXiv 2307.08691, algorithm 1) in float32 and base 2:
``acc`` [M, D], the sum of ``2^(score - peak)`` times the value; ``total``, the sum of these weights; ``peak``, the largest
score so far. A score is the product of query and key times ``scale``, which is positive and includes ``log2(e)``. Two states
over different keys are folded into one by rescaling both to the larger peak (the log-sum-exp merge of section 3.1, without
the division).

Tuples that go together:

* ``state``: ``acc``, ``peak``, ``total``;
* ``rows``: the queries [M, D]; the position [M] from which on a row sees no clean key; its branch [M];
* ``cache``: the K and V caches at the key/value head, the request's row of the block table, page and slot stride, and the
  prefix length: keys below it are in the cache, the step's from there on;
* ``step``: K, V (at the key/value head) and branch of the request's first row, and the row strides of K and V.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.mask_layout import CLEAN

_CLEAN = tl.constexpr(CLEAN)
LOWEST = tl.constexpr(-1.0e30)
"""Start of the running maximum. Finite, so that a block in which a row sees nothing gives ``2^(-inf) = 0`` and not NaN."""


@triton.jit
def start(BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """The state of rows that have seen nothing."""
    return tl.zeros([BLOCK_M, BLOCK_D], tl.float32), tl.full([BLOCK_M], LOWEST, tl.float32), tl.zeros([BLOCK_M], tl.float32)


@triton.jit
def fold(state, other):
    """Two states over different keys as one. Exact where either has seen nothing."""
    acc, peak, total = state
    other_acc, other_peak, other_total = other
    new_peak = tl.maximum(peak, other_peak)
    decay = tl.exp2(peak - new_peak)
    weight = tl.exp2(other_peak - new_peak)
    return acc * decay[:, None] + other_acc * weight[:, None], new_peak, total * decay + other_total * weight


@triton.jit
def gather(acc, peak, total):
    """States [P, M, D], [P, M] and [P, M] over different keys as one state. Exact for one."""
    new_peak = tl.max(peak, 0)
    weight = tl.exp2(peak - new_peak[None, :])
    return tl.sum(acc * weight[:, :, None], 0), new_peak, tl.sum(total * weight, 0)


@triton.jit
def finish(state):
    """The output: the weighted mean of the values, zero where nothing was seen."""
    acc, _, total = state
    return acc / tl.where(total > 0.0, total, 1.0)[:, None]


@triton.jit
def _accumulate(state, products, scale, v):
    """Take the products of queries and keys [M, N] (unseen keys at -inf) and the values [N, D] into the state."""
    acc, peak, total = state
    new_peak = tl.maximum(peak, tl.max(products, 1) * scale)
    decay = tl.exp2(peak - new_peak)
    weights = tl.exp2(products * scale - new_peak[:, None])
    total = total * decay + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return acc, new_peak, total


@triton.jit
def _look_up(pages, first, end, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The page of a block's first key, and that of the next ``PAGE`` keys where a block spans two pages.

    Read one block ahead: a look-up inside the software pipeline would take stages away from the keys.
    """
    page = tl.load(pages + first // PAGE, mask=first < end, other=0).to(tl.int64)
    second = page
    if BLOCK_N == 2 * PAGE:
        second = tl.load(pages + first // PAGE + 1, mask=first + PAGE < end, other=0).to(tl.int64)
    return page, second


@triton.jit
def _walk_prefix(
    state,
    rows,
    cache,
    begin,
    end,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Whole blocks of cached keys, which every row sees: no mask arithmetic."""
    q_tile, _, _ = rows
    k_head, v_head, pages, page_stride, slot_stride, _ = cache
    offset = tl.arange(0, BLOCK_N)
    dim = tl.arange(0, BLOCK_D)
    in_page = (offset % PAGE * slot_stride)[:, None] + dim[None, :]
    page, second = _look_up(pages, begin, end, PAGE, BLOCK_N)
    for first in range(begin, end, BLOCK_N):
        if PAGE % BLOCK_N == 0 or BLOCK_N == 2 * PAGE:
            block = page * page_stride + first % PAGE * slot_stride
            if BLOCK_N == 2 * PAGE:
                block = tl.where(offset < PAGE, block, second * page_stride)[:, None]
            k_pointers = k_head + block + in_page
            v_pointers = v_head + block + in_page
            page, second = _look_up(pages, first + BLOCK_N, end, PAGE, BLOCK_N)
        else:
            place = tl.load(pages + (first + offset) // PAGE).to(tl.int64)
            slots = place * page_stride + (first + offset) % PAGE * slot_stride
            k_pointers = k_head + slots[:, None] + dim[None, :]
            v_pointers = v_head + slots[:, None] + dim[None, :]
        if HEAD_DIM == BLOCK_D:
            k_tile = tl.load(k_pointers)
            v_tile = tl.load(v_pointers)
        else:
            k_tile = tl.load(k_pointers, mask=(dim < HEAD_DIM)[None, :], other=0.0)
            v_tile = tl.load(v_pointers, mask=(dim < HEAD_DIM)[None, :], other=0.0)
        products = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        state = _accumulate(state, products, scale, v_tile)
    return state


@triton.jit
def _walk_clean(
    state,
    rows,
    cache,
    step,
    begin,
    end,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Clean keys at positions ``begin..end-1``, from the cache and from the step. No row may see one beyond the tile's last."""
    q_tile, seen_end, _ = rows
    k_head, v_head, pages, page_stride, slot_stride, prefix = cache
    k_step, v_step, _, k_row_stride, v_row_stride = step
    offset = tl.arange(0, BLOCK_N)
    dim = tl.arange(0, BLOCK_D)
    cached_end = tl.minimum(prefix, end)
    page, second = _look_up(pages, begin, cached_end, PAGE, BLOCK_N)
    for first in range(begin, end, BLOCK_N):
        position = first + offset
        cached = position < cached_end
        # Where the block begins, in the cache or in the step, and a number of strides from there: not two addresses a key.
        number = offset
        if PAGE % BLOCK_N == 0:
            block = page * page_stride + first % PAGE * slot_stride
        else:
            if BLOCK_N == 2 * PAGE:
                place = tl.where(offset < PAGE, page, second)
            else:
                place = tl.load(pages + position // PAGE, mask=cached, other=0).to(tl.int64)
            block = place * page_stride
            number = tl.where(cached, position % PAGE, offset)
        if PAGE % BLOCK_N == 0 or BLOCK_N == 2 * PAGE:
            page, second = _look_up(pages, first + BLOCK_N, cached_end, PAGE, BLOCK_N)
        row = (first - prefix).to(tl.int64)
        k_pointers = tl.where(cached, k_head + block, k_step + row * k_row_stride)
        v_pointers = tl.where(cached, v_head + block, v_step + row * v_row_stride)
        k_pointers += number * tl.where(cached, slot_stride, k_row_stride)
        v_pointers += number * tl.where(cached, slot_stride, v_row_stride)
        inside = (position < end)[:, None] & (dim < HEAD_DIM)[None, :]
        k_tile = tl.load(k_pointers[:, None] + dim[None, :], mask=inside, other=0.0)
        v_tile = tl.load(v_pointers[:, None] + dim[None, :], mask=inside, other=0.0)
        products = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        seen = position[None, :] < seen_end[:, None]
        state = _accumulate(state, tl.where(seen, products, float("-inf")), scale, v_tile)
    return state


@triton.jit
def _walk_masks(state, rows, step, begin, end, scale, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr):
    """Mask keys, by row number within the request: a row sees those of its own branch. Blocks are aligned."""
    q_tile, _, row_branch = rows
    k_step, v_step, branch, k_row_stride, v_row_stride = step
    dim = tl.arange(0, BLOCK_D)
    # A few blocks at most, and keys that wait for their branch: not worth the registers of a pipeline.
    for first in tl.range(begin // BLOCK_N * BLOCK_N, end, BLOCK_N, num_stages=1):
        key = first + tl.arange(0, BLOCK_N)
        key_branch = tl.load(branch + key, mask=key < end, other=_CLEAN).to(tl.int32)
        row = key.to(tl.int64)
        inside = (key_branch != _CLEAN)[:, None] & (dim < HEAD_DIM)[None, :]
        k_tile = tl.load(k_step + (row * k_row_stride)[:, None] + dim[None, :], mask=inside, other=0.0)
        v_tile = tl.load(v_step + (row * v_row_stride)[:, None] + dim[None, :], mask=inside, other=0.0)
        products = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        seen = (key_branch != _CLEAN)[None, :] & (key_branch[None, :] == row_branch[:, None])
        state = _accumulate(state, tl.where(seen, products, float("-inf")), scale, v_tile)
    return state


@triton.jit
def walk(
    rows,
    cache,
    step,
    begin,
    end,
    mask_begin,
    mask_end,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT_SIZE: tl.constexpr,
):
    """All keys of an item: clean ones at positions ``begin..end-1``, and the mask rows ``mask_begin..mask_end-1``.

    With a ``SPLIT_SIZE``, clean keys are cut into segments of this size, each of which starts from an empty state; the mask
    keys belong to the first.
    """
    state = start(BLOCK_M, BLOCK_D)
    if SPLIT_SIZE:
        for first in range(begin, tl.maximum(end, begin + 1), SPLIT_SIZE):
            segment = start(BLOCK_M, BLOCK_D)
            last = tl.minimum(first + SPLIT_SIZE, end)
            segment = _walk_clean(segment, rows, cache, step, first, last, scale, HEAD_DIM, BLOCK_D, PAGE, BLOCK_N)
            masks = tl.where(first == 0, mask_end, 0)
            segment = _walk_masks(segment, rows, step, mask_begin, masks, scale, HEAD_DIM, BLOCK_D, BLOCK_N)
            state = fold(state, segment)
    else:
        _, _, _, _, _, prefix = cache
        whole = begin + tl.maximum(tl.minimum(end, prefix) - begin, 0) // BLOCK_N * BLOCK_N
        state = _walk_prefix(state, rows, cache, begin, whole, scale, HEAD_DIM, BLOCK_D, PAGE, BLOCK_N)
        state = _walk_clean(state, rows, cache, step, whole, end, scale, HEAD_DIM, BLOCK_D, PAGE, BLOCK_N)
        state = _walk_masks(state, rows, step, mask_begin, mask_end, scale, HEAD_DIM, BLOCK_D, BLOCK_N)
    return state
