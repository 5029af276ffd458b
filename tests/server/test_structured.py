"""What constrains the output: what reaches the engine, and what is refused with the place that is wrong."""

from __future__ import annotations

import asyncio
import threading

import pytest

from engine import DecodingMode
from server import grammar
from tests.server.conftest import chat
from tests.server.fake_engine import FakeEngine, tidar_info

pytestmark = pytest.mark.anyio
CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
PERSON = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}


def json_schema(schema):
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"response_format": {"type": "json_object"}}, "object"),
        ({"response_format": json_schema(PERSON)}, "name"),
        ({"structured_outputs": {"json": PERSON}}, "name"),
        ({"structured_outputs": {"json_object": True}}, "object"),
        ({"structured_outputs": {"json": PERSON, "disable_any_whitespace": True, "disable_fallback": True}}, "name"),
        ({"structured_outputs": {"regex": "[xyz]+", "choice": None}}, "[xyz]+"),
        ({"guided_json": PERSON}, "name"),
        ({"guided_json": '{"type": "integer"}'}, "integer"),
        ({"guided_regex": "[xyz]+"}, "[xyz]+"),
        ({"guided_choice": ["yes", 'n"o', "🙂"]}, "yes"),
        ({"guided_grammar": 'start: "a" | "b"'}, "start"),
        ({"guided_grammar": 'start: "x ::= y"'}, "start"),
    ],
)
async def test_a_constraint_reaches_the_engine(make_client, fields, part):
    engine = FakeEngine()
    async with make_client(engine) as client:
        for url, body in ((CHAT, chat(**fields)), (TEXT, {"prompt": "a", **fields})):
            answer = await client.post(url, json=body)
            assert answer.status_code == 200, answer.text
    for request in engine.requests:
        assert part in request.grammar.source
        assert request.grammar.thinking is None


async def test_plain_text_is_not_constrained(make_client):
    engine = FakeEngine()
    async with make_client(engine) as client:
        await client.post(CHAT, json=chat(response_format={"type": "text"}))
        await client.post(CHAT, json=chat())
    assert [r.grammar for r in engine.requests] == [None, None]


BAD_NODE = {"type": "wrong"}


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"response_format": {"type": "yaml"}}, "response_format", "text, json_object or json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "with a schema in it"),
        ({"response_format": json_schema({"type": "wrong"})}, "response_format", "at $:"),
        (
            {"response_format": json_schema({"properties": {"a": {"items": BAD_NODE}}})},
            "response_format",
            "at $.properties.a.items:",
        ),
        ({"response_format": json_schema({"properties": {"a b": BAD_NODE}})}, "response_format", 'at $.properties["a b"]:'),
        ({"response_format": json_schema({"anyOf": [{}, BAD_NODE]})}, "response_format", "at $.anyOf[1]:"),
        (
            {"response_format": json_schema({"$defs": {"x": {"not": {}}}, "properties": {"a": {"$ref": "#/$defs/x"}}})},
            "response_format",
            "at $.",
        ),
        ({"response_format": json_schema({"$ref": "#/$defs/missing"})}, "response_format", "at $"),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"choice": ["a"] * 2000}}, "structured_outputs", "more than the 1024"),
        ({"structured_outputs": {"structural_tag": "a"}}, "structured_outputs", "structured_outputs.structural_tag is not"),
        ({"structured_outputs": {"json": {}, "whitespace_pattern": "a"}}, "structured_outputs", "whitespace_pattern is not"),
        ({"structured_outputs": {"disable_any_whitespace": True}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"json": 3}}, "structured_outputs", "must be a JSON object"),
        ({"structured_outputs": {"regex": 3}}, "structured_outputs", "must be a text"),
        ({"guided_json": "{"}, "guided_json", "not JSON"),
        ({"guided_json": "[" * 100_000}, "guided_json", "more than 100 levels"),
        ({"guided_json": "[" * 101 + "]" * 101}, "guided_json", "more than 100 levels"),
        ({"guided_json": '{"const": "\\ud800"}'}, "guided_json", "surrogate"),
        ({"guided_json": {"enum": ["x" * 300_000]}}, "guided_json", "characters"),
        ({"guided_regex": "("}, "guided_regex", "cannot be used"),
        ({"guided_regex": ""}, "guided_regex", "not empty"),
        ({"guided_regex": "a" * 300_000}, "guided_regex", "characters"),
        ({"guided_choice": []}, "guided_choice", "not empty"),
        ({"guided_choice": [""]}, "guided_choice", "not empty"),
        ({"guided_grammar": "start: nothing"}, "guided_grammar", "cannot be used"),
        ({"guided_grammar": 'root ::= "a" | "b"'}, "guided_grammar", "must be a lark grammar"),
        ({"structured_outputs": {"grammar": '# all\n root-1 ::= "a"'}}, "structured_outputs", "must be a lark grammar"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex", "both constrain"),
    ],
)
async def test_a_wrong_constraint_is_a_400_that_says_where(make_client, fields, param, message):
    engine = FakeEngine()
    async with make_client(engine) as client:
        answer = await client.post(CHAT, json=chat(**fields))
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert message in error["message"]
    assert not engine.requests


