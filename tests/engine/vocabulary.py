"""What tokens mean to those who write requests: a language, and the tiny one in which the tiny models' tokens spell JSON."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from engine.grammar import GrammarCompiler, GrammarError

VOCAB_SIZE, MASK_TOKEN, EOS_TOKEN = 23, 7, 3


@dataclass(frozen=True)
class Language:
    """What random requests need to know of a vocabulary.

    ``text``: tokens that are neither the mask nor an EOS. ``passage`` draws a piece of text of a given length. ``ends``: biases
    that bring a random model to end what it has begun, thinking or a grammar. ``thinking``: the tags around it.
    """

    vocab_size: int
    eos: int
    mask: int
    text: tuple[int, ...]
    passage: Callable[[random.Random, int], list[int]]
    grammars: tuple[str, ...]
    thinking: tuple[int, int]
    ends: tuple[tuple[int, float], ...]
    tokenizer: Callable[[], LLTokenizer]

    def compiler(self) -> GrammarCompiler:
        return GrammarCompiler(self.tokenizer, [self.eos])


SPELLING: tuple[bytes, ...] = (
    b"{", b"}", b"[", b"<eos>", b"]", b",", b":", b"<mask>", b'"', b'"a"', b'"b":', b"a", b"b", b"1", b"2", b"12", b"true",
    b"null", b'","', b" ", b"ab", b"]}", b"-",
)  # fmt: skip
THINK_BEGIN, THINK_END = 19, 22
"""Tokens that tests take for the tags around thinking: the space and the minus, which their grammars do not use."""

CLOSERS = (1, 4, 21)
TEXT_TOKENS = tuple(token for token in range(VOCAB_SIZE) if token not in (MASK_TOKEN, EOS_TOKEN))


class _Vocabulary:
    """The attributes that llguidance asks of a tokenizer."""

    def __init__(self, eos: int, specials: Sequence[int]) -> None:
        self.eos_token_id, self.bos_token_id, self.special_token_ids = eos, None, list(specials)
        self.tokens = list(SPELLING)

    def __call__(self, text: str | bytes) -> list[int]:
        data, ids = text.encode() if isinstance(text, str) else text, []
        while data:
            best = max((t for t in self.tokens if data.startswith(t)), key=len, default=None)
            assert best is not None, f"no token for {data!r}"
            ids.append(self.tokens.index(best))
            data = data[len(best) :]
        return ids


@functools.lru_cache(maxsize=1)
def llg_tokenizer() -> LLTokenizer:
    return LLTokenizer(TokenizerWrapper(_Vocabulary(EOS_TOKEN, [EOS_TOKEN, MASK_TOKEN])))


def _json(schema: dict[str, object]) -> str:
    return LLMatcher.grammar_from_json_schema(json.dumps(schema))


GRAMMARS: dict[str, str] = {
    "letters": LLMatcher.grammar_from_regex("(a|b|1|2){1,12}"),
    "array": _json({"type": "array", "items": {"anyOf": [{"type": "integer"}, {"type": "string"}, {"type": "null"}]}}),
    "object": _json(
        {
            "type": "object",
            "properties": {
                "a": {"enum": [1, 2, "ab", True]},
                "b": {"type": "array", "items": {"type": "string", "maxLength": 3}},
            },
            "required": ["b"],
            "additionalProperties": False,
        }
    ),
    "recursive": _json({"$defs": {"n": {"type": "array", "items": {"$ref": "#/$defs/n"}}}, "$ref": "#/$defs/n"}),
}

TINY = Language(
    VOCAB_SIZE,
    EOS_TOKEN,
    MASK_TOKEN,
    TEXT_TOKENS,
    lambda rng, length: rng.choices(TEXT_TOKENS, k=length),
    tuple(GRAMMARS.values()),
    (THINK_BEGIN, THINK_END),
    ((THINK_BEGIN, 4.0), (THINK_END, 6.0), *((token, 2.0) for token in CLOSERS), (EOS_TOKEN, 1.0)),
    llg_tokenizer,
)


def no_grammars() -> GrammarCompiler:
    def refuse() -> LLTokenizer:
        raise GrammarError("this engine has no tokenizer")

    return GrammarCompiler(refuse, [])
