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
    """What a forward did for diffusion requests: tokens [N, K] of which ``num_emitted`` are emitted, and what comes of it.

    ``num_wanted``, ``drafts`` and ``num_held`` are those that the next step finds.
    """

    tokens_NK: Tensor
    num_emitted_N: Tensor
    num_wanted_N: Tensor
    drafts_NK: Tensor
    num_held_N: Tensor

    def replace(self, batch: InputBatch, inputs: StepInputs, packed: Tensor) -> Tensor:
        """A verdict's ``packed`` result with the rows of diffusion requests.

        Their drafts have been emitted: nothing was verified, and all of them are committed.
        """
        num_drafts_N = inputs.num_drafts_N
        counts_N4 = torch.stack((self.num_emitted_N, torch.zeros_like(num_drafts_N), self.num_held_N, num_drafts_N), dim=1)
        own = torch.cat((counts_N4, self.tokens_NK), dim=1)
        width = max(packed.shape[1], own.shape[1])
        own, packed = F.pad(own, (0, width - own.shape[1])), F.pad(packed, (0, width - packed.shape[1]))
        return torch.where(batch.is_diffusion_S[inputs.slot_N][:, None], own, packed)

    def write(self, batch: InputBatch, inputs: StepInputs) -> None:
        """Put the progress of diffusion requests in the place of what a verdict wrote for them."""
        slot_N = inputs.slot_N
        is_theirs_N = batch.is_diffusion_S[slot_N]
        computed_N = inputs.attention.prefix_lengths + inputs.layout.num_prefill_N + inputs.num_drafts_N
        for column_S, values_N in (
            (batch.num_computed_S, computed_N),
            (batch.wanted_S, self.num_wanted_N),
            (batch.num_held_S, self.num_held_N),
        ):
            column_S[slot_N] = torch.where(is_theirs_N, values_N, column_S[slot_N])
        batch.drafts_SK[slot_N] = torch.where(is_theirs_N[:, None], self.drafts_NK, batch.drafts_SK[slot_N])


def denoise(batch: InputBatch, inputs: StepInputs, logits_QV: Tensor, draw: DrawDrafts, threshold: float) -> Denoised:
    """Judge one forward of the diffusion blocks and write those; rows of other requests are meaningless."""
    layout, slot_N = inputs.layout, inputs.slot_N
    width, max_block = batch.drafts_SK.shape[1], layout.max_block
    remaining_N = batch.num_held_S[slot_N] - inputs.num_drafts_N
    places_NK = torch.arange(width, device=slot_N.device) + inputs.num_drafts_N[:, None]
    drafts_NK = batch.drafts_SK[slot_N].gather(1, places_NK.clamp(max=width - 1))
    if layout.max_branches == 0:
        return Denoised(drafts_NK, torch.zeros_like(slot_N), batch.wanted_S[slot_N], drafts_NK, remaining_N)
    # A block is only decided on top of all that was emitted; a short plan may have left drafts for the next step.
    is_active_N = (inputs.most_branches_N > 0) & (remaining_N == 0) & batch.is_diffusion_S[slot_N]
    number_K = torch.arange(max_block, device=slot_N.device)
    positions_NK = (inputs.attention.prefix_lengths + layout.num_prefill_N + inputs.num_drafts_N)[:, None] + number_K
    candidates_Q, confidence_Q = draw(
        inputs.needs,
        logits_QV,
        layout.masks_NBK[:, 0].flatten(),
        slot_N.repeat_interleave(max_block),
        number_K.repeat(len(slot_N)),
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
    tokens_NK, wanted_N = F.pad(block.tokens_NK, (0, width - max_block)), batch.wanted_S[slot_N]
    num_emitted_N = torch.minimum(layout.block_length_N, wanted_N) * is_complete_N
    return Denoised(
        tokens_NK,
        num_emitted_N,
        wanted_N - num_emitted_N,
        torch.where(is_complete_N[:, None], tokens_NK, drafts_NK),
        torch.where(is_complete_N, layout.block_length_N, remaining_N),
    )
