from __future__ import annotations

import asyncio
import json

import httpx
import pytest

from engine import DecodingMode, SchedulerConfig
from server.lifecycle import Lifecycle
from tests.server.conftest import chat, sse_data, text_script
from tests.server.fake_engine import MASK, End, FakeEngine, Script, tidar_info

pytestmark = pytest.mark.anyio
CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"


def envelope(answer, status):
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"}
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert isinstance(error["code"], str)
    assert answer.headers["x-request-id"]
    return error


REFUSED = [
    ("prediction", {"type": "content", "content": "x"}),
    ("web_search_options", {}),
    ("chat_template", "{{ x }}"),
    ("guided_decoding_backend", "outlines"),
    ("documents", [{"text": "a"}]),
    ("structural_tag", {"type": "structural_tag"}),
    ("regex", "a*"),
    ("ebnf", "root ::= 'a'"),
    ("grammar", "root ::= 'a'"),
    ("json_schema", {"type": "object"}),
    ("functions", [{"name": "f"}]),
    ("function_call", {"name": "f"}),
    ("min_new_tokens", 3),
    ("n_predict", 3),
    ("typical_p", 0.5),
    ("logits_processors", ["x"]),
    ("bad_words", ["x"]),
    ("allowed_token_ids", [1]),
    ("use_beam_search", True),
    ("spaces_between_special_tokens", False),
    ("add_generation_prompt", False),
    ("continue_final_message", True),
    ("add_special_tokens", True),
    ("best_of", 3),
    ("priority", 1),
    ("echo", True),
]


@pytest.mark.parametrize(("name", "value"), REFUSED)
async def test_a_field_that_would_have_an_effect_is_refused(make_client, name, value):
    engine = FakeEngine()
    async with make_client(engine) as client:
        error = envelope(await client.post(CHAT, json=chat(**{name: value})), 400)
    assert error["code"] == "unsupported_parameter"
    assert error["param"] == name
    assert name in error["message"]
    assert "not supported" in error["message"]
    assert not engine.requests


@pytest.mark.parametrize(
    ("name", "value"),
    [("suffix", "x"), ("best_of", 2), ("tools", [{}]), ("top_logprobs", 2), ("tool_choice", "required")],
)
async def test_the_same_for_text_completions(make_client, name, value):
    async with make_client(FakeEngine()) as client:
        error = envelope(await client.post(TEXT, json={"prompt": "a", name: value}), 400)
    assert (error["param"], error["code"]) == (name, "unsupported_parameter")


NEUTRAL = {
    "frequency_penalty": 0,
    "presence_penalty": 0.0,
    "repetition_penalty": 1.0,
    "logit_bias": {},
    "logprobs": False,
    "top_logprobs": None,
    "tools": [],
    "tool_choice": "auto",
    "response_format": {"type": "text"},
    "min_tokens": 0,
    "best_of": 1,
    "echo": False,
    "suffix": None,
    "user": "u",
    "metadata": {"a": "b"},
    "store": True,
    "service_tier": "auto",
    "prompt_cache_key": "k",
    "safety_identifier": "s",
    "verbosity": "low",
    "temperature": None,
    "stop": None,
    "n": None,
    "max_tokens": None,
    "stream": None,
}


async def test_neutral_and_ineffective_values_are_accepted_in_silence(make_client, caplog):
    async with make_client(FakeEngine()) as client:
        assert (await client.post(CHAT, json=chat(**NEUTRAL))).status_code == 200
        neutral = {**NEUTRAL, "logprobs": None}
        assert (await client.post(TEXT, json={"prompt": "a", **neutral})).status_code == 200
    assert "unknown field" not in caplog.text


async def test_unknown_fields_are_ignored_and_named_once(make_client, caplog):
    async with make_client(FakeEngine()) as client:
        for _ in range(3):
            assert (await client.post(CHAT, json=chat(temprature=1))).status_code == 200
    assert caplog.text.count("temprature") == 1


INVALID = [
    ("temperature", 2.5),
    ("temperature", "hot"),
    ("top_p", 0),
    ("top_k", -2),
    ("min_p", 2),
    ("max_tokens", 0),
    ("n", 0),
    ("n", 10_000),
    ("stop", ""),
    ("stop", ["a", ""]),
    ("stop", ["a"] * 17),
    ("stop", "a" * 1001),
    ("stop_token_ids", [1] * 257),
    ("stop_token_ids", [10**6]),
    ("decoding", "fast"),
    ("stream_options", {"include_usage": True}),
    ("messages", []),
    ("messages", [{"role": "wizard", "content": "x"}]),
    ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
    ("messages", [{"role": "user", "content": [{"type": "input_audio"}]}]),
    ("messages", [{"role": "user", "content": [{"type": "text", "text": 3}]}]),
    ("messages", [{"role": "assistant", "tool_calls": [{}]}]),
    ("chat_template_kwargs", {"tokenize": True}),
    ("messages", "hello"),
]


