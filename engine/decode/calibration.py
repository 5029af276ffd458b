"""How far the drafts' own probabilities can be trusted: a table of outcomes, kept on the device and calibrated online.

Diffusion probabilities are overconfident, and the first guess of a block is better than the later ones, so outcomes are kept
by bins of the probability, apart for the first guess and the others. Output does not depend on it, only which branches run.
"""

from __future__ import annotations

import torch
from torch import Tensor

NUM_BINS = 12

PRIOR = 8.0
"""How many outcomes the draft's own probability is worth."""

MAX_OUTCOMES = 4096.0
"""From here on old outcomes fade, so that the table follows what is asked now."""


class SurvivalTable:
    """Outcomes of verified drafts: how many there were, and how many were accepted; [2, bins], the first guesses' in row 0."""

    def __init__(self, device: torch.device) -> None:
        self.tried = torch.zeros((2, NUM_BINS), device=device)
        self.accepted = torch.zeros((2, NUM_BINS), device=device)

    def reset(self) -> None:
        """Forget all outcomes."""
        self.tried.zero_()
        self.accepted.zero_()

    def calibrate(self, probs_ND: Tensor) -> Tensor:
        """The drafts' chances of acceptance, [N, D], given that all before them are accepted. Draft 0 is certain."""
        places_ND = _places(probs_ND)
        tried, accepted = self.tried.flatten()[places_ND], self.accepted.flatten()[places_ND]
        return (accepted + PRIOR * probs_ND) / (tried + PRIOR)

    def observe(self, probs_ND: Tensor, num_drafts_N: Tensor, accepted_N: Tensor) -> None:
        """Count what became of a step's drafts. The one after the last accepted was tried too, those behind it were not."""
        index = torch.arange(probs_ND.shape[1], device=probs_ND.device)
        is_tried_ND = (index > 0) & (index <= accepted_N[:, None]) & (index < num_drafts_N[:, None])
        is_accepted_ND = is_tried_ND & (index < accepted_N[:, None])
        places = _places(probs_ND).flatten()
        self.tried.view(-1).index_add_(0, places, is_tried_ND.flatten().to(self.tried.dtype))
        self.accepted.view(-1).index_add_(0, places, is_accepted_ND.flatten().to(self.tried.dtype))
        fade = torch.where(self.tried > MAX_OUTCOMES, 0.5, 1.0)
        self.tried *= fade
        self.accepted *= fade


def _places(probs_ND: Tensor) -> Tensor:
    """Bins are even in the logarithm of the doubt ``1 - p``: that is where the probabilities of a trained model differ."""
    doubt = (1.0 - probs_ND.nan_to_num(0.0)).clamp(min=1e-4)
    bins = (-doubt.log2()).clamp(max=NUM_BINS - 1).long()
    later = (torch.arange(probs_ND.shape[1], device=probs_ND.device) > 1).long()
    return bins + later * NUM_BINS
