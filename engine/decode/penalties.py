"""What was said before, and what was asked for single tokens: the per-slot tables behind penalties, biases and bans.

None of them moves once it is made, since captured steps read them where they are.
Shape suffixes: S slots, A admitted requests, V vocabulary, W entries of the longest list, E entries of all lists, Q rows, K
drafts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from engine.step import IntArray
from engine.upload import upload


class TokenCounts:
    """Which tokens a slot's prompt has, and how often its output has each token."""

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device) -> None:
        self.in_prompt_SV = torch.zeros((num_slots, vocab_size), dtype=torch.bool, device=device)
        self.output_SV = torch.zeros((num_slots, vocab_size), dtype=torch.int32, device=device)

    def admit(self, slots: Sequence[int], prompts: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]]) -> None:
        """Requests that have said this take the slots."""
        device = self.output_SV.device
        slot_A = upload(slots, device)
        self.in_prompt_SV.index_fill_(0, slot_A, False)
        self.output_SV.index_fill_(0, slot_A, 0)
        slot_E, token_E, _ = upload(_counted(slots, prompts), device).unbind(0)
        self.in_prompt_SV[slot_E, token_E] = torch.ones_like(token_E, dtype=torch.bool)
        if any(outputs):
            slot_E, token_E, count_E = upload(_counted(slots, outputs), device).unbind(0)
            self.output_SV[slot_E, token_E] = count_E.int()

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


def _counted(slots: Sequence[int], texts: Sequence[Sequence[int]]) -> IntArray:
    """The different tokens of every slot's text: slot, token and how often, [3, E]."""
    found = []
    for slot, text in zip(slots, texts, strict=True):
        tokens, counts = np.unique(np.array(text, dtype=np.int64), return_counts=True)
        found.append(np.stack((np.full_like(tokens, slot), tokens, counts)))
    return np.concatenate(found, axis=1)


class TokenTable:
    """A list of (token id, value) for each slot, at most ``width`` long, padded with zeros for token 0, which add nothing."""

    def __init__(self, num_slots: int, width: int, device: torch.device) -> None:
        self.ids_SW = torch.zeros((num_slots, width), dtype=torch.long, device=device)
        self.values_SW = torch.zeros((num_slots, width), dtype=torch.float64, device=device)

    def admit(self, slot_A: Tensor, slots: Sequence[int], lists: Iterable[Iterable[tuple[int, float]]]) -> None:
        """Requests with these entries, each list's of different tokens, take the slots, which are given on both sides."""
        self.ids_SW.index_fill_(0, slot_A, 0)
        self.values_SW.index_fill_(0, slot_A, 0.0)
        # Slots, places and token ids are exact as float64, so that one upload holds them all.
        entries = [
            (slot, place, token, value)
            for slot, entries in zip(slots, lists, strict=True)
            for place, (token, value) in enumerate(entries)
        ]
        if entries:
            columns_4E = upload(np.array(entries, dtype=np.float64).T, self.ids_SW.device)
            slot_E, place_E, id_E = columns_4E[:3].long().unbind(0)
            self.ids_SW[slot_E, place_E] = id_E
            self.values_SW[slot_E, place_E] = columns_4E[3]
