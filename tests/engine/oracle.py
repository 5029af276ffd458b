"""Plain autoregressive decoding without the engine: what every exact mode must produce, token for token.

Deliberately simple: all tokens are run again for every new one, attention is written out, the distribution is processed with
Python floats, and a grammar is walked from its start for every token. Of the engine it uses the model's layers and the noise,
nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engine.messages import FinishReason, GenerateRequest, GrammarSpec, TokenLogprobs
from engine.models.transformer import Transformer
from engine.sampling_params import SamplingParams
from kernels.philox.reference import gumbel

if TYPE_CHECKING:
    from llguidance import LLTokenizer


@dataclass(frozen=True)
class Answer:
    """What a client can see of a finished request."""

    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_token_id: int | None
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


class DenseCausalAttention:
    """Every row sees itself and the rows before it; nothing is cached."""

    def __call__(self, layer: int, q_RHD: Tensor, k_RGD: Tensor, v_RGD: Tensor) -> Tensor:
        copies = q_RHD.shape[1] // k_RGD.shape[1]
        k_RHD, v_RHD = k_RGD.repeat_interleave(copies, dim=1), v_RGD.repeat_interleave(copies, dim=1)
        scores_HRR = torch.einsum("rhd,shd->hrs", q_RHD, k_RHD) / math.sqrt(q_RHD.shape[-1])
        future = torch.ones(scores_HRR.shape[1:], dtype=torch.bool).triu(1)
        weights_HRR = scores_HRR.masked_fill(future, -math.inf).softmax(dim=-1)
        return torch.einsum("hrs,shd->rhd", weights_HRR, v_RHD)


def all_logits(model: Transformer, token_ids: list[int], last: int = 0) -> list[list[float]]:
    """Raw logits of the token that follows each token, or each of the ``last`` ones."""
    with torch.inference_mode():
        hidden = model(torch.tensor(token_ids), torch.arange(len(token_ids)), DenseCausalAttention())
        logits: list[list[float]] = model.logits(hidden[-last:]).tolist()
    return logits


def next_token_logits(model: Transformer, token_ids: list[int]) -> list[float]:
    """Raw logits of the token that follows all of them."""
    return all_logits(model, token_ids, last=1)[-1]


@dataclass(frozen=True)
class Context:
    """What besides the sampling parameters shapes a distribution."""

    prompt: list[int]
    output: list[int]
    eos: frozenset[int] = frozenset()
    mask_token_id: int | None = None
    allowed: frozenset[int] | None = None


def processed(logits: list[float], sampling: SamplingParams, context: Context) -> list[float]:
    """The logits whose softmax a token is drawn from, in vLLM's order."""
    scores = [-math.inf if token == context.mask_token_id else logit for token, logit in enumerate(logits)]
    if context.allowed is not None:
        scores = _keep(scores, [token in context.allowed for token in range(len(scores))])
    if len(context.output) < sampling.min_tokens:
        stops = context.eos | set(sampling.stop_token_ids)
        without_stops = _keep(scores, [token not in stops for token in range(len(scores))])
        scores = without_stops if max(without_stops) > -math.inf else scores
    for token, bias in sampling.logit_bias:
        scores[token] += bias
    scores = [_penalised(token, score, sampling, context) for token, score in enumerate(scores)]
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


def _penalised(token: int, score: float, sampling: SamplingParams, context: Context) -> float:
    count = context.output.count(token)
    if count or token in context.prompt:
        score = score / sampling.repetition_penalty if score > 0 else score * sampling.repetition_penalty
    score -= sampling.frequency_penalty * count
    return score - sampling.presence_penalty * (count > 0)


