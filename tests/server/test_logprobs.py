"""Log-probabilities on the wire, in chat and in text completions, streamed and not."""

from __future__ import annotations

import json

import pytest

from tests.server.conftest import BOS, chat, message_of, message_of_whole, sse_data, stream_text, text_script
from tests.server.fake_engine import EOS, FakeEngine, Script, fake_logprobs

pytestmark = pytest.mark.anyio
CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"


async def both(client, url, body):
    """The only choice of the answer, and the events of the stream."""
    whole = await client.post(url, json=body)
    assert whole.status_code == 200, whole.text
    stream = await client.post(url, json={**body, "stream": True})
    return whole.json()["choices"][0], sse_data(stream.text)


def joined(events):
    """The lists of a streamed text completion."""
    lists = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for choice in (c for e in events[:-1] for c in e["choices"]):
        for name, values in (choice["logprobs"] or {}).items():
            lists[name] += values
    return lists


@pytest.mark.parametrize("count", [0, 1, 3, 20])
async def test_chat_has_an_entry_for_every_token(make_client, tokenizer, count):
    engine = FakeEngine(lambda r: text_script(tokenizer, "naïve 🙂", step=2))
    async with make_client(engine) as client:
        choice, events = await both(client, CHAT, chat(logprobs=True, top_logprobs=count, return_token_ids=True))
    content = choice["logprobs"]["content"]
    assert choice["logprobs"]["refusal"] is None
    assert message_of(events) == message_of_whole(choice)
    assert len(content) == len(choice["token_ids"])
    for place, (entry, token_id) in enumerate(zip(content, choice["token_ids"], strict=True)):
        expected = fake_logprobs(token_id, place, count)
        assert entry["logprob"] == expected.logprob
        assert [t["logprob"] for t in entry["top_logprobs"]] == [logprob for _, logprob in expected.top]
    assert bytes(b for entry in content[:-1] for b in entry["bytes"]).decode() == "naïve 🙂"
    assert content[-1]["token"] == "<|end|>"


async def test_a_chat_without_logprobs_asks_the_engine_for_none(make_client):
    engine = FakeEngine(lambda r: Script([[70]]))
    async with make_client(engine) as client:
        choice, events = await both(client, CHAT, chat())
    assert choice["logprobs"] is None
    assert all(c["logprobs"] is None for e in events[:-1] for c in e["choices"])
    assert {r.sampling.logprobs for r in engine.requests} == {None}


async def test_tokens_after_a_stop_string_have_no_logprobs(make_client, tokenizer):
    engine = FakeEngine(lambda r: text_script(tokenizer, "the cat sat", step=100))
    async with make_client(engine) as client:
        choice, events = await both(client, CHAT, chat(logprobs=True, stop="cat", return_token_ids=True))
    assert choice["message"]["content"] == "the "
    assert len(choice["logprobs"]["content"]) == len(choice["token_ids"])
    assert choice["logprobs"]["content"][-1]["token"].endswith("cat")
    assert message_of(events) == message_of_whole(choice)


async def test_minus_infinity_is_a_number_on_the_wire(make_client, monkeypatch):
    monkeypatch.setattr("tests.server.fake_engine.fake_logprobs", lambda *a: fake_logprobs(70, float("inf"), 2))
    async with make_client(FakeEngine(lambda r: Script([[70]]))) as client:
        choice, _ = await both(client, CHAT, chat(logprobs=True, top_logprobs=2))
        text, _ = await both(client, TEXT, {"prompt": "a", "logprobs": 2})
    assert choice["logprobs"]["content"][0]["logprob"] == -9999.0
    assert text["logprobs"]["token_logprobs"][0] == -9999.0


@pytest.mark.parametrize("step", [1, 2, 5])
async def test_text_completions_have_lists_of_one_length(make_client, tokenizer, step):
    engine = FakeEngine(lambda r: text_script(tokenizer, "naïve 🙂 cat", step))
    async with make_client(engine) as client:
        choice, events = await both(client, TEXT, {"prompt": "hi", "logprobs": 2, "return_token_ids": True})
    lists, ids = choice["logprobs"], choice["token_ids"]
    assert joined(events) == lists
    assert {len(values) for values in lists.values()} == {len(ids)}
    assert lists["token_logprobs"] == [fake_logprobs(i, place, 2).logprob for place, i in enumerate(ids)]
    for token, logprob, top in zip(*(lists[n] for n in ("tokens", "token_logprobs", "top_logprobs")), strict=True):
        assert top[token] == logprob
    # A token's text stands at its offset, but for the parts of characters.
    for token, offset in zip(lists["tokens"], lists["text_offset"], strict=True):
        assert token.startswith("bytes:\\x") or token == "<|end|>" or choice["text"].startswith(token, offset)


async def test_zero_logprobs_are_the_tokens_own(make_client, tokenizer):
    async with make_client(FakeEngine(lambda r: text_script(tokenizer, "cat"))) as client:
        choice, _ = await both(client, TEXT, {"prompt": "hi", "logprobs": 0})
    for token, logprob, top in zip(*(choice["logprobs"][n] for n in ("tokens", "token_logprobs", "top_logprobs")), strict=True):
        assert top == {token: logprob}


