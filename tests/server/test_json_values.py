"""Nesting without end and halves of characters, anywhere in a body: a 400 that names the field, over a real socket."""

from __future__ import annotations

import json

import httpx
import openai
import pytest

from tests.server.conftest import chat, listening
from tests.server.fake_engine import FakeEngine

pytestmark = pytest.mark.anyio
CHAT = "/v1/chat/completions"
HALF = "\ud800"


def nested(levels, wrap, inner):
    for _ in range(levels):
        inner = wrap(inner)
    return inner


def items(schema):
    return {"type": "array", "items": schema}


def alternatives(schema):
    return {"anyOf": [schema]}


def response_format(schema):
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


def function(**fields):
    return {"type": "function", "function": {"name": "f", **fields}}


@pytest.fixture
async def client(make_app, tool_tokenizer):
    engine = FakeEngine()
    async with (
        listening(make_app(engine, words=tool_tokenizer)) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


async def refused(client, body):
    """The error that the client sees, which must be text that can be printed."""
    with pytest.raises(openai.BadRequestError) as error:
        await client.post("/chat/completions", cast_to=httpx.Response, body=body)
    error.value.body["message"].encode()
    return error.value.body


@pytest.mark.parametrize("wrap", [items, alternatives])
@pytest.mark.parametrize("levels", [150, 400])
@pytest.mark.parametrize(
    ("fields", "where"),
    [
        (lambda schema: {"response_format": response_format(schema)}, "response_format"),
        (lambda schema: {"structured_outputs": {"json": schema}}, "structured_outputs"),
        (lambda schema: {"guided_json": schema}, "guided_json"),
        (lambda schema: {"guided_json": json.dumps(schema)}, "the schema"),
        (lambda schema: {"tools": [function(), function(name="g", parameters=schema)]}, "tools.1"),
        (lambda schema: {"tools": [function(parameters=schema)], "tool_choice": "required"}, "tools.0"),
        (lambda schema: {"chat_template_kwargs": {"a": schema}}, "chat_template_kwargs"),
        (lambda schema: {"messages": [{"role": "user", "content": "hi", "a": schema}]}, "messages.0"),
    ],
)
async def test_the_limit_of_the_depth_is_named(client, fields, where, levels, wrap):
    error = await refused(client, chat() | fields(nested(levels, wrap, {"type": "integer"})))
    assert error["message"] == f"{where} is nested more than 100 levels deep; simplify it"
    assert error["code"] == "nested_too_deeply"
    assert error["param"] in (where.partition(".")[0], "guided_json")


async def test_a_depth_that_people_use_is_allowed(client):
    for wrap in (items, alternatives):
        schema = nested(40, wrap, {"type": "integer"})
        fields = {"tools": [function(parameters={"properties": {"a": schema}})], "tool_choice": "required"}
        await client.post("/chat/completions", cast_to=httpx.Response, body=chat(**fields))


async def test_a_body_that_cannot_even_be_read(client):
    content = b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    async with httpx.AsyncClient(base_url=str(client.base_url)) as raw:
        answer = await raw.post("chat/completions", content=content, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "nested_too_deeply")


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": f"a{HALF}"}]}, "messages.1"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": HALF}]}]}, "messages.0"),
        ({"messages": [{"role": "user", "content": "a", "name": HALF}]}, "messages.0"),
        ({"stop": [f"a{HALF}"]}, "stop.0"),
        ({"stop": HALF}, "stop"),
        ({"model": HALF}, "model"),
        ({"decoding": HALF}, "decoding"),
        ({"cache_salt": HALF}, "cache_salt"),
        ({"tools": [function(), function(name=HALF)]}, "tools.1"),
        ({"tools": [function(description=HALF)]}, "tools.0"),
        ({"tools": [function()], "tool_choice": function(name=HALF)}, "tool_choice"),
        ({"chat_template_kwargs": {HALF: 1}}, "chat_template_kwargs"),
        ({"logit_bias": {HALF: 1}}, "logit_bias"),
        ({"response_format": response_format({"enum": ["a", HALF]})}, "response_format"),
        ({"response_format": response_format({"const": HALF})}, "response_format"),
        ({"response_format": response_format({"type": "string", "pattern": HALF})}, "response_format"),
        ({"response_format": response_format({"properties": {HALF: {}}})}, "response_format"),
        ({"structured_outputs": {"regex": HALF}}, "structured_outputs"),
        ({"guided_json": json.dumps({"const": HALF})}, "the schema"),
        ({"guided_regex": HALF}, "guided_regex"),
        ({"guided_choice": ["a", HALF]}, "guided_choice.1"),
        ({"guided_grammar": f'start: "{HALF}"'}, "guided_grammar"),
        ({"unknown": HALF}, "unknown"),
        ({HALF: 1}, "the name of a field"),
    ],
)
async def test_half_of_a_surrogate_pair_is_named(client, fields, where):
    content = json.dumps(chat() | fields).encode()
    async with httpx.AsyncClient(base_url=str(client.base_url)) as raw:
        answer = await raw.post("chat/completions", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["message"].startswith(f"{where} holds half of a surrogate pair")
    error["message"].encode()


async def test_an_escape_of_a_pattern_is_a_regular_expressions_own(client):
    """``\\ud800`` in the pattern's text is not a half in JSON, but it is one for the pattern."""
    for fields in (
        {"guided_regex": r"\ud800"},
        {"response_format": response_format({"type": "string", "pattern": r"^\ud800$"})},
    ):
        assert "cannot be used" in (await refused(client, chat(**fields)))["message"]


async def test_more_values_than_anybody_needs(client):
    error = await refused(client, chat() | {"unknown": [{}] * 600_000})
    assert "500000 values" in error["message"]
