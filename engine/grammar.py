"""Grammars: what a constrained request may say next, on the host. Compiled and matched by llguidance.

A mask is a row of ``ceil(vocab_size / 32)`` int32 words; bit ``t % 32`` of word ``t // 32`` tells whether token ``t`` may come.
"""

from __future__ import annotations

import enum
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engine.messages import GrammarSpec, Thinking

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_CACHED_GRAMMARS = 64


class GrammarError(Exception):
    """A grammar that cannot be compiled or followed; the message is one line for the client."""


class _Phase(enum.Enum):
    """Where a constrained output stands. A model that may think decides with its first token."""

    MAY_THINK = enum.auto()
    THINKING = enum.auto()
    CONSTRAINED = enum.auto()
    ENDED = enum.auto()


class Matcher:
    """One request's way through its grammar.

    ``advance`` takes emitted tokens. ``try_draft`` goes on beyond them, and ``drop_drafts`` comes back.
    """

    def __init__(self, matcher: LLMatcher, thinking: Thinking | None, eos_token_ids: Sequence[int]) -> None:
        self._matcher, self._thinking, self._eos_token_ids = matcher, thinking, frozenset(eos_token_ids)
        self._phase = _Phase.CONSTRAINED
        if thinking is not None:
            self._phase = _Phase.THINKING if thinking.is_open else _Phase.MAY_THINK
        self._emitted_phase, self._num_drafted = self._phase, 0

    def advance(self, token_ids: Sequence[int]) -> None:
        """Take tokens that were emitted, up to the end. Raises GrammarError for one that the grammar forbids."""
        assert self._num_drafted == 0, "drafts are dropped before tokens are emitted"
        for token_id in token_ids:
            self._phase, consumes = self._next(token_id)
            if consumes and not self._matcher.consume_token(token_id):
                raise self._error()
        self._emitted_phase = self._phase

    def try_draft(self, token_id: int) -> bool:
        """Go on by one token if it is allowed; whether it was."""
        phase, consumes = self._next(token_id)
        if phase is _Phase.ENDED and self._phase is not _Phase.ENDED:
            if self._phase is _Phase.THINKING or not self._matcher.is_accepting():
                return False
        elif consumes:
            if self._matcher.try_consume_tokens([token_id]) != 1:
                return False
            self._num_drafted += 1
        self._phase = phase
        return True

    def drop_drafts(self) -> None:
        """Come back to where the emitted tokens end. Raises GrammarError."""
        if self._num_drafted and not self._matcher.rollback(self._num_drafted):
            raise self._error()
        self._phase, self._num_drafted = self._emitted_phase, 0

    def fill_mask(self, mask: Tensor) -> None:
        """Write which tokens may come next. Raises GrammarError when the grammar has become too complex."""
        if self._phase in (_Phase.THINKING, _Phase.ENDED):
            mask.fill_(-1)
            if self._phase is _Phase.THINKING:
                # Ending here would leave the grammar out.
                for token_id in self._eos_token_ids:
                    _clear(mask, token_id)
            return
        self._matcher.unsafe_compute_mask_ptr(mask.data_ptr(), mask.nbytes)
        if self._matcher.is_error():
            raise self._error()
        if self._phase is _Phase.MAY_THINK:
            assert self._thinking is not None
            if self._thinking.begin is not None:
                _set(mask, self._thinking.begin)

    def _next(self, token_id: int) -> tuple[_Phase, bool]:
        """The phase after a token, and whether the token belongs to the grammar."""
        thinking = self._thinking
        if self._phase is _Phase.THINKING:
            assert thinking is not None
            if token_id in self._eos_token_ids:
                return _Phase.ENDED, False
            return (_Phase.CONSTRAINED if token_id == thinking.end else _Phase.THINKING), False
        if self._phase is _Phase.MAY_THINK:
            assert thinking is not None
            if token_id == thinking.begin:
                return _Phase.THINKING, False
        if self._phase is _Phase.ENDED or token_id in self._eos_token_ids:
            return _Phase.ENDED, False
        return _Phase.CONSTRAINED, True

    def _error(self) -> GrammarError:
        # What llguidance thinks of its own state is of no use to a client.
        problem = " ".join(self._matcher.get_error().partition("<state>")[0].split())[:200]
        return GrammarError(f"the grammar cannot be followed any further ({problem}): simplify the schema or the grammar")