@pytest.mark.parametrize(("name", "value"), INVALID)
async def test_invalid_values_are_400_and_name_the_field(make_client, name, value):
    async with make_client(FakeEngine()) as client:
        error = envelope(await client.post(CHAT, json=chat() | {name: value}), 400)
    assert error["param"] == name
    assert error["type"] == "invalid_request_error"


async def test_not_json_and_not_unicode(make_client):
    async with make_client(FakeEngine()) as client:
        headers = {"Content-Type": "application/json"}
        error = envelope(await client.post(CHAT, content=b'{"messages": [', headers=headers), 400)
        assert error["code"] == "invalid_json"
        for body, cause in (
            (b'{"messages": "\xff"}', "'utf-8' codec can't decode byte 0xff in position 14: invalid start byte"),
            (b'{"seed": ' + b"1" * 5000 + b"}", "value has 5000 digits"),
        ):
            error = envelope(await client.post(CHAT, content=body, headers=headers), 400)
            assert error["code"] == "invalid_json"
            assert error["message"].startswith("the body is not valid JSON: ")
            assert error["message"].endswith(cause)
        envelope(await client.post(CHAT, content=b"[1]", headers=headers), 400)
        envelope(await client.post(CHAT, content=b"hello"), 400)
        envelope(await client.post(CHAT, content=b"[" * 100_000, headers=headers), 400)
        half = b'{"messages": [{"role": "user", "content": "\\ud800"}]}'
        assert "surrogate" in envelope(await client.post(CHAT, content=half, headers=headers), 400)["message"]
        nan = b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}'
        assert envelope(await client.post(CHAT, content=nan, headers=headers), 400)["param"] == "temperature"


async def test_validation_errors_are_few_short_and_without_the_values(make_client):
    secret = "s" * 500
    async with make_client(FakeEngine()) as client:
        error = envelope(await client.post(TEXT, json={"prompt": [secret, *[{}] * 50], "n": secret}), 400)
    assert secret not in json.dumps(error)
    parts = error["message"].split("; ")
    assert len(parts) <= 11
    assert all(len(part) <= 200 for part in parts)


@pytest.mark.parametrize(
    ("path", "body", "at"),
    [
        (TEXT, {"prompt": [{}] * 100_000}, "prompt.tokens.0"),
        (TEXT, {"prompt": ["a", *[{}] * 4000]}, "prompt.texts.1"),
        (TEXT, {"prompt": [[{}] * 1000] * 100}, "prompt.token_lists.0.0"),
        (TEXT, {"prompt": ["a"] * 100_000}, "prompt.texts"),
        (TEXT, {"prompt": {}}, "prompt.text"),
        (CHAT, chat(stop_token_ids=["x"] * 200), "stop_token_ids.0"),
        (CHAT, {"messages": [0] * 10_000}, "messages.0"),
        (CHAT, {"messages": [{"role": "user"}] * 20_000}, "messages"),
        ("/detokenize", {"tokens": ["x"] * 100_000}, "tokens.0"),
    ],
)
async def test_a_huge_wrong_list_is_one_error(make_client, path, body, at):
    async with make_client(FakeEngine()) as client:
        message = envelope(await client.post(path, json=body), 400)["message"]
    assert message.startswith(f"{at}: ")
    assert ";" not in message


async def test_choices_that_can_never_wait_together_are_no_503(make_client):
    limits = SchedulerConfig(max_num_seqs=1, max_waiting_requests=2, max_waiting_tokens=10)
    async with make_client(FakeEngine(), limits=limits) as client:
        assert envelope(await client.post(TEXT, json={"prompt": [70], "n": 4}), 400)["param"] == "n"
        assert envelope(await client.post(TEXT, json={"prompt": [70] * 6, "n": 2}), 400)["param"] == "n"
        assert (await client.post(TEXT, json={"prompt": [70] * 5, "n": 2})).status_code == 200
        assert (await client.post(TEXT, json={"prompt": [70] * 20})).status_code == 200, "a prompt alone may be long"


async def test_what_will_be_refused_is_refused_before_it_is_encoded(make_app, tokenizer, monkeypatch):
    monkeypatch.setattr(type(tokenizer), "encode", lambda *args, **kwargs: pytest.fail("it was encoded"))
    engine = FakeEngine(lambda r: Script(end=End.HANG), info=tidar_info(max_model_len=10))
    lifecycle = Lifecycle(retry_after=1)
    app = make_app(engine, lifecycle, limits=SchedulerConfig(max_num_seqs=1, max_waiting_requests=0))
    long = "x" * (10 * tokenizer.max_token_chars + 1)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        for path, body in ((CHAT, chat(long)), (CHAT, chat([{"type": "text", "text": long}])), (TEXT, {"prompt": long})):
            assert envelope(await client.post(path, json=body), 400)["code"] == "context_length_exceeded"
        running = asyncio.create_task(client.post(TEXT, json={"prompt": [70]}))
        await engine.until(lambda e: bool(e.running))
        for path, body in ((CHAT, chat()), (TEXT, {"prompt": "a"})):
            assert envelope(await client.post(path, json=body), 503)["code"] == "server_overloaded"
        lifecycle.begin_drain()
        for path, body in ((CHAT, chat()), (TEXT, {"prompt": "a"})):
            assert envelope(await client.post(path, json=body), 503)["code"] == "server_shutting_down"
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_a_refusal_is_written_as_json(make_client):
    async with make_client(FakeEngine()) as client:
        error = envelope(await client.post(TEXT, json={"prompt": "a", "use_beam_search": True}), 400)
    assert error["message"].endswith("or send false")


