"""Counts and measurements of one request, as they go into its answer."""

from __future__ import annotations

from server.generation import Generation
from server.protocol import PromptTokensDetails, ResponseMetrics, SpeculativeDecoding, Usage


def usage_of(generation: Generation) -> Usage:
    """Tokens so far. Of a prompt's choices the first tells what was cached: the others find what it left there."""
    first_of_prompt = {choice.plan.prompt_index: choice for choice in reversed(generation.choices)}
    prompt_tokens = sum(len(choice.plan.prompt_token_ids) for choice in first_of_prompt.values())
    cached_tokens = sum(choice.num_cached_tokens for choice in first_of_prompt.values())
    completion_tokens = sum(choice.completion_tokens for choice in generation.choices)
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=cached_tokens),
    )


def metrics_of(generation: Generation) -> ResponseMetrics:
    """What drafting did, summed over the choices."""
    stats = [choice.speculation for choice in generation.choices]
    spec_steps = sum(s.num_spec_steps for s in stats)
    draft_tokens = sum(s.num_draft_tokens for s in stats)
    accepted = sum(s.num_accepted_draft_tokens for s in stats)
    later_tokens = sum(max(choice.completion_tokens - 1, 0) for choice in generation.choices)
    later_forwards = sum(max(s.num_forwards - 1, 0) for s in stats)
    return ResponseMetrics(
        speculative_decoding=SpeculativeDecoding(
            mean_acceptance_length=1 + accepted / spec_steps if spec_steps else None,
            draft_acceptance_rate=accepted / draft_tokens if draft_tokens else None,
            num_spec_steps=spec_steps,
            num_draft_tokens=draft_tokens,
            num_accepted_draft_tokens=accepted,
            tokens_per_forward=later_tokens / later_forwards if later_forwards else None,
        )
    )
