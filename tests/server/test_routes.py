"""Paths and methods that do not exist: what to use instead."""

from __future__ import annotations

import openai
import pytest

from tests.server.conftest import chat, listening
from tests.server.fake_engine import FakeEngine
from tests.server.test_errors import CHAT, envelope

pytestmark = pytest.mark.anyio


async def test_routes_and_methods(make_client):
    async with make_client(FakeEngine()) as client:
        assert envelope(await client.get("/v2/nothing"), 404)["code"] == "not_found"
        answer = await client.get(CHAT)
        assert envelope(answer, 405)["code"] == "method_not_allowed"
        assert "POST" in answer.headers["allow"]


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("/v1/responses", "POST /v1/chat/completions"),
        ("/v1/responses/resp_1", "POST /v1/chat/completions"),
        ("/v1/messages", "POST /v1/chat/completions"),
        ("/v1/messages/count_tokens", "POST /tokenize"),
        ("/v1/assistants", "POST /v1/chat/completions"),
        ("/api/chat", "POST /v1/chat/completions"),
        ("/chat/completions", "the route is /v1/chat/completions"),
        ("/v1/v1/chat/completions", "the route is /v1/chat/completions"),
        ("/models", "the route is /v1/models"),
        ("/v1/embeddings", "the endpoints are POST /v1/chat/completions, POST /v1/completions and GET /v1/models"),
        ("/nothing", "the endpoints are POST /v1/chat/completions"),
        ("/", "the endpoints are POST /v1/chat/completions"),
        ("/v1", "the endpoints are POST /v1/chat/completions"),
        ("/v1/tokenize", "the route is /tokenize"),
        ("/v1/health", "the route is /health"),
        ("/v1/health/live", "the route is /health/live"),
        ("/v1/metrics", "the route is /metrics"),
        ("/healthz", "the route is /health"),
        ("/tokenizer_info", "not implemented here, but POST /tokenize"),
    ],
)
async def test_an_unknown_path_says_what_to_use_instead(make_client, path, hint):
    async with make_client(FakeEngine()) as client:
        for answer in (await client.post(path, json=chat()), await client.get(path)):
            error = envelope(answer, 404)
            assert (error["code"], error["type"]) == ("not_found", "invalid_request_error")
            assert error["message"].startswith(f"there is no {path}; ")
            assert hint in error["message"]


async def test_clients_of_other_apis_see_where_to_go(make_app):
    async with (
        listening(make_app(FakeEngine())) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        with pytest.raises(openai.NotFoundError, match="POST /v1/chat/completions"):
            await client.responses.create(model="tidar", input="hi")
