"""Text out of a growing sequence of tokens: whole characters only, and nothing of a stop string.

Tokens are taken one at a time whatever the engine's steps were, so the text depends on the tokens alone and a stream's deltas
always join to the text of the whole answer.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from server.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"

MAX_HELD_TOKENS = 16
"""Tokens that may wait for the rest of a character. A character has four bytes at most; more than this are not UTF-8."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that may be sent, after ``num_tokens`` of the given tokens; ``stop`` is the stop string that was completed."""

    text: str
    num_tokens: int
    stop: str | None = None


class Detokenizer:
    """One choice's text. After a piece with a ``stop`` it takes no more tokens."""

    def __init__(self, tokenizer: Tokenizer, stops: StopTable, *, skipped_ids: Collection[int]) -> None:
        self._decoder = TextDecoder(tokenizer, skipped_ids=skipped_ids)
        self._matcher = StopMatcher(stops)

    def append(self, token_ids: Sequence[int]) -> Piece:
        """Take tokens, up to and with the one that completes a stop string."""
        texts: list[str] = []
        for count, token_id in enumerate(token_ids, start=1):
            text, stop = self._matcher.push(self._decoder.push(token_id))
            texts.append(text)
            if stop is not None:
                return Piece("".join(texts), count, stop)
        return Piece("".join(texts), len(token_ids))

    def finish(self) -> Piece:
        """Let go of what was held back for a character or a stop string that did not come."""
        text, stop = self._matcher.push(self._decoder.flush())
        return Piece(text if stop is not None else text + self._matcher.flush(), 0, stop)


class TextDecoder:
    """Decodes token by token.

    Some tokenizers write a token differently at the start of a text (without its leading space), so each is decoded behind the
    tokens of the text before it. ``_start.._read`` are those, ``_read..`` are the tokens that have given no text yet.
    ``skipped_ids`` are tokens that are no text.
    """

    def __init__(self, tokenizer: Tokenizer, *, skipped_ids: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._skipped_ids = skipped_ids
        self._window: list[int] = []
        self._read = 0
        self._context_text = ""

    def push(self, token_id: int) -> str:
        """The text that ``token_id`` completes; empty in the middle of a character."""
        if token_id in self._skipped_ids:
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        held = len(self._window) - self._read
        if held < MAX_HELD_TOKENS and (text.endswith(REPLACEMENT) or len(text) <= len(self._context_text)):
            return ""
        return self._advance(text)

    def flush(self) -> str:
        """What is left at the end; an unfinished character is U+FFFD."""
        return self._advance(self._decode(self._window))

    def _advance(self, text: str) -> str:
        new = text[len(self._context_text) :]
        del self._window[: self._read]
        self._read = len(self._window)
        self._context_text = self._decode(self._window)
        return new

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)


class StopTable:
    """The stop strings of a request, prepared once for all its choices: Knuth, Morris and Pratt's automaton for each."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stops)
        self.borders = tuple(_borders(stop) for stop in self.stops)


class StopMatcher:
    """Finds the stop string that is completed first, and holds back text that may be the beginning of one.

    The cost of a character does not depend on the strings' length. Of strings that end at the same character the longest
    counts.
    """

    def __init__(self, table: StopTable) -> None:
        self._stops = table.stops
        self._borders = table.borders
        self._matched = [0] * len(self._stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """Text that no stop string can claim any more, and the stop string that was completed, if one was."""
        if not self._stops:
            return text, None
        for offset, character in enumerate(text, start=1):
            stop = self._step(character)
            if stop is not None:
                return (self._held + text[:offset])[: -len(stop)], stop
        whole = self._held + text
        cut = len(whole) - max(self._matched)
        self._held = whole[cut:]
        return whole[:cut], None

    def flush(self) -> str:
        """The text held back; for the end, when nothing can follow."""
        held, self._held = self._held, ""
        return held

    def _step(self, character: str) -> str | None:
        found: str | None = None
        for index, stop in enumerate(self._stops):
            matched = self._matched[index]
            while matched and stop[matched] != character:
                matched = self._borders[index][matched - 1]
            if stop[matched] == character:
                matched += 1
            if matched == len(stop):
                if found is None or len(stop) > len(found):
                    found = stop
                matched = 0  # no further step follows a match
            self._matched[index] = matched
        return found


def _borders(text: str) -> list[int]:
    """For each prefix, the length of its longest proper prefix that is also its suffix."""
    borders = [0] * len(text)
    for end in range(1, len(text)):
        length = borders[end - 1]
        while length and text[length] != text[end]:
            length = borders[length - 1]
        borders[end] = length + (text[length] == text[end])
    return borders
