"""What gpt-fast's ``generate`` takes and gives."""

from __future__ import annotations

import torch


def decode_one_token() -> None:
    raise AssertionError("the benchmark compiles it, and calls only generate")


def generate(model, prompt, max_new_tokens, batch_size, *, interactive, draft_model, temperature, top_k):
    assert prompt.dtype == torch.int
    assert (batch_size, interactive, draft_model) == (1, False, None)
    assert top_k <= model.config.vocab_size
    made = torch.zeros(batch_size, len(prompt) + max_new_tokens, dtype=prompt.dtype)
    for _ in range(max_new_tokens):
        model.output(torch.ones(400, model.config.dim))
    return made, {}
