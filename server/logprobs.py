"""Log-probabilities in the three forms of the wire: chat's, the older one of text completions, and vLLM's for prompts."""

from __future__ import annotations

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
        self, entries: Sequence[TokenLogprobs], offset: int, first_token_id: int | None = None
    ) -> tuple[CompletionLogprobs, int]:
        """Lists over the tokens, of which the first begins at ``offset`` characters, and where the last one ends.

        ``first_token_id`` is that of an echoed prompt's first token, in front of the entries. The token that came is among the
        likeliest, also if it was none of them.
        """
        logprobs = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        if first_token_id is not None:
            offset = self._append(logprobs, first_token_id, None, None, offset)
        for entry in entries:
            top: dict[str, float] = {}
            for token, logprob in (*entry.top, (entry.token_id, entry.logprob)):
                # Halves of characters are spelt alike: the likelier one stays.
                top.setdefault(self._text(token), max(logprob, LEAST))
            offset = self._append(logprobs, entry.token_id, max(entry.logprob, LEAST), top, offset)
        return logprobs, offset

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
        self, logprobs: CompletionLogprobs, token: int, logprob: float | None, top: dict[str, float] | None, offset: int
    ) -> int:
        logprobs.tokens.append(self._text(token))
        logprobs.token_logprobs.append(logprob)
        logprobs.top_logprobs.append(top)
        logprobs.text_offset.append(offset)
        return offset + len(self._decoded(token))

    def _text(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._as_ids else self._decoded(token_id)

    def _decoded(self, token_id: int) -> str:
        return self._tokenizer.token_bytes(token_id).decode("utf-8", "replace")

    def _bytes(self, token_id: int) -> list[int]:
        return list(self._tokenizer.token_bytes(token_id))
