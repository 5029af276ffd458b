"""Health, models, metrics, keys, ids: what surrounds generation."""

from __future__ import annotations

import inspect
import logging
import re

import pytest
from prometheus_client.parser import text_string_to_metric_families

from engine import EngineStats
from engine.cuda_graphs import StepGraphs
from server.middleware import RequestIdFilter
from tests.server.conftest import chat, text_script
from tests.server.fake_engine import End, FakeEngine, Script, tidar_info

pytestmark = pytest.mark.anyio
CHAT = "/v1/chat/completions"


async def test_models(make_client):
    async with make_client(FakeEngine(), served_model_names=("org/a", "b"), model_root="/models/a") as client:
        listed = (await client.get("/v1/models")).json()
        one = (await client.get("/v1/models/org/a")).json()
    assert listed["object"] == "list"
    assert [m["id"] for m in listed["data"]] == ["org/a", "b"]
    assert one == listed["data"][0]
    assert one["max_model_len"] == 256
    assert one["root"] == "/models/a"


async def test_health_version_load(make_client):
    engine = FakeEngine()
    async with make_client(engine) as client:
        for path in ("/health", "/health/live", "/health/ready"):
            assert (await client.get(path)).status_code == 200
            assert (await client.head(path)).status_code == 200
        for path in ("/docs", "/redoc"):
            assert (await client.get(path)).status_code == 404
        assert (await client.get("/openapi.json")).status_code == 200
        engine.heartbeat_age = 601.0
        assert (await client.get("/health/live")).status_code == 503
        assert (await client.get("/version")).json()["version"]
        assert (await client.get("/load")).json() == {"server_load": 0}
    assert not engine.requests


async def test_tokenize_and_back(make_client, tokenizer):
    async with make_client(FakeEngine()) as client:
        answer = (await client.post("/tokenize", json={"prompt": "the cat", "return_token_strs": True})).json()
        assert answer["tokens"] == tokenizer.encode("the cat", add_special_tokens=True)
        assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
        back = (await client.post("/detokenize", json={"tokens": answer["tokens"]})).json()
        assert back == {"prompt": "<|bos|>the cat"}
        messages = [{"role": "user", "content": "a"}]
        assert (await client.post("/tokenize", json={"messages": messages})).json()["tokens"][0] == answer["tokens"][0]
        assert (await client.post("/tokenize", json={})).status_code == 400
        assert (await client.post("/detokenize", json={"tokens": [-1]})).status_code == 400


async def test_tokenize_takes_the_fields_of_a_chat(make_client, tokenizer):
    chat_of = {"messages": [{"role": "user", "content": "a"}]}
    async with make_client(FakeEngine()) as client:

        async def tokens(**fields):
            answer = await client.post("/tokenize", json=fields)
            return answer.json()["tokens"] if answer.status_code == 200 else answer.json()["error"]["code"]

        plain = await tokens(**chat_of)
        assert await tokens(**chat_of, add_special_tokens=True) == [plain[0], *plain]
        assert await tokens(**chat_of, add_generation_prompt=True) == plain
        mood = tokenizer.encode("sad", add_special_tokens=False)
        assert await tokens(**chat_of, chat_template_kwargs={"mood": "sad"}) == [*plain, *mood]
        assert await tokens(prompt="a", model="c") == "model_not_found"
        assert await tokens(prompt="a", truncate_prompt_tokens=3) == "unsupported_parameter"
        assert len(await tokens(prompt="a " * 20_000)) > 20_000, "counting is allowed beyond the context"


async def test_keys_guard_everything_but_health_and_metrics(make_client):
    async with make_client(FakeEngine(), api_keys=("one", "zwei-ü")) as client:
        for path in ("/health", "/health/live", "/health/ready", "/metrics"):
            assert (await client.get(path)).status_code == 200
        for path in ("/v1/models", "/version", "/load", "/nothing", "/healthy"):
            answer = await client.get(path)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
        for key in ("", "two", "onee"):
            assert (await client.get("/v1/models", headers={"Authorization": f"Bearer {key}"})).status_code == 401
        assert (await client.get("/v1/models", headers={"Authorization": "Bearer one"})).status_code == 200
        assert (await client.get("/v1/models", headers={"x-api-key": "one"})).status_code == 200


