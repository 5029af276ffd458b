from __future__ import annotations

import pytest

from engine import DecodingMode, choice_seed
from tests.server.conftest import BOS, chat, sse_data, stream_text, text_script
from tests.server.fake_engine import FakeEngine, Script

pytestmark = pytest.mark.anyio
URL = "/v1/chat/completions"


async def test_whole_answer(make_client, tokenizer):
    engine = FakeEngine(lambda r: text_script(tokenizer, "the cat", cached_tokens=2))
    async with make_client(engine) as client:
        answer = await client.post(URL, json=chat(model="tidar", seed=3))
    body = answer.json()
    assert answer.status_code == 200
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    assert body["model"] == "tidar"
    [choice] = body["choices"]
    assert choice == {
        "index": 0,
        "message": {"role": "assistant", "content": "the cat"},
        "logprobs": None,
        "finish_reason": "stop",
        "stop_reason": None,
    }
    num_tokens = len(tokenizer.encode("the cat", add_special_tokens=False)) + 1
    prompt = engine.requests[0].prompt_token_ids
    assert body["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": num_tokens,
        "total_tokens": len(prompt) + num_tokens,
        "prompt_tokens_details": {"cached_tokens": 2},
    }
    assert body["metrics"]["speculative_decoding"] == {
        "mean_acceptance_length": 3.5,
        "draft_acceptance_rate": 0.5,
        "num_spec_steps": 2,
        "num_draft_tokens": 10,
        "num_accepted_draft_tokens": 5,
        "tokens_per_forward": 1.0,
    }


async def test_the_template_writes_the_only_bos(make_client, tokenizer):
    engine = FakeEngine()
    messages = [{"role": "developer", "content": "be kind"}, {"role": "user", "content": [{"type": "text", "text": "a"}] * 2}]
    async with make_client(engine) as client:
        await client.post(URL, json={"messages": messages, "chat_template_kwargs": {"mood": "!"}})
    prompt = list(engine.requests[0].prompt_token_ids)
    assert prompt.count(BOS) == 1
    text = tokenizer.decode(prompt, skip_special_tokens=False)
    assert text == "<|bos|><|system|>be kind<|end|><|user|>a\na<|end|><|assistant|>!"


