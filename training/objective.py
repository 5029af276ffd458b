"""The TiDAR training objective: one doubled sequence teaches both readings (arXiv 2511.08923, section 3.1).

A sequence is its clean tokens followed by mask blocks. The clean half is plain causal. Block ``b`` that starts at position
``s`` sees the clean tokens ``0..s-1`` and all of itself, both ways. Clean rows predict the next token, mask rows the token at
their own position: ``(alpha * CE_next + CE_same) / (1 + alpha)``. The mask is the step's own, ``kernels.mask_layout``.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.models.transformer import Transformer
from kernels.mask_layout import CLEAN, visible

IGNORE = -100


@dataclass(frozen=True, slots=True)
class Example:
    """One conversation: token ids, and where the answer begins (everything before it is prompt and not learnt)."""

    token_ids: tuple[int, ...]
    answer_start: int


@dataclass(frozen=True, slots=True)
class Batch:
    """A padded batch of doubled sequences, all of shape [B, T]; ``num_clean`` columns are clean, the rest masks."""

    token_ids: Tensor
    positions: Tensor
    limit: Tensor
    branch: Tensor
    targets: Tensor
    num_clean: int


@dataclass(frozen=True, slots=True)
class Loss:
    """The combined loss and its two parts, each a mean over its own targets."""

    total: Tensor
    next_token: Tensor
    same_position: Tensor


def block_starts(example: Example, block_length: int, rng: random.Random) -> list[int]:
    """Start positions of the mask blocks: one at the answer's start, the others tiled from a random offset behind it.

    At inference a block starts wherever the last accepted draft ended, so every offset has to be seen in training.
    """
    first = example.answer_start
    offset = first + rng.randint(1, block_length)
    return [first, *range(offset, len(example.token_ids), block_length)]


def make_batch(examples: Sequence[Example], starts: Sequence[Sequence[int]], block_length: int, mask_token_id: int) -> Batch:
    """Lay out examples and their mask blocks. Every block is whole, also past the end, where its targets are ignored."""
    num_clean = max(len(e.token_ids) for e in examples)
    num_blocks = max(len(s) for s in starts)
    size, width = len(examples), num_clean + num_blocks * block_length
    token_ids = torch.full((size, width), mask_token_id)
    positions = torch.zeros((size, width), dtype=torch.long)
    limit = torch.zeros((size, width), dtype=torch.long)
    branch = torch.full((size, width), CLEAN)
    targets = torch.full((size, width), IGNORE)
    clean = torch.arange(num_clean)
    in_block = torch.arange(block_length)
    positions[:, :num_clean] = clean
    limit[:, :num_clean] = clean + 1
    branch[:, num_clean:] = torch.arange(num_blocks).repeat_interleave(block_length)
    for row, (example, example_starts) in enumerate(zip(examples, starts, strict=True)):
        ids = torch.tensor(example.token_ids)
        length = len(ids)
        token_ids[row, :length] = ids
        targets[row, example.answer_start - 1 : length - 1] = ids[example.answer_start :]
        for block, start in enumerate(example_starts):
            columns = slice(num_clean + block * block_length, num_clean + (block + 1) * block_length)
            positions[row, columns] = start + in_block
            limit[row, columns] = start
            inside = min(block_length, length - start)
            targets[row, columns.start : columns.start + inside] = ids[start : start + inside]
    return Batch(token_ids, positions, limit, branch, targets, num_clean)


class MaskedAttention:
    """Attention of a padded batch under the compact mask; there is no cache."""

    def __init__(self, batch: Batch) -> None:
        self.shape = batch.token_ids.shape
        self.mask = visible(batch.limit, batch.branch).unsqueeze(1)

    def __call__(self, layer: int, q_RHD: Tensor, k_RGD: Tensor, v_RGD: Tensor) -> Tensor:
        q, k, v = (t.unflatten(0, self.shape).transpose(1, 2) for t in (q_RHD, k_RGD, v_RGD))
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)
        return out.transpose(1, 2).flatten(0, 1)


def hidden_states(model: Transformer, batch: Batch) -> Tensor:
    """Final hidden states of all rows, [B * T, E]."""
    return model(batch.token_ids.flatten(), batch.positions.flatten(), MaskedAttention(batch))


def loss(model: Transformer, batch: Batch, alpha: float = 1.0) -> Loss:
    """The dual loss of a batch. The head runs only on rows that have a target."""
    targets = batch.targets.flatten()
    wanted = (targets != IGNORE).nonzero().squeeze(-1)
    logits = model.logits(hidden_states(model, batch)[wanted]).float()
    losses = F.cross_entropy(logits, targets[wanted], reduction="none")
    clean = (wanted % batch.token_ids.shape[1]) < batch.num_clean
    next_token, same_position = losses[clean].mean(), losses[~clean].mean()
    return Loss((alpha * next_token + same_position) / (1 + alpha), next_token, same_position)