async def test_cors_is_off_unless_asked(make_client):
    headers = {"Origin": "http://page", "Access-Control-Request-Method": "POST"}
    async with make_client(FakeEngine()) as client:
        assert "access-control-allow-origin" not in (await client.get("/version", headers=headers)).headers
    async with make_client(FakeEngine(), cors_origins=("http://page",), api_keys=("k",)) as client:
        assert (await client.options(CHAT, headers=headers)).headers["access-control-allow-origin"] == "http://page"


async def test_request_id_is_echoed_or_made_and_logged(make_client, caplog):
    caplog.handler.addFilter(RequestIdFilter())
    caplog.set_level(logging.INFO)
    async with make_client(FakeEngine()) as client:
        assert (await client.post(CHAT, json=chat(), headers={"x-request-id": "mine"})).headers["x-request-id"] == "mine"
        made = (await client.post(CHAT, json=chat(), headers={"x-request-id": "not mine"})).headers["x-request-id"]
    assert made != "not mine"
    ids = [r.request_id for r in caplog.records if r.name == "server.middleware"]
    assert ids == ["mine", made]


SNAPSHOT = EngineStats(
    num_running=1,
    num_waiting=2,
    kv_cache_usage=0.5,
    num_steps=3,
    num_preemptions=4,
    prompt_tokens=5,
    generation_tokens=6,
    prefix_cache_queries=7,
    prefix_cache_hits=8,
    num_drafts=9,
    num_draft_tokens=10,
    num_accepted_tokens=11,
    accepted_per_position=(12, 13),
    prefill_rows=14,
    draft_rows=15,
    mask_rows=16,
    branch_hits=17,
    branch_misses=18,
    forwards=19,
    step_seconds=20.5,
    host_seconds=21.5,
    launch_seconds=22.5,
    launches=(("replayed", 23), ("prefill", 24)),
)

EXPECTED = {
    "vllm:num_requests_running": 1,
    "vllm:num_requests_waiting": 2,
    "vllm:kv_cache_usage_perc": 0.5,
    "vllm:num_preemptions_total": 4,
    "vllm:prompt_tokens_total": 5,
    "vllm:generation_tokens_total": 6,
    "vllm:prefix_cache_queries_total": 7,
    "vllm:prefix_cache_hits_total": 8,
    "vllm:spec_decode_num_drafts_total": 9,
    "vllm:spec_decode_num_draft_tokens_total": 10,
    "vllm:spec_decode_num_accepted_tokens_total": 11,
    "vllm:cache_config_info": 1,
    "tidar:branch_hits_total": 17,
    "tidar:branch_misses_total": 18,
    "tidar:forwards_total": 19,
    "tidar:step_seconds_total": 20.5,
    "tidar:host_seconds_total": 21.5,
    "tidar:launch_seconds_total": 22.5,
    "tidar:steps_total": 3,
}

HISTOGRAMS = (
    "vllm:time_to_first_token_seconds",
    "vllm:inter_token_latency_seconds",
    "vllm:request_time_per_output_token_seconds",
    "vllm:e2e_request_latency_seconds",
    "vllm:request_queue_time_seconds",
    "vllm:request_prefill_time_seconds",
    "vllm:request_decode_time_seconds",
    "vllm:request_prompt_tokens",
    "vllm:request_generation_tokens",
    "tidar:request_tokens_per_forward",
    "tidar:per_token_latency_seconds",
)


async def samples(client):
    answer = await client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    found = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert (labels.pop("model_name"), labels.pop("engine")) == ("m", "0"), sample
            found[sample.name, tuple(sorted(labels.items()))] = sample.value
    return found


