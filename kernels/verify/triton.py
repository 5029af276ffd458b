"""Acceptance and the hit branch in one launch: the same contract as ``kernels.verify.reference``.

It is little work, but as some twenty operations on a few integers it would take as long as a layer of a small model does.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.verify.reference import Verified


@triton.jit
def _verify_kernel(
    accepted,
    last,
    is_hit,
    place,
    sampled,
    drafts,
    num_drafts,
    order,
    masks,
    num_columns,
    num_branches,
    width,
    sampled_stride,
    drafts_stride,
    order_stride,
    masks_stride,
    masks_branch_stride,
    COLUMNS: tl.constexpr,
    BRANCHES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One request. The capitals are the sizes as powers of two; ``width`` is the number of masks that draft."""
    n = tl.program_id(0).to(tl.int64)
    held = tl.load(num_drafts + n)
    # A draft is wrong where it is not what was taken before it, or not there at all.
    i = tl.arange(0, COLUMNS)
    is_later = (i > 0) & (i < num_columns)
    taken = tl.load(sampled + n * sampled_stride + i - 1, mask=is_later, other=0)
    draft = tl.load(drafts + n * drafts_stride + i, mask=is_later, other=0)
    is_wrong = (i >= num_columns) | (is_later & (taken != draft)) | (i >= held)
    count = tl.min(tl.where(is_wrong, i, COLUMNS), 0)
    tl.store(accepted + n, count.to(tl.int64))
    tl.store(last + n, tl.load(sampled + n * sampled_stride + tl.maximum(count, 1) - 1, mask=num_columns > 0, other=0))

    branch = tl.arange(0, BRANCHES)
    number = tl.load(order + n * order_stride + branch, mask=branch < num_branches, other=-1)
    rank = tl.min(tl.where((number == count - 1) & (count > 0), branch, BRANCHES), 0)
    hit = rank < BRANCHES
    tl.store(is_hit + n, hit)
    k = tl.arange(0, WIDTH)
    places = masks + n * masks_stride + tl.where(hit, rank, 0) * masks_branch_stride + 1 + k
    tl.store(place + n * width + k, tl.load(places, mask=(k < width) & hit, other=-1), mask=k < width)


def verify(sampled_ND: Tensor, drafts_ND: Tensor, num_drafts_N: Tensor, order_NB: Tensor, masks_NBK: Tensor) -> Verified:
    """Accept drafts while they equal what verification takes, and pick the branch that was hit."""
    (num_requests, num_columns), (_, num_branches, block) = sampled_ND.shape, masks_NBK.shape
    width = max(block - 1, 0) if num_branches else 0
    device = sampled_ND.device
    accepted_N, last_N = torch.empty((2, num_requests), dtype=torch.long, device=device)
    result = Verified(
        accepted_N,
        last_N,
        torch.empty(num_requests, dtype=torch.bool, device=device),
        torch.empty((num_requests, width), dtype=torch.long, device=device),
    )
    assert all(t.stride(-1) == 1 for t in (sampled_ND, drafts_ND, order_NB, masks_NBK) if t.numel() > 1)
    _verify_kernel[(num_requests,)](
        *result,
        sampled_ND,
        drafts_ND,
        num_drafts_N,
        order_NB,
        masks_NBK,
        num_columns,
        num_branches if width else 0,
        width,
        sampled_ND.stride(0),
        drafts_ND.stride(0),
        order_NB.stride(0),
        masks_NBK.stride(0),
        masks_NBK.stride(1),
        COLUMNS=triton.next_power_of_2(num_columns + 1),
        BRANCHES=triton.next_power_of_2(max(num_branches, 1)),
        WIDTH=triton.next_power_of_2(max(width, 1)),
        num_warps=1,
    )
    return result