async def test_a_hard_schema_stands_in_nobodys_way(make_client, monkeypatch):
    """While one is being compiled, others are answered."""
    compiling, go_on = threading.Event(), threading.Event()

    def compile_slowly(text):
        compiling.set()
        assert go_on.wait(30)
        return "{}", "", ""

    monkeypatch.setattr(grammar, "_compile_json", compile_slowly)
    async with make_client(FakeEngine()) as client:
        slow = asyncio.create_task(client.post(CHAT, json=chat(guided_json=PERSON)))
        assert await asyncio.to_thread(compiling.wait, 30)
        assert (await client.post(CHAT, json=chat())).status_code == 200
        assert not slow.done()
        go_on.set()
        assert (await slow).status_code == 200


DIFFUSION = [
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"guided_regex": "a"}, "guided_regex"),
    ({"frequency_penalty": 0.5}, "frequency_penalty"),
    ({"presence_penalty": -0.5}, "presence_penalty"),
    ({"repetition_penalty": 1.1}, "repetition_penalty"),
    ({"min_tokens": 2}, "min_tokens"),
    ({"logprobs": True}, "logprobs"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "required"}, "tool_choice"),
]


@pytest.mark.parametrize(("fields", "param"), DIFFUSION)
async def test_diffusion_refuses_what_needs_verified_tokens(make_client, fields, param):
    for info, decoding in ((tidar_info(), "diffusion"), (tidar_info(default_mode=DecodingMode.DIFFUSION), None)):
        engine = FakeEngine(info=info)
        async with make_client(engine) as client:
            answer = await client.post(CHAT, json=chat(decoding=decoding, **fields))
            assert answer.status_code == 400
            assert answer.json()["error"]["param"] == param
            assert "diffusion" in answer.json()["error"]["message"]
            assert not engine.requests
            assert (await client.post(CHAT, json=chat(decoding="tidar", **fields))).status_code == 200
            assert (await client.post(CHAT, json=chat(decoding=decoding, temperature=0.5))).status_code == 200


async def test_sampling_reaches_the_engine(make_client):
    engine = FakeEngine()
    fields = {"frequency_penalty": 0.5, "presence_penalty": -0.5, "repetition_penalty": 1.1, "min_tokens": 3}
    async with make_client(engine) as client:
        assert (await client.post(CHAT, json=chat(**fields, logit_bias={"70": 1.5, "71": -100}))).status_code == 200
        for bias in ({"x": 1}, {"400": 1}, {"-1": 1}, {"70": 101}, {"²": 1}, {str(i): 0 for i in range(301)}):
            answer = await client.post(CHAT, json=chat(logit_bias=bias))
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "logit_bias"), bias
        for name in fields:
            answer = await client.post(CHAT, json=chat(max_tokens=5, **{name: 1000}))
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)
    sampling = engine.requests[0].sampling
    assert {name: getattr(sampling, name) for name in fields} == fields
    assert sampling.logit_bias == ((70, 1.5), (71, -100.0))
