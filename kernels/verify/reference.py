"""Acceptance of drafts, and what follows from it for the next ones: small integers, in plain torch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Verified(NamedTuple):
    """Of N requests: how many drafts each commits, the token after the last of them, and the logits of the hit branch.

    ``accepted_N`` is at least 1 where there is a draft at all, and 0 elsewhere; there ``last_N`` is meaningless. ``place_NK``
    [N, K - 1] is where the logits of the masks 1 to K - 1 of the branch stand that bet on this count, -1 without such a branch.
    """

    accepted_N: Tensor
    last_N: Tensor
    is_hit_N: Tensor
    place_NK: Tensor


def verify(sampled_ND: Tensor, drafts_ND: Tensor, num_drafts_N: Tensor, order_NB: Tensor, masks_NBK: Tensor) -> Verified:
    """Accept drafts while they equal what verification takes, and pick the branch that was hit.

    ``sampled[i]`` is the token that verification takes after draft ``i``. ``order`` [N, B] are the branches that were run, -1
    for none; ``masks`` [N, B, K] where their masks' logits stand.
    """
    accepted_N = num_accepted(sampled_ND, drafts_ND, num_drafts_N)
    last_N = accepted_N
    if sampled_ND.shape[1]:
        last_N = sampled_ND.gather(1, (accepted_N - 1).clamp(min=0)[:, None]).squeeze(1)
    if masks_NBK.shape[1] == 0 or masks_NBK.shape[2] < 2:
        return Verified(accepted_N, last_N, torch.zeros_like(accepted_N, dtype=torch.bool), masks_NBK.new_zeros(len(last_N), 0))
    is_hit_NB = (order_NB == (accepted_N - 1)[:, None]) & (accepted_N > 0)[:, None]
    is_hit_N, rank_N = is_hit_NB.max(dim=1)
    place_NK = masks_NBK[torch.arange(len(rank_N), device=rank_N.device), rank_N, 1:]
    return Verified(accepted_N, last_N, is_hit_N, place_NK.masked_fill(~is_hit_N[:, None], -1))


def num_accepted(sampled_ND: Tensor, drafts_ND: Tensor, num_drafts_N: Tensor) -> Tensor:
    """How many drafts each request commits, [N], at least 1 where there is a draft at all.

    Draft 0 is certain; draft ``i`` is accepted while it equals ``sampled[i - 1]`` and all before it were accepted.
    """
    first = num_drafts_N.clamp(max=1)
    if sampled_ND.shape[1] < 2:
        return first
    index = torch.arange(1, sampled_ND.shape[1], device=sampled_ND.device)
    matches = (sampled_ND[:, :-1] == drafts_ND[:, 1:]) & (index < num_drafts_N[:, None])
    return first + matches.cumprod(dim=1).sum(dim=1)
