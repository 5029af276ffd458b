"""What an answer's text is made of, and what parses it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Protocol, TypeAlias


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text that the model thought before it answered."""

    text: str


@dataclass(frozen=True, slots=True)
class Content:
    """Text for the user."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallBegin:
    """A call begins; ``index`` counts an answer's calls from 0."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallArguments:
    """More of a call's arguments: the texts of one call join to a JSON object, if the call was completed."""

    index: int
    text: str


Event: TypeAlias = Reasoning | Content | ToolCallBegin | ToolCallArguments


class OutputParser(Protocol):
    """Turns one choice's text into events, as the text comes.

    The events depend on the text alone: however it is cut into pieces, they merge to the same.
    """

    @property
    def markers(self) -> tuple[str, ...]:
        """Strings the parser looks for that are special tokens in some tokenizers; the detokenizer has to keep them."""
        ...

    def push(self, text: str) -> list[Event]:
        """Take more text. Events are merged; what may still turn out to be something else is held back."""
        ...

    def finish(self) -> list[Event]:
        """The text has ended: let go of what was held back."""
        ...


def merge(events: Iterable[Event]) -> list[Event]:
    """Join the texts of adjacent events of one kind, and of one call."""
    merged: list[Event] = []
    for _, run in groupby(events, key=lambda event: (type(event), getattr(event, "index", None))):
        first, *rest = run
        if rest and not isinstance(first, ToolCallBegin):
            texts = [event.text for event in (first, *rest) if not isinstance(event, ToolCallBegin)]
            first = replace(first, text="".join(texts))
        merged.append(first)
    return merged