def allowed_tokens(
    spec: GrammarSpec, output: list[int], eos: frozenset[int], vocab_size: int, tokenizer: LLTokenizer
) -> frozenset[int] | None:
    """What a grammar lets follow; None: everything."""
    everything, thinking, rest = frozenset(range(vocab_size)), spec.thinking, list(output)
    may_think = thinking is not None and not thinking.is_open and not rest
    if thinking is not None and (thinking.is_open or rest[:1] == [thinking.begin]):
        if thinking.end not in rest:
            return everything - eos
        rest = rest[rest.index(thinking.end) + 1 :]
    from llguidance import LLMatcher

    matcher = LLMatcher(tokenizer, spec.source)
    for token in rest:
        assert matcher.consume_token(token), f"{output} does not follow the grammar"
    mask = int.from_bytes(matcher.compute_bitmask(), "little")
    allowed = {token for token in range(vocab_size) if mask >> token & 1}
    if may_think and thinking is not None and thinking.begin is not None:
        allowed.add(thinking.begin)
    return frozenset(allowed)


def token_logprobs(logits: list[float], token: int, num_top: int) -> TokenLogprobs:
    """Raw log-probabilities of one position."""
    top = max(logits)
    total = top + math.log(sum(math.exp(x - top) for x in logits))
    order = sorted(range(len(logits)), key=lambda t: -logits[t])
    pairs = tuple((t, logits[t] - total) for t in order[:num_top])
    return TokenLogprobs(token, logits[token] - total, order.index(token) + 1, pairs)


def noisy_scores(scores: list[float], sampling: SamplingParams, position: int) -> list[float]:
    """Scores plus the noise of this position; the largest one is the sample."""
    if sampling.temperature == 0.0:
        return scores
    seed = sampling.seed - 2**64 if sampling.seed >= 2**63 else sampling.seed
    noise = gumbel(torch.tensor([seed]), torch.tensor([position]), len(scores), torch.float64)[0].tolist()
    return [score + value for score, value in zip(scores, noise, strict=True)]


def context_of(
    model: Transformer, request: GenerateRequest, output: list[int], load_tokenizer: Callable[[], LLTokenizer]
) -> Context:
    """What shapes the distribution after this output."""
    config, spec = model.config, request.grammar
    eos, mask = frozenset(config.eos_token_ids), config.tidar.mask_token_id if config.tidar else None
    allowed = allowed_tokens(spec, output, eos, config.vocab_size, load_tokenizer()) if spec else None
    return Context(list(request.prompt_token_ids), output, eos, mask, allowed)


def tiny_tokenizer() -> LLTokenizer:
    """That of the tiny models. Its library is imported with the first grammar: tests without one need no such library."""
    from tests.engine.vocabulary import llg_tokenizer

    return llg_tokenizer()


def decode(model: Transformer, request: GenerateRequest, load_tokenizer: Callable[[], LLTokenizer] = tiny_tokenizer) -> Answer:
    """Run one request, one token a forward. The tokenizer is the one that its grammar is for."""
    sampling, prompt, config = request.sampling, list(request.prompt_token_ids), model.config
    eos = set(config.eos_token_ids)
    stops = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos and not request.grammar else eos)
    output: list[int] = []
    logprobs: list[TokenLogprobs] = []
    reason, stop = FinishReason.LENGTH, None
    while len(output) < sampling.max_tokens:
        logits = next_token_logits(model, prompt + output)
        scores = processed(logits, sampling, context_of(model, request, output, load_tokenizer))
        token = _argmax(noisy_scores(scores, sampling, position=len(prompt) + len(output)))
        if sampling.logprobs is not None:
            logprobs.append(token_logprobs(logits, token, sampling.logprobs))
        output.append(token)
        if token in stops:
            reason, stop = FinishReason.STOP, token
            break
    return Answer(tuple(output), reason, stop, tuple(logprobs), tuple(_of_prompt(model, prompt, sampling)))


def _of_prompt(model: Transformer, prompt: list[int], sampling: SamplingParams) -> list[TokenLogprobs]:
    if sampling.prompt_logprobs is None:
        return []
    rows = zip(all_logits(model, prompt), prompt[1:], strict=False)
    return [token_logprobs(logits, token, sampling.prompt_logprobs) for logits, token in rows]


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
