"""Tool calls and thinking on the wire; every stream is checked against the answer in one piece, at every step size."""

from __future__ import annotations

import functools
import json

import openai
import pytest

from engine import Thinking
from tests.server.conftest import chat, listening, message_of, message_of_whole, sse_data, text_script
from tests.server.fake_engine import FakeEngine

pytestmark = pytest.mark.anyio
URL = "/v1/chat/completions"

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
TIME = {"type": "function", "function": {"name": "time"}}
NAMED = {"type": "function", "function": {"name": "weather"}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich 🙂"}}\n</tool_call>'
ARGUMENTS = '{"city": "Zürich 🙂"}'
OTHER_CALL = '<tool_call>{"name": "time", "arguments": {}}</tool_call>'


@pytest.fixture
def ask(make_client, tool_tokenizer):
    """The message and the engine's request of one text, which streams and step sizes must not change."""

    async def ask(text, step=1, settings=None, **fields):
        engine = FakeEngine(lambda r: text_script(tool_tokenizer, text, step))
        async with make_client(engine, words=tool_tokenizer, **(settings or {})) as client:
            answer = await client.post(URL, json=chat(**fields))
            assert answer.status_code == 200, answer.text
            events = sse_data((await client.post(URL, json=chat(stream=True, **fields))).text)
        whole = message_of_whole(answer.json()["choices"][0])
        assert message_of(events) == whole
        return whole, engine.requests[0]

    return ask


@pytest.mark.parametrize("step", [1, 2, 3, 7, 100])
async def test_calls_of_a_model_that_decides(ask, step):
    message, _ = await ask(f"I ask.\n{CALL}\n{OTHER_CALL}", step, tools=[WEATHER, TIME])
    assert message["content"] == "I ask."
    assert message["calls"] == [("weather", ARGUMENTS), ("time", "{}")]
    assert message["finish_reason"] == "tool_calls"


async def test_content_is_null_beside_calls_and_ids_are_unique(make_client, tool_tokenizer):
    engine = FakeEngine(lambda r: text_script(tool_tokenizer, CALL + OTHER_CALL))
    async with make_client(engine, words=tool_tokenizer) as client:
        message = (await client.post(URL, json=chat(tools=[WEATHER]))).json()["choices"][0]["message"]
    assert message["content"] is None
    ids = [call["id"] for call in message["tool_calls"]]
    assert len(set(ids)) == 2
    assert all(i.startswith("call_") for i in ids)
    assert {call["type"] for call in message["tool_calls"]} == {"function"}


async def test_mistral_gets_the_short_ids_that_its_template_takes(make_client, tokenizer):
    text = '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Bern"}}]'
    engine = FakeEngine(lambda r: text_script(tokenizer, text))
    async with make_client(engine, tool_call_parser="mistral") as client:
        [call] = (await client.post(URL, json=chat(tools=[WEATHER]))).json()["choices"][0]["message"]["tool_calls"]
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Bern"}'}
    assert len(call["id"]) == 9
    assert call["id"].isalnum()


async def test_without_parallel_calls_the_first_one_counts(ask):
    message, _ = await ask(CALL + OTHER_CALL, tools=[WEATHER, TIME], parallel_tool_calls=False)
    assert message["calls"] == [("weather", ARGUMENTS)]


async def test_without_tools_the_text_is_what_the_model_wrote(ask):
    for fields in ({}, {"tools": [WEATHER], "tool_choice": "none"}):
        message, _ = await ask("a {} b", **fields)
        assert (message["content"], message["calls"], message["finish_reason"]) == ("a {} b", [], "stop")


async def test_tools_reach_the_template_unless_they_are_not_to_be_called(ask, tool_tokenizer):
    for fields, is_there in (({}, True), ({"tool_choice": "none"}, False), ({"tool_choice": "required"}, True)):
        _, request = await ask("[]", tools=[WEATHER], **fields)
        prompt = tool_tokenizer.decode(request.prompt_token_ids, skip_special_tokens=False)
        assert ("<|system|>weather<|end|>" in prompt) is is_there


async def test_a_conversation_with_calls_and_results_is_rendered(make_client, tool_tokenizer):
    engine = FakeEngine()
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
    messages = [
        {"role": "user", "content": "and?"},
        {"role": "assistant", "content": None, "reasoning": "hm", "tool_calls": [call], "refusal": None},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    ]
    async with make_client(engine, words=tool_tokenizer) as client:
        answer = await client.post(URL, json={"messages": messages, "tools": [WEATHER]})
    assert answer.status_code == 200
    prompt = tool_tokenizer.decode(engine.requests[0].prompt_token_ids, skip_special_tokens=False)
    assert prompt == (
        "<|bos|><|system|>weather<|end|><|user|>and?<|end|><|assistant|><think>hm</think>"
        '<tool_call>{"name": "weather", "arguments": {"city": "Bern"}}</tool_call><|end|><|user|>rain<|end|><|assistant|>'
    )


@pytest.mark.parametrize("step", [1, 3, 100])
async def test_a_named_function_is_answered_by_its_arguments(ask, step):
    message, request = await ask(ARGUMENTS, step, tools=[WEATHER, TIME], tool_choice=NAMED)
    assert message["calls"] == [("weather", ARGUMENTS)]
    assert (message["content"], message["finish_reason"]) == ("", "stop")
    assert "city" in request.grammar.source
    assert "time" not in request.grammar.source


@pytest.mark.parametrize("step", [1, 3, 100])
async def test_required_calls_come_from_an_array(ask, step):
    text = f'[{{"name": "weather", "parameters": {ARGUMENTS}}}, {{"name": "time", "parameters": {{}}}}]'
    message, request = await ask(text, step, tools=[WEATHER, TIME], tool_choice="required")
    assert message["calls"] == [("weather", ARGUMENTS), ("time", "{}")]
    assert message["finish_reason"] == "tool_calls"
    assert '"time"' in request.grammar.source.replace("\\", "")


async def test_a_call_that_was_cut_off_is_no_finished_call(ask, tool_tokenizer):
    tokens = len(tool_tokenizer.encode(CALL, add_special_tokens=False))
    message, _ = await ask(CALL, tools=[WEATHER], max_tokens=tokens - 8)
    assert message["finish_reason"] == "length"
    assert message["calls"][0][0] == "weather"
    assert ARGUMENTS.startswith(message["calls"][0][1].rstrip("\ufffd"))


@pytest.mark.parametrize("step", [1, 100])
@pytest.mark.parametrize(
    ("stop", "arguments", "reason"),
    [("city", '{"', "stop"), ("Z", '{"city": "', "stop"), ("]", ARGUMENTS, "tool_calls")],
)
async def test_only_a_stop_behind_a_call_leaves_it_finished(ask, tool_tokenizer, step, stop, arguments, reason):
    text = f'[{{"name": "weather", "parameters": {ARGUMENTS}}}]'
    fields = {"tools": [WEATHER], "tool_choice": "required"}
    message, _ = await ask(text, step, stop=[stop], **fields)
    assert (message["calls"], message["finish_reason"]) == ([("weather", arguments)], reason)
    ids = tool_tokenizer.encode(stop, add_special_tokens=False)
    if len(ids) == 1:
        message, _ = await ask(text, step, stop_token_ids=ids, **fields)
        assert (message["calls"], message["finish_reason"]) == ([("weather", arguments)], reason)


REQUIRED_TEXT = f'[{{"name": "weather", "parameters": {ARGUMENTS}}}, {{"name": "time", "parameters": {{}}}}]'


@pytest.mark.parametrize(("choice", "text"), [("required", REQUIRED_TEXT), (NAMED, ARGUMENTS)])
async def test_a_demanded_call_that_is_cut_anywhere_is_never_content(make_app, tool_tokenizer, choice, text):
    """Its arguments are as far as they came; before its name is known there is nothing to tell."""
    engine = FakeEngine(lambda r: text_script(tool_tokenizer, text))
    num_tokens = len(tool_tokenizer.encode(text, add_special_tokens=False))
    fields = {
        "model": "tidar",
        "messages": [{"role": "user", "content": "hi"}],
        "tools": [WEATHER, TIME],
        "tool_choice": choice,
    }
    async with (
        listening(make_app(engine, words=tool_tokenizer)) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        num_named = []
        for max_tokens in range(1, num_tokens + 1):
            whole = (await client.chat.completions.create(**fields, max_tokens=max_tokens)).choices[0]
            calls = [(call.function.name, call.function.arguments) for call in whole.message.tool_calls or ()]
            stream = await client.chat.completions.create(**fields, max_tokens=max_tokens, stream=True)
            streamed = message_of([chunk.model_dump() async for chunk in stream])
            assert (whole.finish_reason, streamed["finish_reason"]) == ("length", "length")
            assert (whole.message.content or "", streamed["content"]) == ("", "")
            assert streamed["calls"] == calls
            for (name, arguments), (full_name, full) in zip(calls, [("weather", ARGUMENTS), ("time", "{}")], strict=False):
                assert name == full_name
                assert full.startswith(arguments.rstrip("\ufffd"))
            num_named.append(len(calls))
    assert num_named == sorted(num_named)
    assert set(num_named) == ({0, 1, 2} if choice == "required" else {1})


async def test_choices_call_each_for_itself(make_client, tool_tokenizer):
    texts = {"0": CALL, "1": "no call", "2": OTHER_CALL}
    engine = FakeEngine(lambda r: text_script(tool_tokenizer, texts[r.request_id[-1]], 3))
    async with make_client(engine, words=tool_tokenizer) as client:
        body = (await client.post(URL, json=chat(n=3, tools=[WEATHER]))).json()
        events = sse_data((await client.post(URL, json=chat(n=3, tools=[WEATHER], stream=True))).text)
    wholes = [message_of_whole(choice) for choice in body["choices"]]
    assert [whole["finish_reason"] for whole in wholes] == ["tool_calls", "stop", "tool_calls"]
    assert [message_of(events, i) for i in range(3)] == wholes


@pytest.mark.parametrize("step", [1, 2, 100])
async def test_thinking_has_both_names(ask, step):
    message, _ = await ask(f"<think>\nhm 🙂\n</think>\n\nyes\n{CALL}", step, tools=[WEATHER])
    assert (message["reasoning"], message["content"]) == ("hm 🙂", "yes")
    assert message["calls"] == [("weather", ARGUMENTS)]


async def test_thinking_that_the_prompt_has_opened(ask):
    message, request = await ask("hm</think>yes", chat_template_kwargs={"thinks": True})
    assert (message["reasoning"], message["content"]) == ("hm", "yes")
    assert request.grammar is None


async def test_a_parser_that_is_switched_off_leaves_the_text_alone(ask):
    settings = {"reasoning_parser": "none", "tool_call_parser": "none"}
    message, _ = await ask("a<think>b</think>c", settings=settings, skip_special_tokens=False)
    assert message["content"] == "a<think>b</think>c<|end|>".removesuffix("<|end|>")


async def test_a_grammar_begins_where_thinking_ends(ask, tool_tokenizer):
    begin, end = tool_tokenizer.id_of("<think>"), tool_tokenizer.id_of("</think>")
    answer = functools.partial(ask, '<think>a</think>{"a": 1}', response_format={"type": "json_object"})
    message, request = await answer()
    assert request.grammar.thinking == Thinking(end, begin, is_open=False)
    assert json.loads(message["content"]) == {"a": 1}
    _, request = await answer(chat_template_kwargs={"thinks": True})
    assert request.grammar.thinking == Thinking(end, begin, is_open=True)
    _, request = await answer(settings={"reasoning_parser": "none"})
    assert request.grammar.thinking is None


async def test_response_format_gives_way_to_a_demanded_call(ask):
    message, request = await ask(ARGUMENTS, tools=[WEATHER], tool_choice=NAMED, response_format={"type": "json_object"})
    assert message["calls"] == [("weather", ARGUMENTS)]
    assert "city" in request.grammar.source


@pytest.mark.parametrize("step", [1, 3, 100])
async def test_a_model_that_decides_beside_response_format(ask, step, tool_tokenizer):
    """It calls, or its answer follows the schema: the grammar has both, and the parser tells them apart."""
    schema = {
        "type": "object",
        "properties": {"rain": {"type": "boolean"}},
        "required": ["rain"],
        "additionalProperties": False,
    }
    fields = {
        "tools": [WEATHER, TIME],
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
    }
    message, request = await ask('{"rain": true}', step, **fields)
    assert (message["content"], message["calls"], message["finish_reason"]) == ('{"rain": true}', [], "stop")
    for part in ("rain", "city", "time", f"<[{tool_tokenizer.id_of('<tool_call>')}]>"):
        assert part in request.grammar.source
    message, _ = await ask(f"{CALL}\n{OTHER_CALL}", step, **fields)
    assert (message["content"], message["calls"]) == ("", [("weather", ARGUMENTS), ("time", "{}")])
    assert message["finish_reason"] == "tool_calls"


async def test_allowed_tools_are_the_only_ones(ask, tool_tokenizer):
    for mode, has_grammar in (("auto", False), ("required", True)):
        _, request = await ask("[]", tools=[WEATHER, TIME], tool_choice=allowed(mode, "time"))
        prompt = tool_tokenizer.decode(request.prompt_token_ids, skip_special_tokens=False)
        assert "<|system|>time<|end|>" in prompt
        assert "weather" not in prompt
        assert (request.grammar is not None) is has_grammar
        if has_grammar:
            assert "city" not in request.grammar.source
    message, _ = await ask(
        '[{"name": "time", "parameters": {}}]', tools=[WEATHER, TIME], tool_choice=allowed("required", "time")
    )
    assert (message["calls"], message["finish_reason"]) == ([("time", "{}")], "tool_calls")


def tool(**changes):
    return {"type": "function", "function": {"name": "f", **changes}}


def allowed(mode, *names):
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


DEEP = functools.reduce(lambda inner, _: {"type": "array", "items": inner}, range(300), {})

LARGE = [tool(name=f"f{i}", parameters={"properties": {"a": {"enum": ["x" * 3000]}}}) for i in range(100)]

WRONG = [
    ({"tools": LARGE, "tool_choice": "required"}, "tools", "tools makes a grammar of"),
    ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools", "tools.0.type"),
    ({"tools": [{"type": "function"}]}, "tools", "tools.0.function"),
    ({"tools": [tool(), tool(name="no spaces")]}, "tools", "tools.1.function.name"),
    ({"tools": [tool(), tool()]}, "tools", "two functions"),
    ({"tools": [tool(parameters=[])]}, "tools", "tools.0.function.parameters"),
    ({"tools": [tool(parameters={"type": "string"})]}, "tools", "must be 'object'"),
    ({"tools": [tool(name=f"f{i}") for i in range(129)]}, "tools", "128"),
    ({"tool_choice": "required"}, "tool_choice", "needs tools"),
    ({"tools": [tool()], "tool_choice": "maybe"}, "tool_choice", "none, auto, required"),
    ({"tools": [tool()], "tool_choice": {"type": "function", "function": "f"}}, "tool_choice", "none, auto, required"),
    ({"tools": [tool()], "tool_choice": {"type": "function", "function": {"name": ["f"]}}}, "tool_choice", "none, auto"),
    ({"tools": [tool()], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice", "'g'"),
    ({"tools": [tool()], "tool_choice": {"type": "allowed_tools"}}, "tool_choice", "allowed_tools must be an object"),
    (
        {"tools": [tool()], "tool_choice": {"type": "allowed_tools", "mode": "required", "tools": [tool()]}},
        "tool_choice",
        "tool_choice.allowed_tools must be an object",
    ),
    ({"tools": [tool()], "tool_choice": allowed("none", "f")}, "tool_choice", "tool_choice.allowed_tools.mode"),
    ({"tools": [tool()], "tool_choice": allowed("auto")}, "tool_choice", "tool_choice.allowed_tools.tools must be a list"),
    ({"tools": [tool()], "tool_choice": allowed("auto", "f", "g")}, "tool_choice", "allowed_tools.tools.1 names 'g'"),
    ({"tools": [tool()], "tool_choice": allowed("auto", ["f"])}, "tool_choice", "allowed_tools.tools.0 must be a function"),
    ({"tools": [tool()], "guided_regex": "a+"}, "tool_choice", "only a JSON answer"),
    ({"tools": [tool()], "guided_choice": ["a"]}, "tool_choice", "only a JSON answer"),
    ({"tool_choice": allowed("auto", "f")}, "tool_choice", "allowed_tools.tools.0 names 'f'"),
    (
        {"tools": [tool(), tool(name="g", parameters={"not": {}})], "response_format": {"type": "json_object"}},
        "tools",
        "tools.1.function.parameters cannot be used, at $",
    ),
    (
        {"tools": [tool(), tool(name="g", parameters={"not": {}})], "tool_choice": allowed("required", "g")},
        "tools",
        "tools.1.function.parameters cannot be used, at $",
    ),
    (
        {"tools": [tool(), tool(name="g", parameters={"properties": {"a": {"type": "wrong"}}})], "tool_choice": "required"},
        "tools",
        "tools.1.function.parameters cannot be used, at $.properties.a",
    ),
    ({"tools": [tool(parameters={"properties": {"a": DEEP}})], "tool_choice": "required"}, "tools", "tools.0 is nested"),
    ({"tools": [tool(), tool(name="g", parameters={"properties": {"a": DEEP}})]}, "tools", "tools.1 is nested"),
]


@pytest.mark.parametrize(("fields", "param", "message"), WRONG)
async def test_wrong_tools_are_a_400(make_client, tool_tokenizer, fields, param, message):
    engine = FakeEngine()
    async with make_client(engine, words=tool_tokenizer) as client:
        answer = await client.post(URL, json=chat(**fields))
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == param
    assert message in error["message"]
    assert not engine.requests


async def test_a_model_whose_calls_nobody_can_read_is_not_offered_tools(make_client):
    async with make_client(FakeEngine()) as client:
        answer = await client.post(URL, json=chat(tools=[WEATHER]))
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tools")
        assert "--tool-call-parser" in answer.json()["error"]["message"]
        assert (await client.post(URL, json=chat(tools=[WEATHER], tool_choice=NAMED))).status_code == 200


@pytest.mark.parametrize("arguments", ["{", "[" * 100_000, '{"a": ' * 101 + "1" + "}" * 101, "not json", '"\\ud800"'])
async def test_a_wrong_call_in_the_conversation_is_a_400(make_client, tool_tokenizer, arguments):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    messages = [{"role": "assistant", "tool_calls": [call]}, {"role": "user", "content": "x"}]
    async with make_client(FakeEngine(), words=tool_tokenizer) as client:
        answer = await client.post(URL, json={"messages": messages})
    assert answer.status_code == 400
    assert "messages.0.tool_calls.0" in answer.json()["error"]["message"]


async def test_a_list_of_tools_without_end_is_refused_at_once(make_client):
    tool = {"type": "function", "function": {"name": "f"}}
    async with make_client(FakeEngine()) as client:
        for tools in ([1] * 200_000, [tool] * 129):
            answer = await client.post(URL, json=chat(tools=tools))
            assert answer.status_code == 400
            assert len(answer.text) < 1000
