"""What became of the drafts of all requests: kept on the device, written by the verdict on every step that verifies some."""

from __future__ import annotations

import torch

from kernels.survival.reference import NUM_BINS


class SurvivalTable:
    """Outcomes of verified drafts: how many there were, and how many were accepted; [2, bins].

    What is done with them is in ``kernels.survival``. Output does not depend on it, only which branches run.
    """

    def __init__(self, device: torch.device) -> None:
        self.tried = torch.zeros((2, NUM_BINS), device=device)
        self.accepted = torch.zeros((2, NUM_BINS), device=device)

    def reset(self) -> None:
        """Forget all outcomes."""
        self.tried.zero_()
        self.accepted.zero_()