async def test_unknown_model(make_client):
    async with make_client(FakeEngine(), served_model_names=("a", "b")) as client:
        for answer in (await client.post(CHAT, json=chat(model="c")), await client.get("/v1/models/c")):
            error = envelope(answer, 404)
            assert error["code"] == "model_not_found"
            assert "a, b" in error["message"]
        assert (await client.post(CHAT, json=chat(model="b"))).json()["model"] == "b"


async def test_prompts_that_the_engine_cannot_take(make_client):
    async with make_client(FakeEngine(info=tidar_info(max_model_len=10))) as client:
        error = envelope(await client.post(TEXT, json={"prompt": [70] * 10}), 400)
        assert error["code"] == "context_length_exceeded"
        assert "10 tokens" in error["message"]
        assert (await client.post(TEXT, json={"prompt": [70] * 9})).status_code == 200
        assert "mask token" in envelope(await client.post(TEXT, json={"prompt": [70, MASK]}), 400)["message"]
        for prompt in ([400], [-1], [], [[]], [70, "a"], [True]):
            assert envelope(await client.post(TEXT, json={"prompt": prompt}), 400)["param"] == "prompt"


async def test_a_mode_that_the_checkpoint_cannot_do(make_client):
    modes = (DecodingMode.AUTO, DecodingMode.AR)
    engine = FakeEngine(info=tidar_info(supported_modes=modes, block_length=None, mask_token_id=None))
    async with make_client(engine) as client:
        assert "not a TiDAR model" in envelope(await client.post(CHAT, json=chat(decoding="tidar")), 400)["message"]
        assert (await client.post(CHAT, json=chat(decoding="ar"))).status_code == 200
        assert (await client.post(CHAT, json=chat(decoding="auto"))).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_full_queue(make_client, stream):
    engine = FakeEngine(lambda r: Script(end=End.HANG), capacity=1)
    async with make_client(engine, retry_after=7) as client:
        answer = await client.post(CHAT, json=chat(n=2, stream=stream))
    assert envelope(answer, 503)["code"] == "server_overloaded"
    assert answer.headers["retry-after"] == "7"
    assert engine.aborted == [engine.requests[0].request_id], "the choice that had room must be taken back"
    assert not engine.running


@pytest.mark.parametrize("stream", [False, True])
async def test_dead_engine(make_client, stream):
    engine = FakeEngine(is_alive=False)
    async with make_client(engine) as client:
        answer = await client.post(CHAT, json=chat(stream=stream))
        assert envelope(answer, 503)["code"] == "engine_unavailable"
        assert "retry-after" in answer.headers
        envelope(await client.get("/health/ready"), 503)
        envelope(await client.get("/health/live"), 503)


@pytest.mark.parametrize("stream", [False, True])
async def test_death_before_the_first_token_is_a_status(make_client, stream):
    async with make_client(FakeEngine(lambda r: Script(end=End.DIE))) as client:
        envelope(await client.post(CHAT, json=chat(stream=stream)), 503)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_that_the_engine_refuses(make_client, stream):
    async with make_client(FakeEngine(lambda r: Script(end=End.ERROR))) as client:
        assert envelope(await client.post(CHAT, json=chat(stream=stream)), 400)["message"] == "the engine refuses this"


async def test_death_in_a_stream_is_an_event_without_done(make_client, tokenizer):
    engine = FakeEngine(lambda r: text_script(tokenizer, "the cat", end=End.DIE))
    async with make_client(engine) as client:
        answer = await client.post(CHAT, json=chat(stream=True))
    assert answer.status_code == 200
    events = sse_data(answer.text)
    assert events[-1]["error"]["code"] == "engine_unavailable"
    assert "[DONE]" not in events
    assert any(choice["delta"].get("content") for event in events[:-1] for choice in event["choices"])


async def test_a_bug_is_a_500_that_tells_nothing(make_client, caplog):
    def script(request):
        raise RuntimeError("secret detail")

    async with make_client(FakeEngine(script)) as client:
        answer = await client.post(CHAT, json=chat(), headers={"x-request-id": "abc"})
    assert envelope(answer, 500)["code"] == "internal_error"
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"] == "abc"
    assert "secret detail" in caplog.text


async def test_body_limit(make_client):
    async def chunks():
        for _ in range(10):
            yield b'{"a": "' + b"x" * 100

    async with make_client(FakeEngine(), max_body_bytes=500) as client:
        envelope(await client.post(CHAT, json=chat("x" * 1000)), 413)
        headers = {"Content-Type": "application/json"}
        assert envelope(await client.post(CHAT, content=chunks(), headers=headers), 413)["code"] == "request_too_large"
        assert (await client.post(CHAT, json=chat("x" * 10))).status_code == 200
