"""Real sockets and the OpenAI client."""

from __future__ import annotations

import asyncio

import httpx
import openai
import pytest

from tests.server.conftest import chat, listening, text_script
from tests.server.fake_engine import End, FakeEngine, Script

pytestmark = pytest.mark.anyio
MESSAGES = [{"role": "user", "content": "hi"}]
TEXT = "naïve 🙂 cat"


def client_of(url, **kwargs):
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="key", **kwargs)


async def test_the_async_client(make_app, tokenizer):
    engine = FakeEngine(lambda r: text_script(tokenizer, TEXT, step=3, cached_tokens=1))
    async with listening(make_app(engine, api_keys=("key",))) as url, client_of(url) as client:
        assert [m.id async for m in client.models.list()] == ["tidar"]
        whole = await client.chat.completions.create(model="tidar", messages=MESSAGES, seed=1)
        stream = await client.chat.completions.create(
            model="tidar", messages=MESSAGES, stream=True, stream_options={"include_usage": True}, extra_body={"decoding": "ar"}
        )
        chunks = [chunk async for chunk in stream]
        text = await client.completions.create(model="tidar", prompt="hi", n=2)
    assert whole.choices[0].message.content == TEXT
    assert whole.choices[0].finish_reason == "stop"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == TEXT
    assert chunks[-1].usage == whole.usage
    assert whole.usage.prompt_tokens_details.cached_tokens == 1
    assert [choice.text for choice in text.choices] == [TEXT, TEXT]


async def test_the_sync_client_in_a_thread(make_app, tokenizer):
    def ask(url):
        with openai.OpenAI(base_url=f"{url}/v1", api_key="key") as client:
            with client.chat.completions.create(model="tidar", messages=MESSAGES, stream=True) as stream:
                streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
            whole = client.chat.completions.create(model="tidar", messages=MESSAGES)
            with pytest.raises(openai.NotFoundError) as not_found:
                client.chat.completions.create(model="other", messages=MESSAGES)
            with pytest.raises(openai.BadRequestError) as bad:
                client.chat.completions.create(model="tidar", messages=MESSAGES, temperature=9)
            return streamed, whole.choices[0].message.content, not_found.value.code, bad.value.param

    engine = FakeEngine(lambda r: text_script(tokenizer, TEXT))
    async with listening(make_app(engine)) as url:
        assert await asyncio.to_thread(ask, url) == (TEXT, TEXT, "model_not_found", "temperature")


async def test_the_client_sees_a_broken_stream_as_an_error(make_app, tokenizer):
    engine = FakeEngine(lambda r: text_script(tokenizer, TEXT, end=End.DIE))
    async with listening(make_app(engine)) as url, client_of(url) as client:
        stream = await client.chat.completions.create(model="tidar", messages=MESSAGES, stream=True)
        with pytest.raises(openai.APIError, match="engine"):
            async for _ in stream:
                pass


async def test_the_client_retries_a_full_queue(make_app, tokenizer):
    engine = FakeEngine(lambda r: text_script(tokenizer, TEXT), capacity=0)

    async def make_room(request):
        if "x-stainless-retry-count" in request.headers:
            engine.capacity = int(request.headers["x-stainless-retry-count"])

    async with (
        listening(make_app(engine, retry_after=0)) as url,
        httpx.AsyncClient(event_hooks={"request": [make_room]}) as http,
        client_of(url, http_client=http) as client,
    ):
        answer = await client.chat.completions.create(model="tidar", messages=MESSAGES)
    assert answer.choices[0].message.content == TEXT


@pytest.mark.parametrize("stream", [False, True])
async def test_closing_the_connection_aborts(make_app, stream):
    engine = FakeEngine(lambda r: Script([[70]], end=End.HANG))
    async with listening(make_app(engine)) as url, httpx.AsyncClient(base_url=url, timeout=30) as client:
        request = asyncio.create_task(client.post("/v1/chat/completions", json=chat(stream=stream)))
        await engine.until(lambda e: e.running)
        request.cancel()
        await engine.until(lambda e: e.aborted)
    assert not engine.running


async def test_the_lifespan_ends_the_engine(make_app):
    engine = FakeEngine()
    async with listening(make_app(engine)):
        assert not engine.is_shut_down
    assert engine.is_shut_down
