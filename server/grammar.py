"""Structured output: from what a client may ask for to a grammar that the engine follows.

Grammars are llguidance's, which loads no torch. They are checked here, before the request is sent, in a thread: a wrong schema
is a 400 that names the place in it. The engine compiles them once more, for its vocabulary.
"""

from __future__ import annotations

import asyncio
import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

from server.errors import ApiError, invalid, unsupported
from server.json_values import parse_json
from server.protocol import MAX_CHOICES, GenerationFields

MAX_GRAMMAR_CHARS = 262_144
MAX_LOCATED_CHARS = 1_000_000
"""Characters of sub-schemas that are tried, one by one, to find the one that is wrong."""

_CHECKING = ThreadPoolExecutor(2, "grammar")
"""Threads of their own: hard grammars wait for each other, and nobody else waits for them."""

# JSON allows white space nearly everywhere, and a weak model writes it to the end of its context. One blank behind a colon or
# a comma is how most JSON on one line is written; indentation has no bound that fits every depth.
JSON_OPTIONS: JsonCompileOptions = {
    "whitespace_flexible": False,
    "key_separator": r":\x20?",
    "item_separator": r",\x20?",
}

OPTIONS_KEY = "x-guidance"
"""Where llguidance reads options in a schema, at its top alone. No client may set them: ``lenient`` would ignore keywords."""

# llguidance names an option of its own, which no client can set.
OVERLAP = (
    "oneOf constraints are not supported. Enable 'coerce_one_of' option to approximate oneOf with anyOf",
    "oneOf is not supported where its alternatives may overlap: use anyOf, or give each a constant that tells it apart",
)

ANY_OBJECT = {"type": "object"}

_GBNF_RULE = re.compile(r"^\s*[?!]?[\w-]+\s*::=", re.MULTILINE)

Checked = TypeVar("Checked")

_OF_NO_EFFECT = ("disable_any_whitespace", "disable_fallback")
"""Of vLLM's ``structured_outputs``: JSON comes on one line anyway, and there is one backend to use."""

_IN_MAPPINGS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_IN_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_IN_PLACE = ("items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames")


async def requested_grammar(fields: GenerationFields) -> str | None:
    """The grammar that a request's fields ask for, checked; None for free text. Raises a 400."""
    asked = [(name, value) for name, value in _requested(fields) if value is not None]
    if len(asked) > 1:
        names = " and ".join(name for name, _ in asked)
        raise invalid(f"{names} both constrain the output; send one of them", asked[1][0])
    if not asked:
        return None
    (param, (kind, value)) = asked[0]
    match kind:
        case "json":
            return await json_grammar(value, param)
        case "regex":
            return await _text_grammar("grammar_from_regex", value, param)
        case "grammar":
            return await _text_grammar("grammar_from_lark", value, param)
    if not isinstance(value, list) or not value or not all(isinstance(choice, str) and choice for choice in value):
        raise invalid(f"{param} must be a list of texts that are not empty", param)
    if len(value) > MAX_CHOICES:
        raise invalid(f"{param} has {len(value)} choices, more than the {MAX_CHOICES} allowed", param)
    choices = " | ".join(json.dumps(choice) for choice in value)
    return await _text_grammar("grammar_from_lark", f"start: {choices}", param)


def _requested(fields: GenerationFields) -> Iterator[tuple[str, tuple[str, Any] | None]]:
    yield "response_format", _response_format(fields.response_format)
    yield "structured_outputs", _structured_outputs(fields.structured_outputs)
    for kind in ("json", "regex", "choice", "grammar"):
        value = getattr(fields, f"guided_{kind}")
        yield f"guided_{kind}", None if value is None else (kind, value)


def _response_format(value: Mapping[str, Any] | None) -> tuple[str, Any] | None:
    if value is None:
        return None
    match value.get("type"):
        case "text":
            return None
        case "json_object":
            return "json", ANY_OBJECT
        case "json_schema":
            schema = value.get("json_schema")
            if not isinstance(schema, dict) or not isinstance(schema.get("schema"), dict):
                raise invalid("response_format.json_schema must be an object with a schema in it", "response_format")
            return "json", schema["schema"]
    kind = str(value.get("type"))[:50]
    raise invalid(f"response_format.type must be text, json_object or json_schema, got {kind!r}", "response_format")


def _structured_outputs(value: Mapping[str, Any] | None) -> tuple[str, Any] | None:
    if value is None:
        return None
    kinds = ("json", "regex", "choice", "grammar", "json_object")
    sent = {name: v for name, v in value.items() if v is not None and v is not False and name not in _OF_NO_EFFECT}
    asked = {name: v for name, v in sent.items() if name in kinds}
    unknown = next((name for name in sent if name not in kinds), None)
    if unknown is not None:
        message = f"structured_outputs.{unknown[:64]} is not supported; leave it out. It takes one of {', '.join(kinds)}"
        raise unsupported(message, "structured_outputs")
    if len(asked) != 1:
        raise invalid(f"structured_outputs must have exactly one of {', '.join(kinds)}", "structured_outputs")
    ((kind, content),) = asked.items()
    return ("json", ANY_OBJECT) if kind == "json_object" else (kind, content)


