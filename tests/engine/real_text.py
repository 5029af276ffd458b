"""Requests in a real tokenizer's vocabulary: the bundled one. Prompts are passages of questions and of a licence."""

from __future__ import annotations

import functools
import json
import random
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

import server
from engine.grammar import tokenizer_loader
from engine.models.hf_config import read_model_config

if TYPE_CHECKING:
    from llguidance import LLTokenizer

    from tests.engine.vocabulary import Language

ROOT = Path(__file__).parents[2]
FOLDER = Path(server.__file__).parent / "bundled_model"
MASK, EOS, USER, ASSISTANT, THINK_BEGIN, THINK_END = 7, 4, 2, 3, 6, 5
"""Special tokens; the tags around thinking are two that the bundled model does not use."""

UNICODE = "Grüße aus Köln: 5 €, naïve façades, 東京 and 🙂 — “quotes” too.\n"

SCHEMAS: tuple[dict[str, object], ...] = (
    {"type": "object"},
    {"type": "array", "items": {"type": ["integer", "null", "boolean"]}, "minItems": 1, "maxItems": 4},
    {"enum": ["list.append", "dict", 3, None, "größer"]},
    {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 8}, "größe": {"type": "number"}},
        "required": ["name"],
        "additionalProperties": False,
    },
    {"$defs": {"n": {"anyOf": [{"type": "null"}, {"type": "array", "items": {"$ref": "#/$defs/n"}}]}}, "$ref": "#/$defs/n"},
    {"type": "string", "pattern": "^[a-f]{2,6}-[0-9]+$"},
)


@functools.lru_cache(maxsize=1)
def real_tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


@functools.lru_cache(maxsize=1)
def llg_real_tokenizer() -> LLTokenizer:
    return tokenizer_loader(FOLDER, [EOS], read_model_config(FOLDER).vocab_size)()


@functools.lru_cache(maxsize=1)
def _tokens_of_text() -> tuple[int, ...]:
    """A few thousand tokens: held-out questions as a chat has them, the licence, and what plain ASCII leaves out."""
    encode = real_tokenizer().encode
    held_out = json.loads((ROOT / "benchmarks" / "data" / "stdlib_held_out.json").read_text())
    questions = [entry["question"] for entries in held_out.values() for entry in entries]
    chats = chain.from_iterable((USER, *encode(question).ids, ASSISTANT) for question in questions)
    return (*chats, *encode((ROOT / "LICENSE").read_text()).ids, *encode(UNICODE * 8).ids)


def passage(rng: random.Random, length: int) -> list[int]:
    """A piece of the text."""
    tokens = _tokens_of_text()
    start = rng.randrange(len(tokens) - length)
    return list(tokens[start : start + length])


@functools.lru_cache(maxsize=1)
def real_text_language() -> Language:
    """Imports the grammar library, which a machine that only runs the tests of a GPU may lack."""
    from llguidance import LLMatcher

    from tests.engine.vocabulary import Language

    vocab_size, id_of = read_model_config(FOLDER).vocab_size, real_tokenizer().token_to_id
    closers = [id_of(text) for text in ("}", "]", '"', "1", "-")]
    return Language(
        vocab_size,
        EOS,
        MASK,
        tuple(token for token in range(vocab_size) if token not in (MASK, EOS)),
        passage,
        (*(LLMatcher.grammar_from_json_schema(json.dumps(schema)) for schema in SCHEMAS),),
        (THINK_BEGIN, THINK_END),
        ((THINK_BEGIN, 8.0), (THINK_END, 9.0), *((token, 7.0) for token in closers), (EOS, 7.0)),
        llg_real_tokenizer,
    )