@pytest.mark.parametrize("prompt", ["the 🙂 hat", [70, 71, 200, 72]])
async def test_an_echoed_prompt_comes_first_with_its_logprobs(make_client, tokenizer, prompt):
    engine = FakeEngine(lambda r: text_script(tokenizer, "cat", step=2))
    async with make_client(engine) as client:
        choice, events = await both(client, TEXT, {"prompt": prompt, "echo": True, "logprobs": 1, "return_token_ids": True})
    echo = prompt if isinstance(prompt, str) else tokenizer.decode(prompt, skip_special_tokens=False)
    lists, ids = choice["logprobs"], [*choice["prompt_token_ids"], *choice["token_ids"]]
    assert choice["text"] == echo + "cat" == stream_text(events)
    assert joined(events) == lists
    assert {len(values) for values in lists.values()} == {len(ids)}
    assert (lists["token_logprobs"][0], lists["top_logprobs"][0]) == (None, None)
    num_prompt = len(choice["prompt_token_ids"])
    assert (
        lists["token_logprobs"][1:num_prompt]
        == [fake_logprobs(t, i, 1).logprob for i, t in enumerate(ids) if i][: num_prompt - 1]
    )
    for token, offset in zip(lists["tokens"], lists["text_offset"], strict=True):
        assert token.startswith("bytes:\\x") or token in ("<|bos|>", "<|end|>") or choice["text"].startswith(token, offset)


async def test_what_an_evaluation_harness_asks_for(make_client, tokenizer):
    """Several prompts as token ids, scored: no token is wanted, and none comes."""
    engine = FakeEngine(lambda r: text_script(tokenizer, "cat"))
    prompts = [[70, 71, 72, 73, 74, 75], [80, 81]]
    body = {"prompt": prompts, "echo": True, "logprobs": 1, "max_tokens": 0, "temperature": 0}
    async with make_client(engine) as client:
        answer = (await client.post(TEXT, json=body)).json()
        events = sse_data((await client.post(TEXT, json={**body, "stream": True})).text)
    assert [len(c["logprobs"]["tokens"]) for c in answer["choices"]] == [6, 2]
    assert [c["text"] for c in answer["choices"]] == [tokenizer.decode(p, skip_special_tokens=False) for p in prompts]
    assert [c["finish_reason"] for c in answer["choices"]] == ["length", "length"]
    assert answer["usage"]["completion_tokens"] == 0
    assert [stream_text(events, i) for i in (0, 1)] == [c["text"] for c in answer["choices"]]
    assert {r.sampling.max_tokens for r in engine.requests} == {1}


async def test_an_echo_alone_asks_for_no_logprobs(make_client, tokenizer):
    engine = FakeEngine(lambda r: text_script(tokenizer, "cat"))
    async with make_client(engine) as client:
        choice, events = await both(client, TEXT, {"prompt": "the ", "echo": True})
    assert choice["text"] == stream_text(events) == "the cat"
    assert choice["logprobs"] is None
    assert engine.requests[0].sampling.prompt_logprobs is None


async def test_prompt_logprobs_in_vllms_form(make_client, tokenizer):
    engine = FakeEngine(lambda r: text_script(tokenizer, "cat"))
    async with make_client(engine) as client:
        text = (await client.post(TEXT, json={"prompt": [70, 71, 72], "prompt_logprobs": 1})).json()["choices"][0]
        talk = (await client.post(CHAT, json=chat("a", prompt_logprobs=0))).json()
    first, second, third = text["prompt_logprobs"]
    assert first is None
    assert second == {
        "72": {"logprob": -1.071 / 2, "rank": 1, "decoded_token": tokenizer.decode([72], skip_special_tokens=False)},
        "71": {"logprob": -1.071, "rank": 2, "decoded_token": tokenizer.decode([71], skip_special_tokens=False)},
    }
    assert set(third) == {"72", "73"}
    ids = engine.requests[1].prompt_token_ids
    assert ids[0] == BOS
    assert [list(entry) for entry in talk["prompt_logprobs"][1:]] == [[str(i)] for i in ids[1:]]
    assert "logprobs" not in text or text["logprobs"] is None


async def test_tokens_as_ids(make_client):
    async with make_client(FakeEngine(lambda r: Script([[70]]))) as client:
        options = {"return_tokens_as_token_ids": True}
        talk, _ = await both(client, CHAT, chat(logprobs=True, top_logprobs=2, **options))
        text, _ = await both(client, TEXT, {"prompt": "a", "logprobs": 2, **options})
    assert [e["token"] for e in talk["logprobs"]["content"]] == ["token_id:70", f"token_id:{EOS}"]
    assert [t["token"] for t in talk["logprobs"]["content"][0]["top_logprobs"]] == ["token_id:71", "token_id:70"]
    assert text["logprobs"]["tokens"] == ["token_id:70", f"token_id:{EOS}"]


@pytest.mark.parametrize(
    ("url", "fields", "param"),
    [
        (CHAT, {"top_logprobs": 2}, "top_logprobs"),
        (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (CHAT, {"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        (CHAT, {"prompt_logprobs": 21}, "prompt_logprobs"),
        (CHAT, {"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        (TEXT, {"logprobs": 21}, "logprobs"),
        (TEXT, {"logprobs": True}, "logprobs"),
        (TEXT, {"logprobs": 2, "echo": True, "prompt_logprobs": 3}, "prompt_logprobs"),
        (TEXT, {"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        (TEXT, {"max_tokens": 0}, "max_tokens"),
    ],
)
async def test_what_cannot_be_reported_is_a_400(make_client, url, fields, param):
    async with make_client(FakeEngine()) as client:
        answer = await client.post(url, json=(chat() if url == CHAT else {"prompt": "a"}) | fields)
    assert answer.status_code == 400, json.dumps(answer.json())
    assert answer.json()["error"]["param"] == param
