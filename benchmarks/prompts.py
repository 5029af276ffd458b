"""Questions for the bundled model, as its chat template writes them."""

from __future__ import annotations

import random
from typing import Any

from benchmarks.stdlib_questions import load_held_out
from training.corpus.build import build_corpus


def prompt_sets(tokenizer: Any, count: int) -> dict[str, list[list[int]]]:
    """Known phrasings, drawn from the training grammar, and phrasings that training never saw; right names in both."""
    rng = random.Random(3)
    known = [question for question, _ in build_corpus().known_questions(count, seed=3)]
    held_out = [q.question for q in load_held_out()["close"] if q.intent != "refusal"]
    sets = {"known": known, "new": rng.sample(held_out, min(count, len(held_out)))}

    def encode(question: str) -> list[int]:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    return {name: [encode(q) for q in questions] for name, questions in sets.items()}