async def test_metrics_of_the_engine(make_client):
    async with make_client(FakeEngine(snapshot=SNAPSHOT), served_model_names=("m",)) as client:
        found = await samples(client)
    for name, value in EXPECTED.items():
        assert [v for (n, _), v in found.items() if n == name] == [value], name
    accepted = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
    assert [found[accepted, (("position", str(i)),)] for i in (0, 1)] == [12, 13]
    assert [found["tidar:rows_total", (("kind", kind),)] for kind in ("prefill", "draft", "mask")] == [14, 15, 16]
    launched = "tidar:launched_steps_total"
    assert found[launched, (("mode", "replayed"), ("reason", ""))] == 23
    assert found[launched, (("mode", "eager"), ("reason", "prefill"))] == 24
    assert not any(name.startswith("tidar:plan") for name, _ in found), "auto means a fixed plan"


async def test_reasons_to_launch_eagerly_are_there_before_they_happen(make_client):
    async with make_client(FakeEngine(info=tidar_info(settings={"captured steps": "8"})), served_model_names=("m",)) as client:
        found = await samples(client)
        text = (await client.get("/metrics")).text
    counts = {labels: value for (name, labels), value in found.items() if name == "tidar:launched_steps_total"}
    assert set(counts.values()) == {0}
    eager = {dict(labels)["reason"] for labels in counts if dict(labels)["mode"] == "eager"}
    assert len(counts) == len(eager) + 1
    assert eager == set(re.findall(r'"(\w+)"', inspect.getsource(StepGraphs._find)))
    [line] = (line for line in text.splitlines() if line.startswith("# HELP tidar:launched_steps"))
    assert all(f"{reason}: " in line for reason in eager)


async def test_metrics_of_the_plan_in_force(make_client):
    snapshot = EngineStats(plan="tidar-1 of 8", plan_goodput=(("ar", 100.0), ("tidar-1 of 8", 350.0)))
    async with make_client(FakeEngine(snapshot=snapshot), served_model_names=("m",)) as client:
        found = await samples(client)
    assert not any(name.startswith("tidar:launched_steps") for name, _ in found), "no step is captured"
    assert found["tidar:plan_info", (("plan", "tidar-1 of 8"),)] == 1
    assert [found["tidar:plan_expected_goodput", (("plan", name),)] for name in ("ar", "tidar-1 of 8")] == [100.0, 350.0]


async def test_metrics_of_requests(make_client, tokenizer):
    scripts = iter((text_script(tokenizer, "the cat"), text_script(tokenizer, "the cat"), Script(end=End.DIE)))
    async with make_client(FakeEngine(lambda r: next(scripts)), served_model_names=("m",)) as client:
        before = await samples(client)
        assert all(before[f"{name}_count", ()] == 0 for name in HISTOGRAMS)
        await client.post(CHAT, json=chat())
        await client.post(CHAT, json=chat(max_tokens=2))
        await client.post(CHAT, json=chat())
        found = await samples(client)
    reasons = {r: found["vllm:request_success_total", (("finished_reason", r),)] for r in ("stop", "length", "abort", "error")}
    assert reasons == {"stop": 1, "length": 1, "abort": 0, "error": 1}
    assert found["vllm:time_to_first_token_seconds_count", ()] == 2
    assert found["vllm:e2e_request_latency_seconds_count", ()] == 2
    assert found["vllm:request_queue_time_seconds_count", ()] == 2
    num_tokens = len(tokenizer.encode("the cat", add_special_tokens=False)) + 1
    assert found["vllm:request_generation_tokens_sum", ()] == num_tokens + 2
    assert found["vllm:inter_token_latency_seconds_count", ()] == num_tokens - 1 + 1


async def test_inter_token_latency_is_observed_once_a_step(make_client, tokenizer):
    engine = FakeEngine(lambda r: Script([[70], [71, 72, 73]]))
    async with make_client(engine, served_model_names=("m",)) as client:
        await client.post(CHAT, json=chat())
        found = await samples(client)
    assert found["vllm:inter_token_latency_seconds_count", ()] == 2
    assert found["tidar:per_token_latency_seconds_count", ()] == 4
