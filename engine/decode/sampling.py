"""From logits to tokens: processing, and the noise that drafts and verification share. Pure functions.

The order of processing is vLLM's: the mask token is forbidden, temperature, min-p, top-k, top-p. Draft logits go through the
very same processing and, at the same position, get the very same noise, so a draft differs from the token that verification
takes only where the two distributions differ (arXiv 2408.07978).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.input_batch import InputBatch, SamplingNeeds
from kernels.philox.reference import gumbel


@dataclass(frozen=True, slots=True)
class RowSampling:
    """Sampling parameters of Q rows, one entry a row; of a greedy batch, which reads none of them, there are none."""

    needs: SamplingNeeds
    seed: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor


def row_sampling(batch: InputBatch, slots_Q: Tensor, needs: SamplingNeeds) -> RowSampling:
    """The parameters of the rows' slots."""
    if not needs.noise:
        none = slots_Q[:0]
        return RowSampling(needs, none, none, none, none, none)
    return RowSampling(
        needs,
        batch.seed_S[slots_Q],
        batch.temperature_S[slots_Q],
        batch.top_k_S[slots_Q],
        batch.top_p_S[slots_Q],
        batch.min_p_S[slots_Q],
    )


def process_logits(logits_QV: Tensor, sampling: RowSampling, mask_token_id: int | None) -> Tensor:
    """The logits whose softmax is the distribution to sample from, in float32 (float64 for float64 logits).

    Greedy rows are left alone but for the mask token, which can be neither sampled nor drafted.
    """
    logits = logits_QV.to(torch.promote_types(logits_QV.dtype, torch.float32))
    if mask_token_id is not None:
        logits = logits.clone() if logits is logits_QV else logits
        logits[:, mask_token_id] = float("-inf")
    needs = sampling.needs
    if not needs.noise:
        return logits
    greedy = sampling.temperature == 0
    scale = torch.where(greedy, 1.0, sampling.temperature).to(logits.dtype)
    logits = logits / scale[:, None]
    if needs.min_p:
        logits = _min_p(logits, torch.where(greedy, 0.0, sampling.min_p))
    if needs.top_k or needs.top_p:
        logits = _top_k_top_p(logits, torch.where(greedy, 0, sampling.top_k), torch.where(greedy, 1.0, sampling.top_p))
    return logits


def sample(processed_QV: Tensor, sampling: RowSampling, position_Q: Tensor) -> Tensor:
    """``argmax(processed + Gumbel(seed, position, token))``, an exact sample of the softmax; plain argmax for greedy rows.

    ``position_Q`` is that of the token being sampled.
    """
    if not sampling.needs.noise:
        return processed_QV.argmax(dim=-1)
    noise = gumbel(sampling.seed, position_Q, processed_QV.shape[-1], processed_QV.dtype)
    noise = noise.masked_fill_((sampling.temperature == 0)[:, None], 0.0)
    return (processed_QV + noise).argmax(dim=-1)


def probability_of(processed_QV: Tensor, token_Q: Tensor) -> Tensor:
    """Softmax probability of the given tokens, without noise, as float32."""
    chosen = processed_QV.gather(-1, token_Q[:, None]).squeeze(-1)
    return (chosen - processed_QV.logsumexp(dim=-1)).exp().float()


def _min_p(logits: Tensor, min_p: Tensor) -> Tensor:
    """Drop tokens less likely than ``min_p`` times the likeliest one (Nguyen et al., arXiv 2407.01082)."""
    threshold = logits.amax(dim=-1) + min_p.log().to(logits.dtype)
    return logits.masked_fill(logits < threshold[:, None], float("-inf"))


def _top_k_top_p(logits: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Keep the ``top_k`` largest (0: all), then the smallest set of those whose probability reaches ``top_p``.

    Tokens that tie with the last one kept by top-k stay, as in vLLM. The likeliest token always stays.
    """
    ordered, order = logits.sort(dim=-1, descending=True)
    vocab_size = logits.shape[-1]
    last = torch.where(top_k > 0, top_k, vocab_size).clamp(max=vocab_size) - 1
    ordered = ordered.masked_fill(ordered < ordered.gather(-1, last[:, None]), float("-inf"))
    probs = ordered.softmax(dim=-1)
    before = probs.cumsum(dim=-1) - probs
    # A row with top_p 1 keeps everything, whatever the rounding of the sum.
    drop = (before >= top_p[:, None].to(probs.dtype)) & (top_p < 1)[:, None]
    drop[:, 0] = False
    ordered = ordered.masked_fill(drop, float("-inf"))
    return torch.empty_like(logits).scatter_(-1, order, ordered)
