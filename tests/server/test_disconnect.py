"""Clients that leave, clients that read slowly, streams that are silent, and the drain."""

from __future__ import annotations

import asyncio
import json

import pytest

from server.lifecycle import Lifecycle
from tests.server.conftest import chat, sse_data, stream_text, text_script
from tests.server.fake_engine import End, FakeEngine, Script

pytestmark = pytest.mark.anyio
CHAT = "/v1/chat/completions"


class Client:
    """One request, driven by hand: the test decides when the client leaves and how fast it reads."""

    def __init__(self, app, body):
        content = json.dumps(body).encode()
        self.messages = []
        self.may_read = asyncio.Event()
        self.may_read.set()
        self.got_body = asyncio.Event()
        self._incoming = asyncio.Queue()
        self._incoming.put_nowait({"type": "http.request", "body": content, "more_body": False})
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": CHAT,
            "raw_path": CHAT.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"content-type", b"application/json")],
            "client": ("test", 1),
            "server": ("test", 80),
        }
        self.task = asyncio.create_task(app(scope, self._incoming.get, self._send))

    async def _send(self, message):
        await self.may_read.wait()
        self.messages.append(message)
        if message.get("body"):
            self.got_body.set()

    def leave(self):
        self._incoming.put_nowait({"type": "http.disconnect"})

    async def finished(self):
        async with asyncio.timeout(10):
            await self.task

    @property
    def text(self):
        return b"".join(m.get("body", b"") for m in self.messages).decode()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("num_steps", [0, 1])
async def test_a_client_that_leaves_aborts_its_choices(make_app, stream, num_steps):
    engine = FakeEngine(lambda r: Script([[70]] * num_steps, end=End.HANG))
    client = Client(make_app(engine), chat(n=2, stream=stream))
    await engine.until(lambda e: len(e.running) == 2)
    if stream and num_steps:
        await client.got_body.wait()
    client.leave()
    await engine.until(lambda e: len(e.aborted) == 2)
    await client.finished()
    assert set(engine.aborted) == {r.request_id for r in engine.requests}
    assert not engine.running
    assert "[DONE]" not in client.text


async def test_an_unread_stream_is_merged_and_then_aborted(make_app, tokenizer, caplog):
    engine = FakeEngine(lambda r: text_script(tokenizer, "the cat sat on the mat", end=End.HANG))
    client = Client(make_app(engine, slow_reader_timeout=0.05), chat(stream=True))
    client.may_read.clear()
    await engine.until(lambda e: e.aborted)
    await client.finished()
    assert client.messages == []
    assert "did not read for" in caplog.text


async def test_a_slow_reader_gets_the_same_text_in_few_deltas(make_app, tokenizer):
    text = "the cat sat on the mat"
    engine = FakeEngine(lambda r: text_script(tokenizer, text))
    client = Client(make_app(engine), chat(stream=True))
    client.may_read.clear()
    await engine.until(lambda e: e.requests and not e.running)
    client.may_read.set()
    await client.finished()
    events = sse_data(client.text)
    assert stream_text(events) == text
    assert len([e for e in events[:-1] if e["choices"][0]["delta"].get("content")]) <= 3


async def test_silence_brings_headers_and_comments(make_app):
    engine = FakeEngine(lambda r: Script(end=End.HANG))
    client = Client(make_app(engine, keepalive_interval=0.01), chat(stream=True))
    async with asyncio.timeout(10):
        while client.text.count(": keep-alive\n\n") < 2:
            await client.got_body.wait()
            client.got_body.clear()
    assert client.messages[0]["status"] == 200
    [role] = sse_data(client.text)
    assert role["choices"][0]["delta"]["role"] == "assistant"
    engine.die()
    await client.finished()
    assert sse_data(client.text)[-1]["error"]["code"] == "engine_unavailable"


async def test_a_drain_refuses_new_work_and_waits_for_the_old(make_app, make_client):
    lifecycle = Lifecycle(retry_after=2)
    engine = FakeEngine(lambda r: Script([[70]], end=End.HANG))
    app = make_app(engine, lifecycle=lifecycle)
    running = Client(app, chat(stream=True))
    await running.got_body.wait()
    lifecycle.begin_drain()
    refused = Client(app, chat())
    await refused.finished()
    assert refused.messages[0]["status"] == 503
    assert (b"retry-after", b"2") in refused.messages[0]["headers"]
    assert json.loads(refused.text)["error"]["code"] == "server_shutting_down"
    assert not await lifecycle.wait_idle(0.01)
    lifecycle.fail_running()
    assert await lifecycle.wait_idle(10)
    await running.finished()
    events = sse_data(running.text)
    assert events[-1]["error"]["code"] == "server_shutting_down"
    assert engine.aborted


async def test_readiness_ends_with_the_drain(make_app):
    import httpx

    lifecycle = Lifecycle(retry_after=1)
    transport = httpx.ASGITransport(make_app(FakeEngine(), lifecycle=lifecycle))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        assert (await client.get("/health/ready")).status_code == 200
        lifecycle.begin_drain()
        answer = await client.get("/health/ready")
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert (await client.get("/health/live")).status_code == 200