class CompiledGrammar:
    """A request's grammar, ready to be walked from its start as often as the request is admitted."""

    def __init__(self, fresh: LLMatcher, thinking: Thinking | None, eos_token_ids: Sequence[int]) -> None:
        self._fresh, self._thinking, self._eos_token_ids = fresh, thinking, eos_token_ids

    def start(self) -> Matcher:
        """A matcher at the grammar's start."""
        return Matcher(self._fresh.deep_copy(), self._thinking, self._eos_token_ids)


class GrammarCompiler:
    """Compiles grammars for one vocabulary. Safe to use from several threads; the tokenizer is built at the first use."""

    def __init__(self, load_tokenizer: Callable[[], LLTokenizer], eos_token_ids: Sequence[int]) -> None:
        self._load_tokenizer, self._eos_token_ids = load_tokenizer, tuple(eos_token_ids)
        self._tokenizer: LLTokenizer | None = None
        self._fresh: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, spec: GrammarSpec) -> CompiledGrammar:
        """Raises GrammarError with what is wrong."""
        with self._lock:
            return CompiledGrammar(self._compiled(spec.source), spec.thinking, self._eos_token_ids)

    def _compiled(self, source: str) -> LLMatcher:
        if source in self._fresh:
            self._fresh.move_to_end(source)
            return self._fresh[source]
        try:
            from llguidance import LLMatcher
        except ImportError as error:
            raise GrammarError("grammars need the package llguidance, which is not installed") from error
        self._tokenizer = self._tokenizer or self._load_tokenizer()
        matcher = LLMatcher(self._tokenizer, source, log_level=0)
        if matcher.is_error():
            raise GrammarError(f"the grammar cannot be compiled: {' '.join(matcher.get_error().split())[:200]}")
        self._fresh[source] = matcher
        if len(self._fresh) > MAX_CACHED_GRAMMARS:
            self._fresh.popitem(last=False)
        return matcher


def tokenizer_loader(folder: Path, eos_token_ids: Sequence[int], vocab_size: int) -> Callable[[], LLTokenizer]:
    """What builds the tokenizer of a checkpoint folder (or of a ``tokenizer.json``'s) when the first grammar comes."""

    def load() -> LLTokenizer:
        from llguidance import LLTokenizer

        file, eos = folder / "tokenizer.json", list(eos_token_ids)
        if not eos:
            raise GrammarError("grammars need a checkpoint with an EOS token: there would be no way to end")
        try:
            if file.exists():
                return LLTokenizer(file.read_text(encoding="utf-8"), n_vocab=vocab_size, eos_token=eos)
            from llguidance.hf import from_tokenizer
            from transformers import AutoTokenizer

            tokenizer: Any = AutoTokenizer.from_pretrained(folder)
            return from_tokenizer(tokenizer, n_vocab=vocab_size, eos_token=eos)
        except Exception as error:  # whatever the tokenizer libraries raise, the request alone must fail
            raise GrammarError(
                f"grammars cannot use the tokenizer of {folder}: {' '.join(str(error).split())[:200]}"
            ) from error

    return load


def empty_mask(num_rows: int, vocab_size: int) -> Tensor:
    """Masks [num_rows, words] on the host that allow everything."""
    return torch.full((num_rows, -(-vocab_size // 32)), -1, dtype=torch.int32)


def _set(mask: Tensor, token_id: int) -> None:
    mask[token_id // 32] |= _bit(token_id)


def _clear(mask: Tensor, token_id: int) -> None:
    mask[token_id // 32] &= ~_bit(token_id)


def _bit(token_id: int) -> int:
    """The token's bit in its word, as a signed 32-bit integer."""
    bit = 1 << token_id % 32
    return bit - 2**32 if bit == 2**31 else bit
