"""Processing of logits rows in vLLM's order, in plain torch.

The grammar and the mask token forbid, ``min_tokens`` bans stops, logit bias, penalties (repetition, frequency, presence),
temperature, min-p, top-k, top-p. Shape suffixes as in ``kernels.process_logits.metadata``.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kernels.process_logits.metadata import Penalties, RowSampling


def process_logits(logits_QV: Tensor, sampling: RowSampling, mask_token_id: int | None) -> Tensor:
    """The logits whose softmax is the distribution to sample from, in float32 (float64 for float64 logits).

    Temperature and truncation leave greedy rows alone. The mask token can be neither sampled nor drafted.
    """
    logits = forbid_and_bias(logits_QV, sampling, mask_token_id)
    needs = sampling.needs
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


def forbid_and_bias(logits_QV: Tensor, sampling: RowSampling, mask_token_id: int | None) -> Tensor:
    """The first half of processing: what is forbidden at -inf, and logit bias added; float32 or float64 as above."""
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


def _min_p(logits: Tensor, min_p: Tensor) -> Tensor:
    """Drop tokens less likely than ``min_p`` times the likeliest one (Nguyen et al., arXiv 2407.01082)."""
    threshold = logits.amax(dim=-1) + min_p.log().to(logits.dtype)
    return logits.masked_fill(logits < threshold[:, None], float("-inf"))


def _top_k_top_p(logits: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Keep the ``top_k`` largest (0: all), then the smallest set of those whose probability reaches ``top_p``.

    Tokens that tie with the last one kept by top-k stay, as in vLLM. Of tokens that tie at the end of top-p the first ids
    stay. The likeliest token always stays.
    """
    ordered = _descending(logits)
    vocab_size = logits.shape[-1]
    last = torch.where(top_k > 0, top_k, vocab_size).clamp(max=vocab_size) - 1
    kth = ordered.gather(-1, last[:, None])
    probs = ordered.masked_fill(ordered < kth, float("-inf")).softmax(dim=-1)
    # The float32 sum inside of a softmax of 100,000 tokens is off by the probability of several: they need not add up to 1.
    until = probs.cumsum(dim=-1)
    # A row with top_p 1 keeps everything, whatever the rounding of the sum.
    stays = (until - probs < top_p[:, None].to(probs.dtype) * until[:, -1:]) | (top_p >= 1)[:, None]
    stays[:, 0] = True
    threshold = torch.maximum(ordered.gather(-1, stays.sum(dim=-1, keepdim=True) - 1), kth)
    num_ties = (stays & (ordered == threshold)).sum(dim=-1, keepdim=True)
    is_tie = logits == threshold
    keep = (logits > threshold) | (is_tie & (is_tie.cumsum(dim=-1, dtype=torch.int32) <= num_ties))
    return logits.masked_fill(~keep, float("-inf"))


def _descending(logits: Tensor) -> Tensor:
    """Every row's values in descending order. On a CPU NumPy sorts, which is several times as fast without the indices."""
    if logits.device.type == "cpu":
        return torch.from_numpy(np.sort(logits.numpy(), axis=-1)).flip(-1)
    return logits.sort(dim=-1, descending=True).values
