"""Parsers as routines that read one character after the other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from typing import TypeAlias, TypeVar

from server.parsers.events import Event, merge

END = ""
"""At hand behind the last character, for good; equal to no character."""

Result = TypeVar("Result")
Routine: TypeAlias = Generator[None, None, Result]
"""Part of a parser. A ``yield`` takes the character at hand; when it comes back the next one is at hand."""


class CharacterParser(ABC):
    """A parser whose ``_run`` sees characters and never pieces, so its events cannot depend on how the text was cut.

    ``_at`` is the character at hand. ``_held`` is text that was taken and is not an event yet.
    """

    markers: tuple[str, ...] = ()

    def __init__(self) -> None:
        self._at = END
        self._held: list[str] = []
        self._events: list[Event] = []
        self._put_back: list[str] = []
        self._routine = self._from_the_first()
        next(self._routine)

    def push(self, text: str) -> list[Event]:
        for character in text:
            self._feed(character)
        return self._take_events()

    def finish(self) -> list[Event]:
        self._at = END
        for _ in self._routine:
            pass
        return self._take_events()

    @abstractmethod
    def _run(self) -> Routine[None]:
        """Read to the end; entered with the first character at hand."""

    def _from_the_first(self) -> Routine[None]:
        yield
        yield from self._run()

    def _feed(self, character: str) -> None:
        self._at = character
        next(self._routine, None)
        while self._put_back:
            self._at = self._put_back.pop()
            next(self._routine, None)

    def _take_events(self) -> list[Event]:
        events, self._events = merge(self._events), []
        return events

    def _take_held(self) -> str:
        text = "".join(self._held)
        self._held.clear()
        return text

    def _hold(self) -> Routine[None]:
        """Take the character at hand and hold it."""
        self._held.append(self._at)
        yield

    def _hold_while(self, accepts: Callable[[str], bool]) -> Routine[str]:
        """Take and hold characters as long as they are accepted; the text that they were."""
        start = len(self._held)
        while self._at != END and accepts(self._at):
            yield from self._hold()
        return "".join(self._held[start:])

    def _hold_space(self) -> Routine[None]:
        yield from self._hold_while(str.isspace)

    def _match(self, marker: str) -> Routine[bool]:
        """Take and hold the marker. If something else comes nothing is taken; if the text ends inside it, its part is held."""
        for position, expected in enumerate(marker):
            if self._at != expected:
                if position and self._at == END:
                    self._held.append(marker[:position])
                elif position:
                    self._put_back.extend((self._at, *reversed(marker[1:position])))
                    self._at = marker[0]
                return False
            yield
        self._held.append(marker)
        return True
