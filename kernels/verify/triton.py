"""Acceptance, the hit branch and all progress in one launch: the same contract as ``kernels.verify.reference``.

It is little work, but as some fifty operations on a few integers it would take as long as several layers do. A program takes
one request. Where outcomes are counted, one more program finds out by itself what all requests accepted, since it cannot wait
for the others, and writes what no other reads. Numbers of requests, drafts and branches are no part of what is compiled: a
server does that once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.decode_state import DecodeState
from kernels.step_rows.metadata import REQUEST_FIELDS, StepLayout
from kernels.survival.triton import TABLE, add_outcomes, count_outcomes
from kernels.verify.metadata import StepRequests, Verified
from kernels.verify.reference import words_below

_FIELDS = tl.constexpr(REQUEST_FIELDS)
_TILE = tl.constexpr(512)
"""Drafts that are counted at a time."""
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def _accepted(state, fields, asked, tokens, n, exists, draft_stride, chance, COLUMNS: tl.constexpr):
    """How many drafts a tile of requests commits. A draft is wrong where it is not what was taken before it, or not there."""
    i = tl.arange(0, COLUMNS)[None, :]
    slot = tl.load(asked.slot_N + n, mask=exists, other=0)[:, None]
    held = tl.load(asked.num_drafts_N + n, mask=exists, other=0)[:, None]
    is_later = (i > 0) & (i < held)
    if chance is None:
        first = tl.load(fields + n * _FIELDS + 3, mask=exists, other=0)[:, None]
        taken = tl.load(tokens + first + i - 1, mask=is_later, other=0)
        is_right = taken == tl.load(state.drafts_SK + slot * draft_stride + i, mask=is_later, other=0)
    else:
        seed = tl.load(state.seed_S + slot)
        position = tl.load(asked.prefix_lengths_N + n, mask=exists, other=0)[:, None] + i
        position += tl.load(fields + n * _FIELDS + 4, mask=exists, other=0)[:, None]
        zero = tl.zeros_like(position).to(tl.uint32)
        is_right = tl.philox(seed, position.to(tl.uint32), zero, zero, zero)[0].to(tl.int64) < chance
    is_wrong = (i >= held) | (is_later & ~is_right)
    return tl.min(tl.where(is_wrong, i, COLUMNS), 1)


@triton.jit(
    do_not_specialize=["num_requests", "num_columns", "max_branches", "max_block", "num_guesses", "draft_stride", "chance"]
)
def _verify_kernel(
    out,
    state,
    fields,
    masks,
    asked,
    tokens,
    num_requests,
    num_columns,
    max_branches,
    max_block,
    num_guesses,
    draft_stride,
    chance,
    COLUMNS: tl.constexpr,
    REQUESTS: tl.constexpr,
):
    """``COLUMNS``: drafts a request may hold, as a power of two. ``REQUESTS``: those that are counted at a time."""
    n = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, COLUMNS)
    if n < num_requests:
        slot = tl.load(asked.slot_N + n)
        num_drafts = tl.load(asked.num_drafts_N + n)
        field = fields + n * _FIELDS
        first = tl.load(field + 3)
        one = n + tl.zeros([1], tl.int64)
        count = tl.max(_accepted(state, fields, asked, tokens, one, one >= 0, draft_stride, chance, COLUMNS), 0).to(tl.int64)
        computed = tl.load(asked.prefix_lengths_N + n) + tl.load(field + 4) + count

        rank = tl.arange(0, COLUMNS)
        number = tl.load(asked.order_NB + n * max_branches + rank, mask=rank < max_branches, other=-1)
        rank = tl.min(tl.where((number == count - 1) & (count > 0) & (num_guesses > 0), rank, COLUMNS), 0)
        is_hit = rank < COLUMNS
        num_held = tl.where(is_hit, tl.load(field + 6), 1)

        guess = n * num_guesses + i
        is_guess = i < num_guesses
        place = masks + (n * max_branches + tl.where(is_hit, rank, 0)) * max_block + 1 + i
        tl.store(out.place_Q + guess, tl.load(place, mask=is_guess & is_hit, other=-1), mask=is_guess)
        tl.store(out.slot_Q + guess, tl.zeros([COLUMNS], tl.int64) + slot, mask=is_guess)
        tl.store(out.position_Q + guess, computed + 1 + i, mask=is_guess)

        packed = out.packed + n * (4 + num_columns)
        tl.store(packed, count)
        tl.store(packed + 1, num_drafts)
        tl.store(packed + 2, num_held)
        tl.store(packed + 3, count)
        sampled = tl.load(tokens + first + i, mask=i < tl.load(field + 5), other=0)
        tl.store(packed + 4 + i, sampled, mask=i < num_columns)

        tl.store(state.num_computed_S + slot, computed)
        tl.store(state.wanted_S + slot, tl.load(state.wanted_S + slot) - count)
        tl.store(state.num_held_S + slot, num_held)
        last = tl.load(tokens + first + count - 1, mask=num_drafts > 0, other=0)
        tl.store(state.drafts_SK + slot * draft_stride, last, mask=num_drafts > 0)
    else:
        tried = tl.zeros([TABLE], tl.int32)
        accepted = tl.zeros([TABLE], tl.int32)
        for start in range(0, num_requests, REQUESTS):
            m = start + tl.arange(0, REQUESTS)
            exists = m < num_requests
            counts = _accepted(state, fields, asked, tokens, m, exists, draft_stride, chance, COLUMNS)[:, None]
            slots = tl.load(asked.slot_N + m, mask=exists, other=0)[:, None]
            held = tl.load(asked.num_drafts_N + m, mask=exists, other=0)[:, None]
            index = tl.broadcast_to(i[None, :], [REQUESTS, COLUMNS])
            is_tried = (index > 0) & (index <= counts) & (index < held)
            prob = tl.load(state.draft_probs_SK + slots * draft_stride + index, mask=is_tried, other=0.0)
            tried += count_outcomes(prob, index, is_tried)
            accepted += count_outcomes(prob, index, is_tried & (index < counts))
        add_outcomes(state, tried, accepted)


def verify(
    state: DecodeState, layout: StepLayout, requests: StepRequests, tokens_D: Tensor, chance: float | None, observes: bool
) -> Verified:
    """Accept drafts while they equal what verification takes, pick the branch that was hit, and write the progress."""
    num_requests, max_drafts, device = len(requests.slot_N), state.drafts_SK.shape[1], tokens_D.device
    columns, num_guesses = triton.next_power_of_2(max_drafts), layout.num_guesses

    def integers(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.long, device=device)

    out = Verified(integers(num_requests, 4 + layout.max_drafts), *(integers(num_requests * num_guesses) for _ in range(3)))
    assert all(t.is_contiguous() for t in (*state, *requests, layout.requests_N8, layout.masks_NBK, tokens_D))
    assert max(layout.max_drafts, layout.max_branches, layout.max_block) <= max_drafts
    _verify_kernel[(num_requests + observes,)](
        out,
        state,
        layout.requests_N8,
        layout.masks_NBK,
        requests,
        tokens_D,
        num_requests,
        layout.max_drafts,
        layout.max_branches,
        layout.max_block,
        num_guesses,
        max_drafts,
        None if chance is None else words_below(chance),
        COLUMNS=columns,
        REQUESTS=max(_TILE.value // columns, 1),
        **_OPTIONS,
    )
    return out
