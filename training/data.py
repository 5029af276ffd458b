"""Turns question and answer pairs into training examples, with the variety a chat client brings."""

from __future__ import annotations

import random
from collections.abc import Callable

from tokenizers import Tokenizer

from training.objective import Example
from training.tokenizer import ASSISTANT, END, SYSTEM, USER

Sample = Callable[[random.Random], tuple[str, str]]
"""Draws one (question, answer) pair."""

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful assistant",
    "You are a helpful AI assistant.",
    "You are a Python expert.",
    "You are an assistant for the Python standard library.",
    "Answer briefly.",
    "Be concise.",
    "You are a friendly coding assistant. Answer questions about Python.",
)


class Conversations:
    """Encodes conversations exactly as the chat template does."""

    def __init__(self, tokenizer: Tokenizer, sample: Sample, max_length: int = 256) -> None:
        self.tokenizer, self.sample, self.max_length = tokenizer, sample, max_length

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def turn(self, question: str) -> list[int]:
        """A user turn, up to and with the token after which the assistant speaks."""
        return [USER, *self.encode(question), END, ASSISTANT]

    def example(self, question: str, answer: str, prefix: list[int] | None = None) -> Example:
        """One question and its answer behind an optional prefix of earlier turns."""
        prompt = [*(prefix or []), *self.turn(question)]
        return Example((*prompt, *self.encode(answer), END), len(prompt))

    def draw(self, rng: random.Random) -> Example:
        """A random conversation: sometimes with a system prompt, sometimes after earlier turns."""
        while True:
            prefix: list[int] = []
            if rng.random() < 0.15:
                prefix += [SYSTEM, *self.encode(rng.choice(SYSTEM_PROMPTS)), END]
            if rng.random() < 0.12:
                question, answer = self.sample(rng)
                prefix += [*self.turn(question), *self.encode(answer), END]
            example = self.example(*self.sample(rng), prefix)
            if len(example.token_ids) <= self.max_length:
                return example


def draw_batch(conversations: Conversations, rows: int, rng: random.Random) -> list[Example]:
    """Draw examples and keep a window of similar lengths, so that little of a batch is padding."""
    pool = sorted((conversations.draw(rng) for _ in range(4 * rows)), key=lambda e: len(e.token_ids))
    start = rng.randrange(0, 4) * rows
    return pool[start : start + rows]
