from __future__ import annotations

import pytest

from tests.server.conftest import BOS, sse_data, stream_text, text_script
from tests.server.fake_engine import FakeEngine

pytestmark = pytest.mark.anyio
URL = "/v1/completions"


async def test_text_prompts_get_bos_and_ids_are_taken_as_they_are(make_client, tokenizer):
    engine = FakeEngine(lambda r: text_script(tokenizer, "ok"))
    ids = tokenizer.encode("the", add_special_tokens=False)
    async with make_client(engine) as client:
        for prompt, expected in (
            ("the", [(BOS, *ids)]),
            (["the", "the"], [(BOS, *ids)] * 2),
            (ids, [tuple(ids)]),
            ([ids, [70]], [tuple(ids), (70,)]),
        ):
            engine.requests.clear()
            body = (await client.post(URL, json={"prompt": prompt})).json()
            assert [r.prompt_token_ids for r in engine.requests] == expected
            assert [c["text"] for c in body["choices"]] == ["ok"] * len(expected)
            assert body["usage"]["prompt_tokens"] == sum(map(len, expected))
    assert body["object"] == "text_completion"


async def test_choices_of_several_prompts_are_ordered_and_seeded_by_choice(make_client, tokenizer):
    engine = FakeEngine(lambda r: text_script(tokenizer, f"{r.prompt_token_ids[0]}", cached_tokens=r.prompt_token_ids[0] - 69))
    async with make_client(engine) as client:
        body = (await client.post(URL, json={"prompt": [[70], [71]], "n": 2, "seed": 5})).json()
        events = sse_data((await client.post(URL, json={"prompt": [[70], [71]], "n": 2, "seed": 5, "stream": True})).text)
    assert [c["text"] for c in body["choices"]] == ["70", "70", "71", "71"]
    assert [stream_text(events, i) for i in range(4)] == ["70", "70", "71", "71"]
    seeds = [r.sampling.seed for r in engine.requests[:4]]
    assert seeds[:2] == seeds[2:]
    assert seeds[0] == 5 != seeds[1]
    assert body["usage"]["prompt_tokens"] == 2
    assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == 1 + 2


async def test_token_ids_come_back(make_client, tokenizer):
    engine = FakeEngine(lambda r: text_script(tokenizer, "the cat", step=2))
    request = {"prompt": "a", "return_token_ids": True}
    async with make_client(engine) as client:
        whole = (await client.post(URL, json=request)).json()["choices"][0]
        events = sse_data((await client.post(URL, json={**request, "stream": True})).text)
    assert tuple(whole["prompt_token_ids"]) == engine.requests[0].prompt_token_ids
    assert events[0]["choices"][0]["prompt_token_ids"] == whole["prompt_token_ids"]
    assert [i for e in events[:-1] for i in e["choices"][0].get("token_ids") or ()] == whole["token_ids"]


async def test_add_special_tokens(make_client, tokenizer):
    engine = FakeEngine()
    async with make_client(engine) as client:
        for fields in ({}, {"add_special_tokens": True}, {"add_special_tokens": False}):
            assert (await client.post("/v1/completions", json={"prompt": "a", **fields})).status_code == 200
    bare = tuple(tokenizer.encode("a", add_special_tokens=False))
    assert [r.prompt_token_ids == bare for r in engine.requests] == [False, False, True]
