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
from torch.nn import functional as F

from engine.decode.inputs import StepInputs
from engine.decode.sampling import DrawDrafts
from engine.input_batch import InputBatch


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


@dataclass(frozen=True, slots=True)
class Denoised:
    """What a forward did for diffusion requests: tokens [N, K] of which ``num_emitted`` are emitted, and the drafts to come."""

    tokens_NK: Tensor
    num_emitted_N: Tensor
    drafts_NK: Tensor
    num_held_N: Tensor


def denoise(batch: InputBatch, inputs: StepInputs, logits_QV: Tensor, draw: DrawDrafts, threshold: float) -> Denoised:
    """Judge one forward of the diffusion blocks and write their state; rows of other requests are meaningless."""
    layout, slot_N = inputs.layout, inputs.slot_N
    width, max_block = batch.drafts_SK.shape[1], layout.max_block
    remaining_N = batch.num_held_S[slot_N] - inputs.num_drafts_N
    places_NK = torch.arange(width, device=slot_N.device) + inputs.num_drafts_N[:, None]
    drafts_NK = batch.drafts_SK[slot_N].gather(1, places_NK.clamp(max=width - 1))
    if layout.max_branches == 0:
        return Denoised(drafts_NK, torch.zeros_like(slot_N), drafts_NK, remaining_N)
    # A block is only decided on top of all that was emitted; a short plan may have left drafts for the next step.
    is_active_N = (inputs.most_branches_N > 0) & (remaining_N == 0) & batch.is_diffusion_S[slot_N]
    number_K = torch.arange(max_block, device=slot_N.device)
    positions_NK = (inputs.attention.prefix_lengths + layout.num_prefill_N + inputs.num_drafts_N)[:, None] + number_K
    candidates_Q, confidence_Q = draw(
        inputs.needs,
        logits_QV,
        layout.masks_NBK[:, 0].flatten(),
        slot_N.repeat_interleave(max_block),
        number_K.repeat(len(slot_N)) + 1,
        positions_NK.flatten(),
    )
    block = decide(
        batch.block_SK[slot_N, :max_block],
        batch.is_decided_SK[slot_N, :max_block],
        candidates_Q.view(-1, max_block),
        confidence_Q.view(-1, max_block),
        layout.block_length_N,
        threshold,
    )
    is_complete_N = block.is_complete_N & is_active_N
    is_decided_NK = torch.where(is_active_N[:, None], block.is_decided_NK, batch.is_decided_SK[slot_N, :max_block])
    batch.block_SK[slot_N, :max_block] = torch.where(is_active_N[:, None], block.tokens_NK, batch.block_SK[slot_N, :max_block])
    batch.is_decided_SK[slot_N, :max_block] = is_decided_NK & ~is_complete_N[:, None]
    tokens_NK = F.pad(block.tokens_NK, (0, width - max_block))
    return Denoised(
        tokens_NK,
        torch.minimum(layout.block_length_N, batch.wanted_S[slot_N]) * is_complete_N,
        torch.where(is_complete_N[:, None], tokens_NK, drafts_NK),
        torch.where(is_complete_N, layout.block_length_N, remaining_N),
    )