async def test_stream_order_and_usage(make_client, tokenizer):
    engine = FakeEngine(lambda r: text_script(tokenizer, "the cat", step=2))
    async with make_client(engine) as client:
        answer = await client.post(URL, json=chat(stream=True, stream_options={"include_usage": True}))
        whole = (await client.post(URL, json=chat())).json()
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = sse_data(answer.text)
    assert events[-1] == "[DONE]"
    role, *deltas, finish, usage = events[:-1]
    assert role["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all(d["choices"][0]["finish_reason"] is None and d["choices"][0]["delta"]["content"] for d in deltas)
    assert finish["choices"][0]["delta"] == {}
    assert finish["choices"][0]["finish_reason"] == "stop"
    assert usage["choices"] == []
    assert usage["usage"] == whole["usage"]
    assert usage["metrics"]["speculative_decoding"]["num_draft_tokens"] == 10
    assert all(event["usage"] is None and "metrics" not in event for event in events[:-2])
    assert len({event["id"] for event in events[:-1]}) == 1


async def test_stream_without_usage_ends_with_metrics_on_the_finish_chunk(make_client, tokenizer):
    async with make_client(FakeEngine(lambda r: text_script(tokenizer, "the cat"))) as client:
        events = sse_data((await client.post(URL, json=chat(stream=True))).text)
    assert "metrics" in events[-2]
    assert events[-2]["choices"][0]["finish_reason"] == "stop"
    assert not any("usage" in event for event in events[:-1])


async def test_continuous_usage(make_client, tokenizer):
    options = {"include_usage": True, "continuous_usage_stats": True}
    async with make_client(FakeEngine(lambda r: text_script(tokenizer, "the cat"))) as client:
        events = sse_data((await client.post(URL, json=chat(stream=True, stream_options=options))).text)
    counts = [event["usage"]["completion_tokens"] for event in events[:-1]]
    assert counts == sorted(counts)
    assert counts[0] == 0 or counts[0] <= counts[-1]


TEXTS = ["the cat sat.", "naïve 🙂🙂 e\u0301", "日本語のテキスト", "🏳️‍🌈!", "tail \ufffd"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("stop", [None, "sat", ["のテ", "🙂 e", "cat s"], "zz"])
async def test_stream_equals_whole_at_every_step_size(make_client, tokenizer, text, stop):
    num_tokens = len(tokenizer.encode(text, add_special_tokens=False))
    answers = set()
    for step in range(1, num_tokens + 1):
        engine = FakeEngine(lambda r, step=step: text_script(tokenizer, text, step))
        async with make_client(engine) as client:
            whole = (await client.post(URL, json=chat(stop=stop, return_token_ids=True))).json()
            options = {"include_usage": True}
            request = chat(stop=stop, return_token_ids=True, stream=True, stream_options=options)
            events = sse_data((await client.post(URL, json=request)).text)
        choice = whole["choices"][0]
        assert stream_text(events) == choice["message"]["content"]
        finish = events[-3]["choices"][0]
        assert (finish["finish_reason"], finish["stop_reason"]) == (choice["finish_reason"], choice["stop_reason"])
        assert events[-2]["usage"] == whole["usage"]
        ids = [i for e in events[:-1] for c in e["choices"] for i in c.get("token_ids") or ()]
        assert ids == choice["token_ids"]
        assert len(ids) == whole["usage"]["completion_tokens"]
        assert events[0]["prompt_token_ids"] == whole["prompt_token_ids"]
        answers.add((choice["message"]["content"], choice["stop_reason"], len(ids)))
    assert len(answers) == 1
    [(content, stop_reason, _)] = answers
    hits = [s for s in ([stop] if isinstance(stop, str) else stop or []) if s in text]
    assert content == (text.partition(hits[0])[0] if hits else text)
    assert stop_reason == (hits[0] if hits else None)


async def test_a_stop_string_aborts_the_engines_request(make_client, tokenizer):
    engine = FakeEngine(lambda r: text_script(tokenizer, "the cat sat", step=3))
    async with make_client(engine) as client:
        body = (await client.post(URL, json=chat(stop="cat"))).json()
    assert body["choices"][0]["message"]["content"] == "the "
    assert body["choices"][0]["stop_reason"] == "cat"
    assert engine.aborted == [engine.requests[0].request_id]


async def test_n_choices_have_their_own_seeds_and_one_prompt(make_client, tokenizer):
    engine = FakeEngine(lambda r: text_script(tokenizer, f"choice {r.request_id[-1]}"))
    async with make_client(engine) as client:
        body = (await client.post(URL, json=chat(n=2, seed=-1))).json()
        events = sse_data((await client.post(URL, json=chat(n=2, seed=-1, stream=True))).text)
    assert [c["message"]["content"] for c in body["choices"]] == ["choice 0", "choice 1"]
    assert [stream_text(events, i) for i in (0, 1)] == ["choice 0", "choice 1"]
    seeds = [r.sampling.seed for r in engine.requests]
    assert seeds == [2**64 - 1, choice_seed(2**64 - 1, 1)] * 2
    assert body["usage"]["prompt_tokens"] == len(engine.requests[0].prompt_token_ids)
    assert body["usage"]["completion_tokens"] == 2 * (len(tokenizer.encode("choice 0", add_special_tokens=False)) + 1)
    assert body["metrics"]["speculative_decoding"]["num_draft_tokens"] == 20
    assert [e["choices"][0]["index"] for e in events[:2]] == [0, 1]
    assert events[-2]["metrics"]["speculative_decoding"]["num_draft_tokens"] == 20


async def test_length_and_stop_tokens(make_client, tokenizer):
    engine = FakeEngine(lambda r: Script([[70, 71, 72, 73], [74, 75]]))
    async with make_client(engine) as client:
        short = (await client.post(URL, json=chat(max_tokens=9, max_completion_tokens=3))).json()
        stopped = (await client.post(URL, json=chat(stop_token_ids=[72]))).json()
        eos = (await client.post(URL, json=chat(ignore_eos=True, stop_token_ids=[4]))).json()
    assert short["choices"][0]["finish_reason"] == "length"
    assert short["usage"]["completion_tokens"] == 3
    assert stopped["choices"][0]["stop_reason"] == 72
    assert stopped["choices"][0]["message"]["content"] == tokenizer.decode([70, 71], skip_special_tokens=True)
    assert eos["choices"][0]["stop_reason"] == 4


async def test_sampling_reaches_the_engine(make_client):
    engine = FakeEngine()
    fields = {"temperature": 0.5, "top_p": 0.9, "top_k": -1, "min_p": 0.1, "ignore_eos": False, "decoding": "linear"}
    async with make_client(engine) as client:
        answer = await client.post(URL, json=chat(**fields, max_tokens=10**9, user="me", frequency_penalty=0, tools=[]))
    assert answer.status_code == 200
    request = engine.requests[0]
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 0, 0.1)
    assert request.decoding is DecodingMode.LINEAR
    assert sampling.max_tokens == engine.info.max_model_len - len(request.prompt_token_ids)


async def test_special_tokens_are_text_on_request(make_client, tokenizer):
    engine = FakeEngine(lambda r: Script([[70, 6, 71]]))
    async with make_client(engine) as client:
        hidden = (await client.post(URL, json=chat())).json()["choices"][0]["message"]["content"]
        shown = (await client.post(URL, json=chat(skip_special_tokens=False))).json()["choices"][0]["message"]["content"]
    assert hidden == tokenizer.decode([70, 71], skip_special_tokens=True)
    assert shown == tokenizer.decode([70, 6, 71], skip_special_tokens=False)
    assert "<|reserved|>" in shown


async def test_cache_salt_separates_keys_and_salts(make_client):
    engine = FakeEngine()
    keys = {"api_keys": ("one", "two")}
    async with make_client(engine, **keys) as client:
        for key, salt in (("one", None), ("two", None), ("one", "x"), ("one", None)):
            headers = {"Authorization": f"Bearer {key}"}
            assert (await client.post(URL, json=chat(cache_salt=salt), headers=headers)).status_code == 200
    salts = [r.cache_salt for r in engine.requests]
    assert len(set(salts)) == 3
    assert salts[0] == salts[3] != ""
    assert "one" not in "".join(salts)
