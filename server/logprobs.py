"""Log-probabilities in the three forms of the wire: chat's, the older one of text completions, and vLLM's for prompts."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from engine import TokenLogprobs
from server.protocol import (
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TokenLogprob,
    TopLogprob,
)
from server.tokenizer import Tokenizer

LEAST = -9999.0
"""Stands for minus infinity, which JSON cannot say."""


class TextPlace:
    """Where in a choice's text, ``echo`` first, the next token begins; inside a character that is where the character begins.

    A special token that is no part of the text has no width: what the tokenizer put around the prompt, or what is skipped.
    """

    def __init__(self, echo: str, *, keeps_special: bool) -> None:
        self.offset = 0
        self._echo, self._keeps_special = echo, keeps_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def advance(self, token: bytes, *, is_special: bool) -> None:
        """Go on behind a token."""
        text = self._decoder.decode(token)
        if is_special and not self._echo.startswith(text, self.offset):
            is_output = self.offset >= len(self._echo)
            if not (is_output and self._keeps_special):
                return
        self.offset += len(text)


class LogprobsWriter:
    """Writes one request's log-probabilities. ``as_ids`` spells a token as ``token_id:17``, which is never ambiguous."""

    def __init__(self, tokenizer: Tokenizer, *, as_ids: bool = False) -> None:
        self._tokenizer, self._as_ids = tokenizer, as_ids

    def chat(self, entries: Sequence[TokenLogprobs]) -> ChatLogprobs:
        """An entry for each token."""
        content = [
            TokenLogprob(
                token=self._text(entry.token_id),
                logprob=max(entry.logprob, LEAST),
                bytes=self._bytes(entry.token_id),
                top_logprobs=[
                    TopLogprob(token=self._text(token), logprob=max(logprob, LEAST), bytes=self._bytes(token))
                    for token, logprob in entry.top
                ],
            )
            for entry in entries
        ]
        return ChatLogprobs(content=content, refusal=None)

    def completion(
        self, entries: Sequence[TokenLogprobs], place: TextPlace, first_token_id: int | None = None
    ) -> CompletionLogprobs:
        """Lists over the tokens, the first of which begins at ``place``, which goes on to where the last one ends.

        ``first_token_id`` is that of an echoed prompt's first token, in front of the entries. The token that came is among the
        likeliest, also if it was none of them.
        """
        logprobs = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        if first_token_id is not None:
            self._append(logprobs, first_token_id, None, None, place)
        for entry in entries:
            top: dict[str, float] = {}
            for token, logprob in entry.top:
                top.setdefault(self._key(token), max(logprob, LEAST))
            top[self._key(entry.token_id)] = max(entry.logprob, LEAST)
            self._append(logprobs, entry.token_id, max(entry.logprob, LEAST), top, place)
        return logprobs

    def prompt(self, token_ids: Sequence[int], entries: Sequence[TokenLogprobs]) -> PromptLogprobs:
        """vLLM's ``prompt_logprobs``: null for the first token, then the tokens by their ids."""
        written: PromptLogprobs = [None] if token_ids else []
        for entry in entries:
            ranked = {token: (logprob, rank) for rank, (token, logprob) in enumerate(entry.top, start=1)}
            ranked.setdefault(entry.token_id, (entry.logprob, entry.rank))
            written.append(
                {
                    str(token): PromptLogprob(logprob=max(logprob, LEAST), rank=rank, decoded_token=self._decoded(token))
                    for token, (logprob, rank) in ranked.items()
                }
            )
        return written

    def _append(
        self, logprobs: CompletionLogprobs, token: int, logprob: float | None, top: dict[str, float] | None, place: TextPlace
    ) -> None:
        logprobs.tokens.append(self._key(token))
        logprobs.token_logprobs.append(logprob)
        logprobs.top_logprobs.append(top)
        logprobs.text_offset.append(place.offset)
        place.advance(self._tokenizer.token_bytes(token), is_special=token in self._tokenizer.special_ids)

    def _text(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._as_ids else self._decoded(token_id)

    def _key(self, token_id: int) -> str:
        """A spelling that tells parts of characters apart, as OpenAI's text completions have it."""
        if self._as_ids:
            return self._text(token_id)
        data = self._tokenizer.token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _decoded(self, token_id: int) -> str:
        return self._tokenizer.token_bytes(token_id).decode("utf-8", "replace")

    def _bytes(self, token_id: int) -> list[int]:
        return list(self._tokenizer.token_bytes(token_id))
