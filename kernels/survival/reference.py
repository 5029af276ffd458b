"""How likely drafts are to be accepted, calibrated by what became of earlier ones, and which branches that makes worth running.

Diffusion probabilities are overconfident, and the first guess of a block is better than the later ones, so outcomes are counted
by bins of the probability, apart for the first guess (row 0) and the others. All implementations choose the same branches: sums
are of integers, products of float64 in whatever order are compared as float32, and equals are ranked by their number.

Shape suffixes: N requests, D drafts at most, B branches at most.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

NUM_BINS = 12

PRIOR = 8.0
"""How many outcomes the draft's own probability is worth."""

MAX_OUTCOMES = 4096.0
"""From here on old outcomes fade, so that the table follows what is asked now."""

LEAST_DOUBT = 1e-4


def places(probs_ND: Tensor) -> Tensor:
    """Where the outcomes of drafts with these probabilities are counted, in the flattened table.

    Bins are even in the logarithm of the doubt ``1 - p``: that is where the probabilities of a trained model differ. The
    floor of ``-log2`` is one of the exponent's bits, which are the same everywhere, unlike a logarithm.
    """
    doubt = (1.0 - probs_ND.nan_to_num(0.0)).clamp(min=LEAST_DOUBT)
    bins = (126 - ((doubt.view(torch.int32) - 1) >> 23)).clamp(0, NUM_BINS - 1).long()
    later = (torch.arange(probs_ND.shape[1], device=probs_ND.device) > 1).long()
    return bins + later * NUM_BINS


def calibrate(probs_ND: Tensor, tried: Tensor, accepted: Tensor) -> Tensor:
    """The drafts' chances of acceptance, [N, D] float64, given that all before them are accepted. Draft 0 is certain."""
    places_ND = places(probs_ND)
    tried_ND, accepted_ND = tried.flatten()[places_ND].double(), accepted.flatten()[places_ND].double()
    return (accepted_ND + PRIOR * probs_ND.nan_to_num(0.0).double()) / (tried_ND + PRIOR)


def observe(probs_ND: Tensor, num_drafts_N: Tensor, accepted_N: Tensor, tried: Tensor, accepted: Tensor) -> None:
    """Count what became of a step's drafts. The one after the last accepted was tried too, those behind it were not."""
    index = torch.arange(probs_ND.shape[1], device=probs_ND.device)
    is_tried_ND = (index > 0) & (index <= accepted_N[:, None]) & (index < num_drafts_N[:, None])
    is_accepted_ND = is_tried_ND & (index < accepted_N[:, None])
    is_faded = None
    for table, is_counted_ND in ((tried, is_tried_ND), (accepted, is_accepted_ND)):
        counts = torch.zeros(table.numel(), dtype=torch.long, device=table.device)
        table += counts.index_add_(0, places(probs_ND).flatten(), is_counted_ND.flatten().long()).view_as(table)
        is_faded = table > MAX_OUTCOMES if is_faded is None else is_faded
        table *= torch.where(is_faded, 0.5, 1.0)


def rank_branches(
    chance_ND: Tensor, num_drafts_N: Tensor, num_useful_N: Tensor, num_branches_N: Tensor, max_branches: int
) -> Tensor:
    """Which branches to run: the likeliest to be hit, [N, max_branches] branch numbers, -1 where there is none.

    Branch ``i`` is hit when exactly drafts ``0..i`` are accepted. With chances of survival ``p`` that is
    ``p_1 ... p_i (1 - p_{i+1})``, and ``p_1 ... p_{n-1}`` for the last. ``chance_ND[:, 0]`` is ignored: draft 0 is certain.
    With two branches or more, branch 0 is always one of them, since a miss there costs the most.
    """
    width = chance_ND.shape[1]
    index = torch.arange(width, device=chance_ND.device)
    last = index >= (num_drafts_N - 1)[:, None]
    survival = F.pad(chance_ND[:, 1:], (1, 0), value=1.0).double().cumprod(dim=1)
    score = (survival * (1 - F.pad(chance_ND[:, 1:], (0, 1)).double().masked_fill(last, 0.0))).float()
    score[:, 0] += 2.0 * (num_branches_N > 1)
    score = score.masked_fill(index >= num_useful_N[:, None], -1.0)
    best, order = score.sort(dim=1, descending=True, stable=True)
    rank = torch.arange(width, device=chance_ND.device)
    order = order.masked_fill((best < 0) | (rank >= num_branches_N[:, None]), -1)
    return F.pad(order, (0, max(max_branches - width, 0)), value=-1)[:, :max_branches]
