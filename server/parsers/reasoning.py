"""Thinking in front of an answer."""

from __future__ import annotations

from server.parsers.characters import END, CharacterParser, Routine
from server.parsers.events import Content, Reasoning

THINK_BEGIN = "<think>"
THINK_END = "</think>"


class ThinkParser(CharacterParser):
    """``<think>reasoning</think>content``.

    Thinking begins with the text if the prompt has opened it already (``is_open``), or with a tag in front of everything but
    whitespace; a model that repeats the prompt's tag does no harm. It ends with the first end tag, or with the text. Tags
    anywhere else are text.

    Newlines behind ``<think>`` and on both sides of ``</think>`` belong to the tags and are dropped, so the usual
    ``<think>\\nreasoning\\n</think>\\n\\ncontent`` gives the bare texts. Other whitespace is kept.
    """

    markers = (THINK_BEGIN, THINK_END)

    def __init__(self, *, is_open: bool = False) -> None:
        super().__init__()
        self._is_open = is_open

    def _run(self) -> Routine[None]:
        yield from self._drop_newlines() if self._is_open else self._hold_space()
        if (yield from self._match(THINK_BEGIN)) or self._is_open:
            yield from self._drop_newlines()
            yield from self._thinking()
        if self._held:
            self._events.append(Content(self._take_held()))
        while self._at != END:
            self._events.append(Content(self._at))
            yield

    def _thinking(self) -> Routine[None]:
        while self._at != END:
            if self._at == "\n":
                yield from self._hold()
            elif self._at == "<" and (yield from self._match(THINK_END)):
                yield from self._drop_newlines()
                return
            else:
                self._reason(self._take_held() + self._at)
                yield
        self._reason(self._take_held())

    def _drop_newlines(self) -> Routine[None]:
        """Take newlines, and forget them with all that was held."""
        while self._at == "\n":
            yield
        self._held.clear()

    def _reason(self, text: str) -> None:
        if text:
            self._events.append(Reasoning(text))
