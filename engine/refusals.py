"""Why a request can never run."""

from __future__ import annotations

from engine.decode.policy import DraftPolicy
from engine.messages import GenerateRequest


def problem_with(message: GenerateRequest, policy: DraftPolicy, max_model_len: int) -> str | None:
    """A message for the client, or None."""
    tokens = len(message.prompt_token_ids)
    if tokens == 0:
        return "the prompt is empty: send at least one token"
    if tokens + message.sampling.max_tokens > max_model_len:
        return (
            f"the prompt has {tokens} tokens and {message.sampling.max_tokens} more are wanted, but the context holds "
            f"{max_model_len}: shorten the prompt or lower max_tokens"
        )
    return None if policy.verifies else diffusion_problem(message)


def diffusion_problem(message: GenerateRequest) -> str | None:
    """Why a request cannot be decoded by diffusion, if so: nothing verifies its tokens one after the other."""
    sampling = message.sampling
    for name, is_asked in (
        ("a grammar", message.grammar is not None),
        ("a penalty", sampling.has_penalties),
        ("min_tokens", sampling.min_tokens > 0),
        ("logprobs", sampling.logprobs is not None),
    ):
        if is_asked:
            return f"{name} cannot be combined with decoding 'diffusion': leave it out or choose another mode"
    return None
