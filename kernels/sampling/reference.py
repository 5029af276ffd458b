"""From logits to tokens with the noise that drafts and verification share, in plain torch.

Draft logits go through the very same processing as verifying ones and, at the same position, get the very same noise, so a
draft differs from the token that verification takes only where the two distributions differ (arXiv 2408.07978).
"""

from __future__ import annotations

from torch import Tensor

from kernels.philox.reference import gumbel
from kernels.process_logits.metadata import RowSampling
from kernels.process_logits.reference import process_logits


def sample_tokens(
    logits_RV: Tensor, place_Q: Tensor | None, sampling: RowSampling, position_Q: Tensor, mask_token_id: int | None
) -> Tensor:
    """The token that each of Q rows takes, [Q].

    Row ``i`` reads the logits in row ``place[i]``, or row ``i`` for None; where that is -1 the result is meaningless, but a
    token. ``position_Q`` is that of the token being sampled.
    """
    processed_QV = process_logits(logits_RV if place_Q is None else logits_RV[place_Q], sampling, mask_token_id)
    return sample(processed_QV, sampling, position_Q)


def sample_drafts(
    logits_RV: Tensor,
    place_Q: Tensor | None,
    sampling: RowSampling,
    position_Q: Tensor,
    mask_token_id: int | None,
    draft_temperature: float | None,
) -> tuple[Tensor, Tensor]:
    """Like ``sample_tokens`` at the draft temperature (see ``sample``), with each token's probability: [Q] and [Q] float32."""
    processed_QV = process_logits(logits_RV if place_Q is None else logits_RV[place_Q], sampling, mask_token_id)
    token_Q = sample(processed_QV, sampling, position_Q, draft_temperature)
    return token_Q, probability_of(processed_QV, token_Q)


def sample(processed_QV: Tensor, sampling: RowSampling, position_Q: Tensor, draft_temperature: float | None = None) -> Tensor:
    """``argmax(processed + Gumbel(seed, position, token))``, an exact sample of the softmax; plain argmax for greedy rows.

    Ties go to the lowest token id. ``draft_temperature`` replaces the requests' own for drafts, after the truncation, which
    stays theirs: logits over ``T`` with noise times ``D / T`` have the argmax of logits over ``D`` with it.
    """
    if not sampling.needs.noise or draft_temperature == 0:
        return processed_QV.argmax(dim=-1)
    noise = gumbel(sampling.seed, position_Q, processed_QV.shape[-1], processed_QV.dtype)
    if draft_temperature is not None:
        noise *= (draft_temperature / sampling.temperature).to(noise.dtype)[:, None]
    noise = noise.masked_fill_((sampling.temperature == 0)[:, None], 0.0)
    return (processed_QV + noise).argmax(dim=-1)


def probability_of(processed_QV: Tensor, token_Q: Tensor) -> Tensor:
    """Softmax probability of the given tokens, without noise, as float32."""
    chosen = processed_QV.gather(-1, token_Q[:, None]).squeeze(-1)
    return (chosen - processed_QV.logsumexp(dim=-1)).exp().float()
