"""The held-out questions of the bundled model, written without sight of its training phrasings, and what a right answer is.

``python -m benchmarks.stdlib_questions`` prints how many the model answers rightly.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer

from benchmarks.bundled import MODEL, build_engine, load_bundled, run_engine
from benchmarks.report import finish
from engine.sampling_params import DecodingMode
from training.corpus.build import Item, build_corpus

DATA = Path(__file__).parent / "data" / "stdlib_held_out.json"
REFUSALS = ("I only know", "I don't know that name")


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
        item = self.items[f"{question.intent}:{question.name}"]
        return all(s in answer for s in item.required) and not any(s in answer for s in item.forbidden)


@dataclass(frozen=True, slots=True)
class Answered:
    """A question with the model's greedy answer."""

    question: HeldOut
    answer: str
    is_right: bool


def ask(folder: Path, questions: Sequence[HeldOut], branches: int | None) -> tuple[list[Answered], float]:
    """Ask every question greedily, eight at a time; the answers, and the tokens per decode step (the prompt's not counted)."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = []
    for question in questions:
        messages = [{"role": "user", "content": question.question}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        prompts.append(tokenizer(text, add_special_tokens=False)["input_ids"])
    sample, answers = run_engine(build_engine(load_bundled(folder), DecodingMode.TIDAR, None, branches, 8), prompts)
    judge = Judge()
    answered = []
    for question, token_ids in zip(questions, answers, strict=True):
        answer = tokenizer.decode(token_ids, skip_special_tokens=True)
        answered.append(Answered(question, answer, judge.is_right(question, answer)))
    return answered, (sample.tokens - len(prompts)) / (sample.forwards - len(prompts))


def main() -> None:
    """Ask both sets and count."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--branches", type=int, help="branches a step (default: all)")
    parser.add_argument("--show", action="store_true", help="print the wrong answers")
    parser.add_argument("--out", type=Path, help="also write the JSON line to this file")
    arguments = parser.parse_args()
    results = {}
    for name, questions in load_held_out().items():
        answered, per_step = ask(arguments.model, questions, arguments.branches)
        for a in answered:
            if arguments.show and not a.is_right:
                print(f"  [{a.question.intent} {a.question.name}] {a.question.question!r} -> {a.answer!r}")
        totals = Counter(a.question.intent for a in answered)
        right = Counter(a.question.intent for a in answered if a.is_right)
        scores = {intent: [right[intent], totals[intent]] for intent in totals}
        results[name] = {"right": right.total(), "asked": len(answered), "by_intent": scores, "tokens_per_forward": per_step}
        parts = ", ".join(f"{intent} {right[intent]}/{totals[intent]}" for intent in totals)
        print(f"{name}: {right.total()} of {len(answered)} right ({parts}); {per_step:.2f} tokens per decode step")
    finish("stdlib_questions", results, arguments.out)


if __name__ == "__main__":
    main()