async def json_grammar(schema: Any, param: str, where: str = "the schema") -> str:
    """The grammar of a JSON schema, which may be an object or its text. Raises a 400 that names the place in the schema."""
    if isinstance(schema, str):
        schema = parse_json(schema, where, param)
    if not isinstance(schema, dict):
        raise invalid(f"{where} must be a JSON object", param)
    text = json.dumps(schema)
    if len(text) > MAX_GRAMMAR_CHARS:
        raise invalid(f"{where} has {len(text)} characters, more than the {MAX_GRAMMAR_CHARS} allowed; simplify it", param)
    grammar, path, problem = await _in_thread(_compile_json, text)
    if problem:
        raise _refused(f"{where} cannot be used, at {path}: {problem}", param)
    return grammar


async def _text_grammar(constructor: str, text: Any, param: str) -> str:
    if not isinstance(text, str) or not text:
        raise invalid(f"{param} must be a text that is not empty", param)
    if constructor == "grammar_from_lark" and text.lstrip().startswith("{"):
        raise invalid(f"{param} must be a lark grammar; for a JSON schema there is response_format", param)
    if constructor == "grammar_from_lark" and _GBNF_RULE.search(text):
        raise invalid(f"{param} must be a lark grammar: write start: ... instead of root ::= ... (GBNF, EBNF)", param)
    return await checked_grammar(await _in_thread(_constructed, constructor, text), param)


async def checked_grammar(grammar: str, param: str) -> str:
    """The grammar itself. Raises a 400 for one that cannot be used."""
    if len(grammar) > MAX_GRAMMAR_CHARS:
        raise invalid(f"{param} makes a grammar of {len(grammar)} characters, more than the {MAX_GRAMMAR_CHARS} allowed", param)
    problem = await _in_thread(_problem, grammar)
    if problem:
        raise _refused(f"{param} cannot be used: {problem}", param)
    return grammar


def follows_json(grammar: str) -> bool:
    """Whether it is the grammar of a JSON schema."""
    return grammar.startswith('{"grammars":') and json.loads(grammar)["grammars"][0]["json_schema"] is not None


def combined(start: str, parts: Mapping[str, str]) -> str:
    """One grammar of several: ``start`` is lark, and calls those of JSON schemas ``@name``."""
    named = [{**json.loads(grammar)["grammars"][0], "name": name} for name, grammar in parts.items()]
    return json.dumps({"grammars": [{"name": "start", "lark_grammar": start}, *named]})


async def _in_thread(check: Callable[..., Checked], *arguments: str) -> Checked:
    return await asyncio.get_running_loop().run_in_executor(_CHECKING, check, *arguments)


def _refused(message: str, param: str) -> ApiError:
    return invalid(message, param, code="invalid_grammar")


@functools.lru_cache(maxsize=64)
def _compile_json(text: str) -> tuple[str, str, str]:
    """The grammar, or the path of what is wrong and why."""
    schema = json.loads(text)
    grammar, problem = _try_schema(schema)
    return grammar, (_locate(schema) if problem else ""), problem


def _constructed(constructor: str, text: str) -> str:
    from llguidance import LLMatcher

    grammar: str = getattr(LLMatcher, constructor)(text)
    return grammar


@functools.lru_cache(maxsize=64)
def _problem(grammar: str) -> str:
    from llguidance import LLMatcher

    return _one_line(LLMatcher.validate_grammar(grammar))


def _try_schema(schema: Any) -> tuple[str, str]:
    from llguidance import LLMatcher

    if isinstance(schema, dict):
        schema = {name: value for name, value in schema.items() if name != OPTIONS_KEY}
    try:
        grammar: str = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=JSON_OPTIONS)
    except ValueError as error:
        return "", _one_line(str(error).replace(*OVERLAP))
    return grammar, _one_line(LLMatcher.validate_grammar(grammar).replace(*OVERLAP))


def _locate(root: dict[str, Any]) -> str:
    """The path of the deepest sub-schema that is wrong by itself, as a JSON path from ``$``.

    llguidance says what is wrong, but not where. Each sub-schema is tried with the root's definitions, so that its references
    can be followed.
    """
    definitions = {name: root[name] for name in ("$defs", "definitions") if name in root}
    path, schema, num_chars = "$", root, 0
    while True:
        for step, child in _children(schema):
            tried = {**definitions, **child} if isinstance(child, dict) else child
            num_chars += len(json.dumps(tried))
            if num_chars > MAX_LOCATED_CHARS:
                return path
            if _try_schema(tried)[1]:
                path, schema = path + step, child
                break
        else:
            return path


def _children(schema: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(schema, dict):
        return
    for keyword in _IN_MAPPINGS:
        values = schema.get(keyword)
        for name, child in values.items() if isinstance(values, dict) else ():
            yield f".{keyword}.{name}" if name.isidentifier() else f".{keyword}[{json.dumps(name)}]", child
    for keyword in _IN_LISTS:
        values = schema.get(keyword)
        for index, child in enumerate(values) if isinstance(values, list) else ():
            yield f".{keyword}[{index}]", child
    for keyword in _IN_PLACE:
        if isinstance(schema.get(keyword), dict):
            yield f".{keyword}", schema[keyword]


def _one_line(text: str) -> str:
    return " ".join(text.split())[:200]
