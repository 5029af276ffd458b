"""From logits to tokens: processing, and the noise that drafts and verification share. Pure functions.

The order of processing is vLLM's: the grammar and the mask token forbid, ``min_tokens`` bans stops, logit bias, penalties
(repetition, frequency, presence), temperature, min-p, top-k, top-p. Draft logits go through the very same processing and, at
the same position, get the very same noise, so a draft differs from the token that verification takes only where the two
distributions differ (arXiv 2408.07978).

Every row is processed as if the tokens before it in the step had been emitted. Shape suffixes: Q rows, V vocabulary, K tokens
that a row may take for emitted, W entries of the longest list, M words of a grammar mask, C rows under a grammar.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engine.input_batch import InputBatch, SamplingNeeds
from kernels.philox.reference import gumbel


@dataclass(frozen=True, slots=True)
class Ahead:
    """What each of Q rows takes for emitted beyond the slot's own tokens: ``num_Q`` tokens, the first of ``tokens_QK``.

    ``tokens_QK`` has no columns where the tokens are not known yet: then penalties do not count them.
    """

    num_Q: Tensor
    tokens_QK: Tensor


@dataclass(frozen=True, slots=True)
class GrammarRows:
    """The rows that a grammar constrains, [C], and their masks, [C, M] int32 words."""

    rows_C: Tensor
    mask_CM: Tensor


@dataclass(frozen=True, slots=True)
class Penalties:
    """Counts of the tokens said before each row, [Q, V], and the three penalties, [Q] each."""

    in_prompt_QV: Tensor
    output_QV: Tensor
    repetition: Tensor
    frequency: Tensor
    presence: Tensor


@dataclass(frozen=True, slots=True)
class RowSampling:
    """Sampling parameters of Q rows, one entry a row; what no row needs is None, or empty for a greedy batch."""

    needs: SamplingNeeds
    seed: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    grammar: GrammarRows | None = None
    banned: tuple[Tensor, Tensor] | None = None
    bias: tuple[Tensor, Tensor] | None = None
    penalties: Penalties | None = None


class DrawDrafts(Protocol):
    """Draws drafts from logits [Q, V]: their tokens and probabilities, [Q] each. ``number`` 1 is the first guess of a block."""

    def __call__(
        self,
        needs: SamplingNeeds,
        logits_QV: Tensor,
        slot_Q: Tensor,
        number_Q: Tensor,
        position_Q: Tensor,
        grammar: GrammarRows | None = None,
    ) -> tuple[Tensor, Tensor]: ...


def row_sampling(
    batch: InputBatch, slot_Q: Tensor, needs: SamplingNeeds, ahead: Ahead, grammar: GrammarRows | None = None
) -> RowSampling:
    """The parameters of the rows' slots, with what each row takes for emitted."""
    noisy_Q = slot_Q if needs.noise else slot_Q[:0]
    return RowSampling(
        needs,
        batch.seed_S[noisy_Q],
        batch.temperature_S[noisy_Q],
        batch.top_k_S[noisy_Q],
        batch.top_p_S[noisy_Q],
        batch.min_p_S[noisy_Q],
        grammar,
        _banned(batch, slot_Q, ahead) if needs.min_tokens else None,
        (batch.biases.ids_SW[slot_Q], batch.biases.values_SW[slot_Q]) if needs.bias else None,
        _penalties(batch, slot_Q, ahead) if needs.penalties else None,
    )


def _banned(batch: InputBatch, slot_Q: Tensor, ahead: Ahead) -> tuple[Tensor, Tensor]:
    is_early = batch.wanted_S[slot_Q] - ahead.num_Q > batch.stop_at_S[slot_Q]
    # Not a product: zero times infinity is not a number.
    values_QW = batch.stops.values_SW[slot_Q].masked_fill(~is_early[:, None], 0.0)
    return batch.stops.ids_SW[slot_Q], values_QW


