"""Acceptance and the ranking of branches: pure functions on small integer tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.philox.reference import philox


def imposed_drafts(sampled_ND: Tensor, seed_N: Tensor, position_N: Tensor, chance: float) -> Tensor:
    """Drafts [N, D] that are accepted by a coin, independently with ``chance`` each, whatever was guessed: for benchmarks.

    The coin is a function of the request's seed and the position (Philox), the first verifying row's being ``position_N``.
    Requests with different seeds accept independently, as real ones do: in step, they would average nothing out.
    """
    seed_N1, zero = seed_N[:, None], torch.zeros_like(position_N)[:, None]
    positions_ND = position_N[:, None] + torch.arange(sampled_ND.shape[1], device=sampled_ND.device)
    words_ND = philox((seed_N1 & 0xFFFFFFFF, (seed_N1 >> 32) & 0xFFFFFFFF), (positions_ND, zero, zero, zero))[0]
    right_ND = torch.cat((sampled_ND[:, :1], sampled_ND[:, :-1]), dim=1)
    return torch.where(words_ND < chance * 2.0**32, right_ND, -1)


def rank_branches(
    probs_ND: Tensor, num_drafts_N: Tensor, num_useful_N: Tensor, num_branches_N: Tensor, max_branches: int
) -> Tensor:
    """Which branches to run: the likeliest to be hit, [N, max_branches] branch numbers, -1 where there is none.

    Branch ``i`` is hit when exactly drafts ``0..i`` are accepted. With the drafts' own probabilities ``p`` as chances of
    survival that is ``p_1 ... p_i (1 - p_{i+1})``, and ``p_1 ... p_{n-1}`` for the last. ``probs_ND[:, 0]`` is ignored: draft 0
    is certain. With two branches or more, branch 0 is always one of them, since a miss there costs the most.
    """
    width = probs_ND.shape[1]
    index = torch.arange(width, device=probs_ND.device)
    last = index >= (num_drafts_N - 1)[:, None]
    survival = torch.cat((torch.ones_like(probs_ND[:, :1]), probs_ND[:, 1:]), dim=1).cumprod(dim=1)
    next_prob = torch.cat((probs_ND[:, 1:], torch.zeros_like(probs_ND[:, :1])), dim=1).masked_fill(last, 0.0)
    score = survival * (1 - next_prob)
    score[:, 0] += 2.0 * (num_branches_N > 1)
    score = score.masked_fill(index >= num_useful_N[:, None], -1.0)
    best, order = score.topk(min(max_branches, width), dim=1)
    return order.masked_fill(best < 0, -1)
