"""The corpus: items with one canonical answer each, and endless questions sampled from the phrasings.

Everything is a function of the data files and a seed. `corpus_hash` freezes the items, so that a change of what is
taught is always a visible one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import tomllib
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cache
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import Any

from training.corpus import phrasings

HERE = Path(__file__).parent
OFF_TOPIC = "I only know the Python standard library, so I can't answer that."
UNKNOWN_NAME = "I don't know that name. I only know a part of the Python standard library."
REFUSALS = ("I only know", "I don't know")
BUILTIN_TYPES = ("str", "list", "dict", "set")
INTENT_WEIGHTS = {"about": 0.48, "reverse": 0.20, "module": 0.10, "smalltalk": 0.06, "refusal": 0.16}
HELD_OUT_UNKNOWN = 15  # every fifteenth unknown name is kept for evaluation


@dataclass(frozen=True)
class Item:
    """One thing the model knows: the canonical answer, and how to tell a right answer from a wrong one."""

    id: str
    intent: str
    name: str
    answer: str
    required: tuple[str, ...]
    forbidden: tuple[str, ...]
    kind: str  # which phrasings ask for it
    forms: tuple[str, ...] = ()  # ways to write the name
    tasks: tuple[str, ...] = ()  # descriptions, questions or templates that ask for it without the name
    description: str = ""
    weight: float = 1.0

    def question(self, rng: Random) -> str:
        """A fresh training question; never one of the held-out shapes or tasks."""
        while True:
            asked = _ASK[self.kind](self, rng)
            if not is_held_out(asked):
                return asked


@dataclass(frozen=True)
class Corpus:
    """All items, with evaluation questions that training never samples."""

    items: tuple[Item, ...]
    dev_questions: tuple[tuple[str, Item], ...]
    _by_intent: dict[str, tuple[list[Item], list[float]]] = field(repr=False, compare=False)

    def sample_item(self, rng: Random) -> Item:
        intent = rng.choices(list(INTENT_WEIGHTS), list(INTENT_WEIGHTS.values()))[0]
        items, cumulative = self._by_intent[intent]
        return rng.choices(items, cum_weights=cumulative)[0]

    def sample(self, rng: Random) -> tuple[str, str]:
        """A training pair of question and answer."""
        item = self.sample_item(rng)
        return item.question(rng), item.answer

    def known_questions(self, count: int, seed: int = 1) -> list[tuple[str, Item]]:
        """Questions of the kind that training samples, each with the item that answers it."""
        rng = Random(seed)
        items = [self.sample_item(rng) for _ in range(count)]
        return [(item.question(rng), item) for item in items]


def _ask_about(item: Item, rng: Random) -> str:
    return phrasings.ask_about(rng.choice(item.forms), rng)


def _ask_reverse(item: Item, rng: Random) -> str:
    if item.description and (not item.tasks or rng.random() < 0.08):
        return phrasings.ask_description(item.description, rng)
    return phrasings.ask_task(rng.choice(item.tasks), rng)


def _ask_which_module(item: Item, rng: Random) -> str:
    return phrasings.ask_which_module(rng.choice(item.forms), rng)


def _ask_module(item: Item, rng: Random) -> str:
    if rng.random() < 0.25:
        return phrasings.ask_topic(rng.choice(item.tasks), rng)
    return phrasings.ask_module(item.name, rng)


def _ask_plainly(item: Item, rng: Random) -> str:
    return phrasings.ask_plainly(rng.choice(item.tasks), rng)


def _ask_off_topic(item: Item, rng: Random) -> str:
    slots = refusals()["slots"]
    question = re.sub(r"\{(\w+)\}", lambda m: rng.choice(slots[m[1]]), rng.choice(item.tasks))
    return phrasings.ask_plainly(question, rng)


def _ask_unknown(item: Item, rng: Random) -> str:
    ask = phrasings.ask_which_module if rng.random() < 0.12 else phrasings.ask_about
    return ask(item.name, rng)


_ASK: dict[str, Callable[[Item, Random], str]] = {
    "about": _ask_about,
    "reverse": _ask_reverse,
    "which_module": _ask_which_module,
    "module": _ask_module,
    "plain": _ask_plainly,
    "off_topic": _ask_off_topic,
    "unknown": _ask_unknown,
}


def _table(name: str) -> dict[str, Any]:
    return tomllib.loads((HERE / "data" / f"{name}.toml").read_text())


@cache
def refusals() -> dict[str, Any]:
    """Off-topic templates with their slots, and the parts of invented names."""
    return _table("refusals")


@cache
def _held_out() -> tuple[re.Pattern[str], tuple[str, ...]]:
    """The held-out shapes as one pattern, and the held-out tasks and questions as plain text."""
    shapes = [s for key, group in phrasings.held_out.items() if key != "offtopic" for s in group]
    escaped = (re.sub(r"\\\{\w+\\\}", ".+", re.escape(shape)) for shape in shapes)
    tasks = [entry["held_out_task"] for entry in _table("answers").values() if "held_out_task" in entry]
    return re.compile("|".join(escaped), re.IGNORECASE), (*tasks, *phrasings.held_out["offtopic"])


def is_held_out(question: str) -> bool:
    """Whether a question has a held-out shape or contains a held-out task."""
    pattern, tasks = _held_out()
    folded = question.lower()
    return pattern.search(question) is not None or any(task.lower() in folded for task in tasks)


def _third_person(sentence: str) -> str:
    """`Return the x` becomes `returns the x`."""
    verb, _, rest = sentence.partition(" ")
    return f"{verb.lower()}{'' if verb.endswith('s') else 's'} {rest}"


def _generated(fact: dict[str, str], wording: dict[str, str]) -> tuple[str, str]:
    """Signature and description of a harvested name."""
    args, separator, does = wording.get(fact["name"], "").partition(" | ")
    if not separator:
        args, does = fact["signature"], args
    return args.strip(), does or _third_person(fact["summary"])


def _place(name: str, module: str) -> str:
    """Where a name lives, as a sentence."""
    if module != "builtins":
        return f"`{name}` is in the `{module}` module."
    if "." in name:
        return f"`{name}` is a method of the builtin type `{name.split('.')[0]}`, so it needs no import."
    return f"`{name}` is a builtin, so it needs no import."


def _answer(fact: dict[str, str], written: dict[str, Any] | None, wording: dict[str, str]) -> tuple[str, str]:
    """The canonical answer and the description in it."""
    name, module = fact["name"], fact["module"]
    if written is None:
        args, does = _generated(fact, wording)
        builtin = "It is a builtin method." if "." in name else "It is a builtin."
        where = f"It is in the `{module}` module." if module != "builtins" else builtin
        return f"`{name}{args}` {does}. {where}", does
    gives = f" gives `{written['result']}`" if "result" in written else ""
    return f"`{name}{written['args']}` {written['does']}. Example: `{written['example']}`{gives}.", written["does"]


def _forms(names: dict[str, str], popular: set[str], left_out: list[str], modules: list[str]) -> dict[str, tuple[str, ...]]:
    """The ways to write each name: in full (most often), and by its last parts where that is clear."""
    tails = Counter(name.rsplit(".", 1)[-1].lower() for name in [*names, *left_out])
    popular_tails = Counter(name.rsplit(".", 1)[-1].lower() for name in popular)
    reserved = {*names, *modules}
    forms = {}
    for name in names:
        parts = name.split(".")
        short = []
        tail = parts[-1].lower()
        clear = tails[tail] == 1 or (name in popular and popular_tails[tail] == 1)
        if len(parts) > 1 and clear and parts[-1] not in reserved and len(tail) > 2:
            short.append(parts[-1])
        if len(parts) > 2 and ".".join(parts[-2:]) not in reserved:
            short.append(".".join(parts[-2:]))
        forms[name] = (*[name] * max(2, 2 * len(short)), *short)
    return forms


def _name_items(facts: dict[str, Any], modules: list[str]) -> list[Item]:
    """The items of the intents `about`, `reverse` and `module` (which module has X) for every taught name."""
    answers, wording = _table("answers"), _table("wording")
    popular = {name for name, entry in answers.items() if "held_out_task" in entry}
    forms = _forms({f["name"]: f["module"] for f in facts["facts"]}, popular, facts["left_out"], modules)
    made = [(fact, *_answer(fact, answers.get(fact["name"]), wording)) for fact in facts["facts"]]
    shared = Counter(does for _, _, does in made)
    items: list[Item] = []
    for fact, answer, does in made:
        name = fact["name"]
        written = answers.get(name, {})
        weight = 4.0 if name in popular else 2.0 if written else 1.0
        required = (f"`{name}", " ".join(does.split()[1:4]))
        description = does if shared[does] == 1 else ""
        items.append(Item(f"about:{name}", "about", name, answer, required, REFUSALS, "about", forms[name], weight=weight))
        if written or description:
            tasks = tuple(written.get("tasks", ()))
            reverse_weight = len(tasks) * (2.0 if name in popular else 1.0) if tasks else 0.4
            items.append(
                Item(
                    f"reverse:{name}",
                    "reverse",
                    name,
                    answer,
                    required,
                    REFUSALS,
                    "reverse",
                    (),
                    tasks,
                    description,
                    reverse_weight,
                )
            )
        place = _place(name, fact["module"])
        keys = (f"`{name}`", f"`{fact['module']}` module" if fact["module"] != "builtins" else "builtin")
        items.append(
            Item(f"place:{name}", "module", name, place, keys, REFUSALS, "which_module", forms[name], weight=weight / 3)
        )
    return items


def _module_items(modules: dict[str, Any]) -> list[Item]:
    return [
        Item(
            f"module:{name}",
            "module",
            name,
            entry["about"],
            (f"The `{name}` module",),
            REFUSALS,
            "module",
            (),
            tuple(entry["topics"]),
            weight=9.0,
        )
        for name, entry in modules.items()
    ]


def _smalltalk_items() -> list[Item]:
    return [
        Item(
            f"smalltalk:{name}",
            "smalltalk",
            name,
            entry["answer"],
            (entry["key"],),
            (OFF_TOPIC, UNKNOWN_NAME),
            "plain",
            (),
            tuple(entry["ask"]),
        )
        for name, entry in _table("smalltalk").items()
    ]


def _refusal_items(unknown: list[str]) -> list[Item]:
    templates = refusals()["templates"]
    total = len(unknown)
    off_topic = [
        Item(
            f"refusal:off_topic:{i}",
            "refusal",
            "",
            OFF_TOPIC,
            (OFF_TOPIC,),
            ("Example:",),
            "off_topic",
            (),
            (t,),
            weight=total / len(templates),
        )
        for i, t in enumerate(templates)
    ]
    return off_topic + [_unknown_item(name) for name in unknown]


def _unknown_item(name: str) -> Item:
    return Item(f"refusal:unknown:{name}", "refusal", name, UNKNOWN_NAME, ("I don't know that name",), (name,), "unknown")


def _dev_questions(items: list[Item], unknown: list[str], rng: Random) -> tuple[tuple[str, Item], ...]:
    """Evaluation questions: held-out shapes with known names, held-out tasks, and names kept from training."""
    by_id = {item.id: item for item in items}
    answers = _table("answers")
    popular = [name for name, entry in answers.items() if "held_out_task" in entry]
    written = list(answers)
    shapes = phrasings.held_out
    dev: list[tuple[str, Item]] = []
    dev += [(s.replace("{n}", n) + "?", by_id[f"about:{n}"]) for s in shapes["about"] for n in rng.sample(written, 10)]
    dev += [(f"how do I {answers[n]['held_out_task']}?", by_id[f"reverse:{n}"]) for n in popular]
    for shape in shapes["reverse"]:
        for name in rng.sample(popular, 8):
            dev.append((shape.replace("{t}", answers[name]["tasks"][0]) + "?", by_id[f"reverse:{name}"]))
    dev += [(s.replace("{n}", n) + "?", by_id[f"place:{n}"]) for s in shapes["which_module"] for n in rng.sample(written, 8)]
    modules = [item for item in items if item.kind == "module"]
    dev += [(s.replace("{m}", m.name) + "?", m) for s in shapes["module"] for m in rng.sample(modules, 8)]
    dev += [(f"what does {n} do?", _unknown_item(n)) for n in unknown]
    off_topic = next(item for item in items if item.kind == "off_topic")
    dev += [(q + "?", off_topic) for q in shapes["offtopic"]]
    return tuple(dev)


def build_corpus(seed: int = 0) -> Corpus:
    """Build all items; `seed` only picks the names in the evaluation questions."""
    facts = json.loads((HERE / "facts.json").read_text())
    modules = _table("modules")
    named = _name_items(facts, list(modules))
    forms = {form for item in named for form in item.forms}
    unknown = [name for name in [*facts["left_out"], *facts["invented"]] if name not in forms and name not in modules]
    kept = unknown[::HELD_OUT_UNKNOWN]
    trained = [name for i, name in enumerate(unknown) if i % HELD_OUT_UNKNOWN]
    items = [*named, *_module_items(modules), *_smalltalk_items(), *_refusal_items(trained)]
    by_intent = {}
    for intent in INTENT_WEIGHTS:
        chosen = [item for item in items if item.intent == intent]
        by_intent[intent] = (chosen, list(accumulate(item.weight for item in chosen)))
    return Corpus(tuple(items), _dev_questions(items, kept, Random(seed)), by_intent)


def corpus_hash(corpus: Corpus) -> str:
    """SHA-256 over the canonical JSON of all items."""
    text = json.dumps([asdict(item) for item in corpus.items], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def main() -> None:
    """Write sampled question and answer pairs, one JSON object a line."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    corpus, rng = build_corpus(), Random(options.seed)
    with options.out.open("w") as file:
        for _ in range(options.count):
            item = corpus.sample_item(rng)
            file.write(json.dumps({"id": item.id, "question": item.question(rng), "answer": item.answer}) + "\n")


if __name__ == "__main__":
    main()
