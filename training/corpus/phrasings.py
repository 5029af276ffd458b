"""Surface shapes of questions: a small grammar that turns a template and a name into many ways of asking.

The templates are data (`data/phrasings.toml`). Those under `held_out` are kept for evaluation: no function here
that samples for training reads them.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from random import Random
from typing import Any

DATA: dict[str, Any] = tomllib.loads((Path(__file__).parent / "data" / "phrasings.toml").read_text())

ABOUT: list[str] = DATA["about"]
REVERSE: list[str] = DATA["reverse"]
DESCRIBE: list[str] = DATA["describe"]
WHICH_MODULE: list[str] = DATA["which_module"]
MODULE: list[str] = DATA["module"]
TOPIC: list[str] = DATA["topic"]
held_out: dict[str, list[str]] = DATA["held_out"]

_DECORATIONS = ("{n}", "{n}", "{n}", "{n}", "{n}", "`{n}`", "`{n}`", "{n}()", "{n}()", "'{n}'", '"{n}"', "`{n}()`")
_DOUBLED = (
    "get",
    "put",
    "cut",
    "split",
    "strip",
    "run",
    "set",
    "map",
    "wrap",
    "swap",
    "drop",
    "stop",
    "zip",
    "trim",
    "pop",
    "log",
)


def decorate(name: str, rng: Random) -> str:
    """A name as people write it: bare, in backticks or quotes, or with parentheses."""
    return rng.choice(_DECORATIONS).replace("{n}", name)


def gerund(task: str) -> str:
    """`join two paths` becomes `joining two paths`."""
    verb, _, rest = task.partition(" ")
    if verb in _DOUBLED:
        verb += verb[-1]
    elif verb.endswith("e") and not verb.endswith("ee"):
        verb = verb[:-1]
    return f"{verb}ing {rest}".strip()


def vary_task(task: str, rng: Random) -> str:
    """Put synonyms for one or two phrases of a task."""
    synonyms: dict[str, list[str]] = DATA["synonyms"]
    fitting = [phrase for phrase in synonyms if re.search(rf"\b{re.escape(phrase)}", task)]
    for phrase in rng.sample(fitting, min(len(fitting), rng.choice((0, 0, 1, 1, 2)))):
        task = re.sub(rf"\b{re.escape(phrase)}(?=\b|$|(?<= ))", rng.choice(synonyms[phrase]), task, count=1)
    return task


def _misspell(template: str, rng: Random) -> str:
    """Misspell one small word of a template, never a placeholder."""
    typos: dict[str, list[str]] = DATA["typos"]
    words = template.split(" ")
    places = [i for i, word in enumerate(words) if word.lower() in typos]
    if places:
        place = rng.choice(places)
        words[place] = rng.choice(typos[words[place].lower()])
    return " ".join(words)


def _frame(template: str, rng: Random) -> str:
    """Prefixes, suffixes and typos around a template."""
    if rng.random() < 0.10:
        template = _misspell(template, rng)
    if rng.random() < 0.22:
        template = f"{rng.choice(DATA['prefixes'])} {template}"
    if rng.random() < 0.16:
        template = f"{template} {rng.choice(DATA['suffixes'])}"
    return template


def _finish(template: str, rng: Random) -> str:
    """Case and end mark. Only the template is changed, so that names keep their case."""
    if rng.random() < 0.5:
        template = template[:1].upper() + template[1:]
    elif rng.random() < 0.4:
        template = template.replace("I ", "i ").replace("I'", "i'")
    return template + rng.choice(("?", "?", "?", "?", "?", "", "", "", ".", " ?"))


def dress(template: str, rng: Random, **slots: str) -> str:
    """A full question from a template and its slots."""
    dressed = _finish(_frame(template, rng), rng)
    for slot, text in slots.items():
        dressed = dressed.replace("{" + slot + "}", text)
    return dressed[:1].upper() + dressed[1:] if template.startswith(("{t}", "{g}")) and rng.random() < 0.5 else dressed


def ask_about(name: str, rng: Random) -> str:
    """What does a name do: in one of the `about` shapes."""
    return dress(rng.choice(ABOUT), rng, n=decorate(name, rng))


def ask_which_module(name: str, rng: Random) -> str:
    """Where a name lives."""
    return dress(rng.choice(WHICH_MODULE), rng, n=decorate(name, rng))


def ask_task(task: str, rng: Random) -> str:
    """A task in words, with synonyms; the plain "how do I" shapes come most often."""
    task = vary_task(task, rng)
    if rng.random() < 0.08:
        task = _misspell(task, rng)
    weighted = REVERSE if rng.random() < 0.6 else REVERSE[:12]
    return dress(rng.choice(weighted), rng, t=task, g=gerund(task))


def ask_description(description: str, rng: Random) -> str:
    """The description of a name, asked back: "which function joins path parts?"."""
    return dress(rng.choice(DESCRIBE), rng, d=description)


def ask_module(module: str, rng: Random) -> str:
    """What a module is for."""
    mark = rng.choice(("{m}", "{m}", "{m}", "`{m}`", "'{m}'")).replace("{m}", module)
    return dress(rng.choice(MODULE), rng, m=mark)


def ask_topic(topic: str, rng: Random) -> str:
    """Which module is for a topic."""
    return dress(rng.choice(TOPIC), rng, topic=topic)


def ask_plainly(question: str, rng: Random) -> str:
    """Small talk and off-topic questions: light changes only."""
    if rng.random() < 0.06:
        question = _misspell(question, rng)
    if rng.random() < 0.08:
        question = f"{rng.choice(DATA['prefixes'][:6])} {question}"
    if rng.random() < 0.5:
        question = question[:1].upper() + question[1:]
    elif rng.random() < 0.3:
        question = question.lower()
    return question + rng.choice(("?", "?", "", "", ".", "!", "??"))
