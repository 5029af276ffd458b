"""Plain autoregressive decoding without the engine: what every exact mode must produce, token for token.

Deliberately simple: all tokens are run again for every new one, attention is written out, and the distribution is processed
with Python floats. Of the engine it uses the model's layers and the noise, nothing else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.messages import FinishReason, GenerateRequest
from engine.models.transformer import Transformer
from engine.sampling_params import SamplingParams
from kernels.philox.reference import gumbel


@dataclass(frozen=True)
class Answer:
    """What a client can see of a finished request."""

    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_token_id: int | None


class DenseCausalAttention:
    """Every row sees itself and the rows before it; nothing is cached."""

    def __call__(self, layer: int, q_RHD: Tensor, k_RGD: Tensor, v_RGD: Tensor) -> Tensor:
        copies = q_RHD.shape[1] // k_RGD.shape[1]
        k_RHD, v_RHD = k_RGD.repeat_interleave(copies, dim=1), v_RGD.repeat_interleave(copies, dim=1)
        scores_HRR = torch.einsum("rhd,shd->hrs", q_RHD, k_RHD) / math.sqrt(q_RHD.shape[-1])
        future = torch.ones(scores_HRR.shape[1:], dtype=torch.bool).triu(1)
        weights_HRR = scores_HRR.masked_fill(future, -math.inf).softmax(dim=-1)
        return torch.einsum("hrs,shd->rhd", weights_HRR, v_RHD)


def next_token_logits(model: Transformer, token_ids: list[int]) -> list[float]:
    """Raw logits of the token that follows."""
    with torch.inference_mode():
        hidden = model(torch.tensor(token_ids), torch.arange(len(token_ids)), DenseCausalAttention())
        logits: list[float] = model.logits(hidden[-1:])[0].tolist()
    return logits


def processed(logits: list[float], sampling: SamplingParams, mask_token_id: int | None) -> list[float]:
    """The logits whose softmax a token is drawn from, in the order temperature, min-p, top-k, top-p."""
    scores = [-math.inf if token == mask_token_id else logit for token, logit in enumerate(logits)]
    if sampling.temperature == 0.0:
        return scores
    scores = [score / sampling.temperature for score in scores]
    if sampling.min_p > 0.0:
        floor = sampling.min_p * _softmax(scores)[_argmax(scores)]
        scores = _keep(scores, [p >= floor for p in _softmax(scores)])
    if sampling.top_k:
        smallest = sorted(scores, reverse=True)[: sampling.top_k][-1]
        scores = _keep(scores, [score >= smallest for score in scores])
    if sampling.top_p < 1.0:
        scores = _nucleus(scores, sampling.top_p)
    return scores


def noisy_scores(scores: list[float], sampling: SamplingParams, position: int) -> list[float]:
    """Scores plus the noise of this position; the largest one is the sample."""
    if sampling.temperature == 0.0:
        return scores
    seed = sampling.seed - 2**64 if sampling.seed >= 2**63 else sampling.seed
    noise = gumbel(torch.tensor([seed]), torch.tensor([position]), len(scores), torch.float64)[0].tolist()
    return [score + value for score, value in zip(scores, noise, strict=True)]


def decode(model: Transformer, request: GenerateRequest) -> Answer:
    """Run one request, one token a forward."""
    sampling, tokens, config = request.sampling, list(request.prompt_token_ids), model.config
    stops = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else set(config.eos_token_ids))
    output: list[int] = []
    while len(output) < sampling.max_tokens:
        scores = processed(next_token_logits(model, tokens), sampling, config.tidar.mask_token_id if config.tidar else None)
        token = _argmax(noisy_scores(scores, sampling, position=len(tokens)))
        output.append(token)
        tokens.append(token)
        if token in stops:
            return Answer(tuple(output), FinishReason.STOP, token)
    return Answer(tuple(output), FinishReason.LENGTH, None)


def _softmax(scores: list[float]) -> list[float]:
    top = max(scores)
    weights = [math.exp(score - top) for score in scores]
    total = sum(weights)
    return [weight / total for weight in weights]


def _argmax(scores: list[float]) -> int:
    return max(range(len(scores)), key=scores.__getitem__)


def _keep(scores: list[float], kept: list[bool]) -> list[float]:
    return [score if keep else -math.inf for score, keep in zip(scores, kept, strict=True)]


def _nucleus(scores: list[float], top_p: float) -> list[float]:
    """The fewest tokens, likeliest first, whose probability reaches ``top_p``."""
    probs, total = _softmax(scores), 0.0
    kept = [False] * len(scores)
    for token in sorted(range(len(scores)), key=lambda t: -probs[t]):
        kept[token] = True
        total += probs[token]
        if total >= top_p:
            break
    return _keep(scores, kept)
