"""What was said before, and what was asked for single tokens: the per-slot tables behind penalties, biases and bans.

They are made when the first request asks for them, so that a server whose clients never do pays nothing.
Shape suffixes: S slots, V vocabulary, W entries of the longest list, Q rows, K drafts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engine.upload import upload


class TokenCounts:
    """Which tokens a slot's prompt has, and how often its output has each token."""

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device) -> None:
        self.in_prompt_SV = torch.zeros((num_slots, vocab_size), dtype=torch.bool, device=device)
        self.output_SV = torch.zeros((num_slots, vocab_size), dtype=torch.int32, device=device)

    def reset(self, slot: int, prompt: Sequence[int], output: Sequence[int]) -> None:
        """A request takes the slot."""
        device, vocab_size = self.output_SV.device, self.output_SV.shape[1]
        said = np.zeros(vocab_size, dtype=bool)
        said[list(prompt)] = True
        self.in_prompt_SV[slot] = upload(said, device)
        counts = np.bincount(np.array(output, dtype=np.int64), minlength=vocab_size)
        self.output_SV[slot] = upload(counts.astype(np.int32), device)

    def add(self, slot_N: Tensor, tokens_NK: Tensor, num_N: Tensor) -> None:
        """The first ``num`` of a slot's ``tokens`` were emitted."""
        self.output_SV[slot_N] += self._count(tokens_NK, num_N)

    def ahead(self, slot_Q: Tensor, tokens_QK: Tensor, num_Q: Tensor) -> Tensor:
        """Counts [Q, V] of the output as if the first ``num`` of each row's ``tokens`` had been emitted as well."""
        return self.output_SV[slot_Q] + self._count(tokens_QK, num_Q)

    def _count(self, tokens_QK: Tensor, num_Q: Tensor) -> Tensor:
        counts = self.output_SV.new_zeros((len(tokens_QK), self.output_SV.shape[1]))
        counted = torch.arange(tokens_QK.shape[1], device=tokens_QK.device) < num_Q[:, None]
        return counts.scatter_add_(1, tokens_QK, counted.to(torch.int32))


class TokenTable:
    """A list of (token id, value) for each slot, padded with zeros for token 0, which add nothing."""

    def __init__(self, num_slots: int, device: torch.device) -> None:
        self.ids_SW = torch.zeros((num_slots, 0), dtype=torch.long, device=device)
        self.values_SW = torch.zeros((num_slots, 0), dtype=torch.float64, device=device)
        self.num_moves = 0

    def widen(self, width: int) -> None:
        """Make room for lists of this length, which moves the table if there is none."""
        missing = width - self.ids_SW.shape[1]
        if missing > 0:
            self.ids_SW = torch.nn.functional.pad(self.ids_SW, (0, missing))
            self.values_SW = torch.nn.functional.pad(self.values_SW, (0, missing))
            self.num_moves += 1

    def set(self, slot: int, entries: Sequence[tuple[int, float]]) -> None:
        """A request with these entries, of different tokens, takes the slot."""
        if len(entries) > self.ids_SW.shape[1]:
            # Twice the width, so that growing is rare.
            self.widen(max(len(entries), 2 * self.ids_SW.shape[1]))
        self.ids_SW[slot].zero_()
        self.values_SW[slot].zero_()
        if entries:
            ids, values = zip(*entries, strict=True)
            self.ids_SW[slot, : len(ids)] = upload(ids, self.ids_SW.device)
            self.values_SW[slot, : len(ids)] = upload(np.array(values, dtype=np.float64), self.ids_SW.device)
