"""Structured output over many JSON schemas, in a real tokenizer's vocabulary: valid, never stuck, equal in every exact mode.

A random model says what it likes within the grammar, which meets more of a schema than a trained one would. Closing brackets,
quotes, commas and the end are made likelier, so that most outputs end by themselves. The grammars are those that the server
makes.
"""

from __future__ import annotations

import asyncio
import json
import random
from dataclasses import replace
from typing import Any

import jsonschema
import pytest
import regex

from engine.core import EngineCore
from engine.messages import FinishReason, GenerateRequest, GrammarSpec
from engine.sampling_params import DecodingMode, SamplingParams
from server.errors import ApiError
from server.grammar import json_grammar
from tests.engine.driver import drive
from tests.engine.oracle import Answer
from tests.engine.real_text import EOS, passage, real_text_language, real_tokenizer
from tests.engine.schemas import ENDLESS, REFUSED, SCHEMAS, Schema
from tests.engine.tiny import tiny_engine, tiny_model
from tests.engine.workload import follow_random_plans

MAX_TOKENS = 120
TEMPERATURES = (1.0, 1.0, 0.7, 0.0)
"""One request a schema for each."""

PLANS: dict[str, tuple[DecodingMode, int | None]] = {
    "linear": (DecodingMode.LINEAR, 1),
    "tidar, 1 branch": (DecodingMode.TIDAR, 1),
    "tidar, all branches": (DecodingMode.TIDAR, None),
    "auto, another plan at every step": (DecodingMode.AUTO, 1),
}

# RFC 3339, with a leap second in any minute and 29 February in any year, as the grammars have it.
_TIME = r"([01]\d|2[0-3]):[0-5]\d:([0-5]\d|60)(\.\d+)?([zZ]|[+-]([01]\d|2[0-3]):[0-5]\d)"
_DATE = r"\d{4}-((0[13578]|1[02])-(0[1-9]|[12]\d|3[01])|(0[469]|11)-(0[1-9]|[12]\d|30)|02-(0[1-9]|[12]\d))"
_FORMATS = {"date": _DATE, "time": _TIME, "date-time": f"{_DATE}[tT]{_TIME}"}


def _format_checker() -> jsonschema.FormatChecker:
    checker = jsonschema.FormatChecker(["email", "ipv4", "ipv6", "uuid"])
    for name, pattern in _FORMATS.items():
        checker.checks(name)(lambda text, pattern=pattern: regex.fullmatch(pattern, text) is not None)
    return checker


def _has_pattern(validator: Any, pattern: str, instance: Any, schema: Schema) -> Any:
    """Patterns with unicode classes, which Python's own ``re`` lacks."""
    if isinstance(instance, str) and not regex.search(pattern, instance):
        yield jsonschema.ValidationError(f"{instance!r} does not match {pattern!r}")


def validate(text: str, schema: Schema) -> None:
    """Raises ValueError or ValidationError."""
    standard = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
    validator = jsonschema.validators.extend(standard, {"pattern": _has_pattern})
    validator(schema, format_checker=_format_checker()).validate(json.loads(text))


def requests() -> list[GenerateRequest]:
    id_of = real_tokenizer().token_to_id
    likely = [(id_of(text), 5.0) for text in ("}", "]", ",", "@")] + [(id_of('"'), 6.0)]
    unlikely = [(id_of(text), -3.0) for text in ("Ġ", "Ċ")]
    bias = (*likely, (EOS, 4.0), *unlikely)
    made = []
    for name, schema in SCHEMAS.items():
        grammar = GrammarSpec(asyncio.run(json_grammar(schema, "response_format")))
        for seed, temperature in enumerate(TEMPERATURES):
            prompt = tuple(passage(random.Random(f"{name} {seed}"), 6))
            sampling = SamplingParams(MAX_TOKENS, seed=seed, temperature=temperature, logit_bias=bias)
            made.append(GenerateRequest(f"{name}/{seed}", prompt, sampling, DecodingMode.AR, grammar=grammar))
    return made


def engine(num_branches: int | None, depth: int, num_pages: int | None = None) -> EngineCore:
    language = real_text_language()
    return tiny_engine(
        tiny_model("qwen3", 0, 1.0, language),
        page_size=16,
        num_pages=num_pages,
        max_num_seqs=24,
        budget=512,
        depth=depth,
        num_branches=num_branches,
        grammars=language.compiler(),
        max_model_len=MAX_TOKENS + 8,
    )


@pytest.fixture(scope="module")
def answers() -> dict[str, Answer]:
    """What ``ar`` says to every request."""
    asked = requests()
    transcript = drive(engine(1, depth=0), asked)
    return {request.request_id: transcript.answer(request.request_id) for request in asked}


def texts_of(name: str, answers: dict[str, Answer]) -> list[tuple[str, bool]]:
    """A schema's outputs, and whether each ended by itself."""
    found = [answers[f"{name}/{seed}"] for seed in range(len(TEMPERATURES))]
    return [(real_tokenizer().decode(a.token_ids), a.finish_reason is FinishReason.STOP) for a in found]


@pytest.mark.parametrize("name", SCHEMAS)
def test_an_output_that_ends_by_itself_follows_its_schema(name: str, answers: dict[str, Answer]) -> None:
    for text, is_complete in texts_of(name, answers):
        if is_complete:
            validate(text, SCHEMAS[name])


@pytest.mark.parametrize("plan", PLANS)
def test_every_exact_mode_gives_the_same_json(plan: str, answers: dict[str, Answer]) -> None:
    mode, num_branches = PLANS[plan]
    core = engine(num_branches, depth=list(PLANS).index(plan) % 2, num_pages=150)
    if mode is DecodingMode.AUTO:
        follow_random_plans(core, random.Random(plan))
    asked = [replace(request, decoding=mode) for request in requests()]
    transcript = drive(core, asked)
    for request in asked:
        assert transcript.answer(request.request_id) == answers[request.request_id], request.request_id
    stats = core.scheduler.stats()
    assert stats.num_accepted_tokens > 1000, "drafts are accepted under a grammar"


def test_the_outputs_are_worth_comparing(answers: dict[str, Answer]) -> None:
    complete = {name: sum(is_complete for _, is_complete in texts_of(name, answers)) for name in SCHEMAS}
    assert len(SCHEMAS) >= 60
    assert {name for name, count in complete.items() if count == 0} == set(ENDLESS)
    assert sum(complete.values()) > 0.8 * len(answers)
    texts = {text for name in SCHEMAS for text, _ in texts_of(name, answers)}
    assert len(texts) > 0.7 * len(answers)
    assert any(any(ord(char) > 127 for char in text) for text in texts)


@pytest.mark.parametrize("name", REFUSED)
def test_a_schema_that_no_grammar_can_follow_is_refused_by_its_place(name: str) -> None:
    schema, place = REFUSED[name]
    with pytest.raises(ApiError) as caught:
        asyncio.run(json_grammar(schema, "response_format"))
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, "invalid_grammar", "response_format")
    assert f"cannot be used, at {place}: " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_overlapping_alternatives_are_refused_with_what_to_do() -> None:
    with pytest.raises(ApiError, match="use anyOf, or give each a constant"):
        asyncio.run(json_grammar({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "response_format"))
