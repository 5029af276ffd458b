"""The held-out questions of the bundled model, written without sight of its training phrasings, and what a right answer is.

``python -m benchmarks.stdlib_questions`` prints how many the model answers rightly.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from training.corpus.build import Item, build_corpus

DATA = Path(__file__).parent / "data" / "stdlib_held_out.json"
REFUSALS = ("I only know", "I don't know that name")
_PREFIX = {"about": "about", "reverse": "reverse", "module": "module", "smalltalk": "smalltalk"}


@dataclass(frozen=True, slots=True)
class HeldOut:
    """A question, and the corpus item whose required strings a right answer contains; ``name`` is empty for a refusal."""

    question: str
    intent: str
    name: str


def load_held_out() -> dict[str, list[HeldOut]]:
    """The two sets, ``close`` and ``far`` paraphrases."""
    return {name: [HeldOut(**entry) for entry in entries] for name, entries in json.loads(DATA.read_text()).items()}


class Judge:
    """Tells right answers by the required and forbidden strings of the corpus."""

    def __init__(self) -> None:
        self.items: dict[str, Item] = {item.id: item for item in build_corpus().items}

    def is_right(self, question: HeldOut, answer: str) -> bool:
        """Every required string is there and no forbidden one; a refusal is right where nothing is known."""
        if question.intent == "refusal":
            return answer.startswith(REFUSALS)
        item = self.items[f"{_PREFIX[question.intent]}:{question.name}"]
        return all(s in answer for s in item.required) and not any(s in answer for s in item.forbidden)


def main() -> None:
    """Ask every question greedily through the engine and count."""
    import torch
    from transformers import AutoTokenizer

    from benchmarks.decode_modes import Engines, run_engine
    from engine.models.hf_config import read_model_config
    from engine.models.loader import load_model
    from engine.sampling_params import DecodingMode
    from kernels.backend import REFERENCE

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path(__file__).parents[1] / "server" / "bundled_model")
    parser.add_argument("--show", action="store_true", help="print the wrong answers")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = load_model(
        arguments.model, read_model_config(arguments.model), torch.float32, torch.device("cpu"), lambda m: None, REFERENCE
    )
    core = Engines(model).build(DecodingMode.TIDAR, None, None, 8)
    judge = Judge()
    for name, questions in load_held_out().items():
        prompts = []
        for q in questions:
            messages = [{"role": "user", "content": q.question}]
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            prompts.append(tokenizer(text, add_special_tokens=False)["input_ids"])
        sample, answers = run_engine(core, prompts)
        right: Counter[str] = Counter()
        for q, tokens in zip(questions, answers, strict=True):
            answer = tokenizer.decode(tokens, skip_special_tokens=True)
            good = judge.is_right(q, answer)
            right[q.intent] += good
            if arguments.show and not good:
                print(f"  [{q.intent} {q.name}] {q.question!r} -> {answer!r}")
        totals = Counter(q.intent for q in questions)
        parts = ", ".join(f"{intent} {right[intent]}/{totals[intent]}" for intent in totals)
        per_step = (sample.tokens - len(prompts)) / (sample.forwards - len(prompts))
        print(f"{name}: {right.total()} of {len(questions)} right ({parts}); {per_step:.2f} tokens per decode step")


if __name__ == "__main__":
    main()