def _penalties(batch: InputBatch, slot_Q: Tensor, ahead: Ahead) -> Penalties:
    counts = batch.counts
    assert counts is not None, "a request with penalties made the counts"
    return Penalties(
        counts.in_prompt_SV[slot_Q],
        counts.ahead(slot_Q, ahead.tokens_QK, ahead.num_Q),
        batch.repetition_S[slot_Q],
        batch.frequency_S[slot_Q],
        batch.presence_S[slot_Q],
    )


def process_logits(logits_QV: Tensor, sampling: RowSampling, mask_token_id: int | None) -> Tensor:
    """The logits whose softmax is the distribution to sample from, in float32 (float64 for float64 logits).

    Temperature and truncation leave greedy rows alone. The mask token can be neither sampled nor drafted.
    """
    logits = logits_QV.to(torch.promote_types(logits_QV.dtype, torch.float32))
    needs = sampling.needs
    is_written = mask_token_id is not None or sampling.grammar or needs.min_tokens or needs.bias
    if logits is logits_QV and is_written:
        logits = logits.clone()
    if mask_token_id is not None:
        logits[:, mask_token_id] = float("-inf")
    logits = _forbid(logits, sampling)
    if sampling.bias is not None:
        logits.scatter_add_(1, sampling.bias[0], sampling.bias[1].to(logits.dtype))
    if sampling.penalties is not None:
        logits = _penalise(logits, sampling.penalties)
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


def _forbid(logits: Tensor, sampling: RowSampling) -> Tensor:
    """Grammar, then banned stops. Where nothing but a stop is left the ban gives way: the grammar is complete."""
    if sampling.grammar is not None:
        rows_C, allowed_CV = sampling.grammar.rows_C, unpack_mask(sampling.grammar.mask_CM, logits.shape[-1])
        logits[rows_C] = logits[rows_C].masked_fill(~allowed_CV, float("-inf"))
    if sampling.banned is None:
        return logits
    banned = logits.scatter_add(1, sampling.banned[0], sampling.banned[1].to(logits.dtype))
    if sampling.grammar is None:
        return banned
    return torch.where(banned.amax(dim=-1, keepdim=True).isneginf(), logits, banned)


def unpack_mask(mask_CM: Tensor, vocab_size: int) -> Tensor:
    """Which tokens a mask allows, [C, V] booleans from [C, M] int32 words."""
    bits = torch.arange(32, dtype=torch.int32, device=mask_CM.device)
    return ((mask_CM[:, :, None] >> bits) & 1).bool().flatten(1)[:, :vocab_size]


def _penalise(logits: Tensor, penalties: Penalties) -> Tensor:
    """Repetition (Keskar et al., arXiv 1909.05858) of prompt and output; frequency and presence of the output, as OpenAI's."""
    said = penalties.in_prompt_QV | (penalties.output_QV > 0)
    repetition = penalties.repetition[:, None].to(logits.dtype)
    logits = torch.where(said, torch.where(logits > 0, logits / repetition, logits * repetition), logits)
    logits = logits - penalties.frequency[:, None].to(logits.dtype) * penalties.output_QV
    return logits - penalties.presence[:, None].to(logits.dtype) * (penalties.output_QV > 0)


def sample(processed_QV: Tensor, sampling: RowSampling, position_Q: Tensor, draft_temperature: float | None = None) -> Tensor:
    """``argmax(processed + Gumbel(seed, position, token))``, an exact sample of the softmax; plain argmax for greedy rows.

    ``position_Q`` is that of the token being sampled. ``draft_temperature`` replaces the requests' own for drafts, after the
    truncation, which stays theirs: logits over ``T`` with noise times ``D / T`` have the argmax of logits over ``D`` with it.
    """
    if not sampling.needs.noise or draft_temperature == 0:
        return processed_QV.argmax(dim=-1)
    noise = gumbel(sampling.seed, position_Q, processed_QV.shape[-1], processed_QV.dtype)
    if draft_temperature is not None:
        noise *= (draft_temperature / sampling.temperature)[:, None]
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
