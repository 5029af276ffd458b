"""Whatever a body holds: an answer or a 400 with the envelope, never a 500, and the server goes on."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.protocol import ChatCompletionRequest, CompletionRequest
from tests.server.conftest import text_script
from tests.server.fake_engine import FakeEngine

NUMBERS = st.one_of(st.integers(-3, 300), st.integers(), st.floats())
WORDS = st.one_of(
    st.sampled_from(
        [
            "",
            "a",
            "auto",
            "none",
            "required",
            "json_object",
            "json_schema",
            "function",
            "text",
            "user",
            "ar",
            "{",
            "(",
            "\ud800",
        ]
    ),
    st.text(max_size=5),
)
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, WORDS)
KEY_NAMES = """type function name parameters json_schema schema properties items $ref $defs anyOf enum role content text
tool_calls arguments json regex choice pattern 5 include_usage required allowed_tools mode"""
KEYS = st.sampled_from(KEY_NAMES.split())
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=8
)

ROUTES = {
    "/v1/chat/completions": (ChatCompletionRequest, {"messages": [{"role": "user", "content": "hi"}]}),
    "/v1/completions": (CompletionRequest, {"prompt": "hi"}),
}


@pytest.mark.parametrize("route", ROUTES)
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_body_is_a_500(make_app, tool_tokenizer, route, data):
    model, body = ROUTES[route]
    names = [name for name in model.model_fields if name != "model"]
    fields = data.draw(st.dictionaries(st.sampled_from(names), VALUES, max_size=4))

    async def send():
        app = make_app(FakeEngine(lambda r: text_script(tool_tokenizer, "[{}]", 3)), words=tool_tokenizer)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            content = json.dumps({**body, **fields}).encode()
            answer = await client.post(route, content=content, headers={"Content-Type": "application/json"})
            again = await client.post(route, json=body)
        return answer, again

    answer, again = asyncio.run(send())
    assert answer.status_code in (200, 400), answer.text
    if answer.status_code == 400:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert again.status_code == 200
