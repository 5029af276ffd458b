"""The diffusion family: blocks of masks that are decided by confidence (block diffusion, arXiv 2503.09573). Lossy.

A request's block stands behind its tokens, all of its masks at once. Every step decides the masks whose likeliest token (or
sampled one, at a temperature) has a probability above the threshold, and always the most confident one; decided tokens take
their mask's place in the next step. When all are decided the block is emitted, and the next step computes its K/V causally,
as drafts that nobody questions, beside the masks of the block that follows. So a block costs as many forwards as it takes to
decide it, and nothing of it is verified: this is the baseline of the TiDAR paper, not one of the exact modes.

Shape suffixes: N requests, K masks of a block, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Block:
    """Blocks after one more forward: their tokens [N, K], which of them are decided, and which blocks are complete."""

    tokens_NK: Tensor
    is_decided_NK: Tensor
    is_complete_N: Tensor


def decide(
    tokens_NK: Tensor, is_decided_NK: Tensor, candidates_NK: Tensor, confidence_NK: Tensor, length_N: Tensor, threshold: float
) -> Block:
    """Decide masks: those with a confidence of at least ``threshold``, and the most confident one.

    ``candidates`` are the tokens sampled at the masks, ``confidence`` their probabilities. Blocks are ``length`` long.
    """
    in_block_NK = torch.arange(tokens_NK.shape[1], device=tokens_NK.device) < length_N[:, None]
    is_open_NK = in_block_NK & ~is_decided_NK
    confidence_NK = confidence_NK.masked_fill(~is_open_NK, -1.0)
    is_best_NK = torch.zeros_like(is_open_NK).scatter_(1, confidence_NK.argmax(dim=1, keepdim=True), True)
    takes_NK = is_open_NK & (is_best_NK | (confidence_NK >= threshold))
    is_decided_NK = is_decided_NK | takes_NK
    return Block(
        torch.where(takes_NK, candidates_NK, tokens_NK),
        is_decided_NK,
        (is_decided_NK | ~in_block_NK).all(dim=1),
    )
