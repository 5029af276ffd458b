"""The bundled model through the real process and the real client: the same text in every mode, streamed or not."""

import concurrent.futures
import signal

import httpx
import pytest
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.conftest import serving

QUESTIONS = (
    "What does json.dumps do?",
    "How do I shuffle a list?",
    "which module has Counter",
    "Hello!",
    "explain os.walk please",
    "How do I bake bread?",
)
MODES = ("ar", "linear", "tidar", "auto")


@pytest.fixture(scope="module")
def client(url):
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client, question, mode, **options):
    options = {"temperature": 0, "max_tokens": 80, **options}
    messages = [{"role": "user", "content": question}]
    return client.chat.completions.create(model="tidar-stdlib", messages=messages, extra_body={"decoding": mode}, **options)


def stream(client, question, mode, **options):
    text, finish, usage = "", None, None
    for chunk in ask(client, question, mode, stream=True, stream_options={"include_usage": True}, **options):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            finish = choice.finish_reason or finish
    return text, finish, usage


def test_answers_are_sensible(client):
    answer = ask(client, QUESTIONS[0], "tidar").choices[0].message.content
    assert "json.dumps" in answer
    assert "JSON" in answer
    assert "random.shuffle" in ask(client, QUESTIONS[1], "tidar").choices[0].message.content
    assert "only know the Python standard library" in ask(client, QUESTIONS[5], "tidar").choices[0].message.content


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 1, "seed": 11}], ids=["greedy", "seeded"])
def test_every_mode_gives_the_same_text_streamed_or_not(client, options):
    for question in QUESTIONS:
        expected = ask(client, question, "ar", **options)
        text, finish = expected.choices[0].message.content, expected.choices[0].finish_reason
        for mode in MODES:
            whole = ask(client, question, mode, **options)
            assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == (text, finish), (question, mode)
            assert whole.usage.completion_tokens == expected.usage.completion_tokens
            streamed = stream(client, question, mode, **options)
            assert streamed[:2] == (text, finish), (question, mode)
            assert streamed[2].completion_tokens == expected.usage.completion_tokens


def test_choices_of_one_request_differ_and_are_repeatable(client):
    def texts(mode):
        answer = ask(client, "tell me about numbers", mode, n=4, temperature=1.5, seed=5)
        return [c.message.content for c in answer.choices]

    assert len(set(texts("ar"))) > 1
    assert texts("ar") == texts("tidar")


def test_a_stop_string_ends_the_same_way_in_every_mode(client):
    full = ask(client, QUESTIONS[0], "ar").choices[0].message.content
    stop = full[10:14]
    for mode in MODES:
        choice = ask(client, QUESTIONS[0], mode, stop=stop).choices[0]
        assert (choice.message.content, choice.finish_reason) == (full[: full.index(stop)], "stop")
        assert stream(client, QUESTIONS[0], mode, stop=stop)[0] == full[: full.index(stop)]


def test_drafting_is_reported_and_pays(client):
    plain = ask(client, QUESTIONS[0], "ar").metrics["speculative_decoding"]
    drafted = ask(client, QUESTIONS[0], "tidar").metrics["speculative_decoding"]
    assert plain["num_draft_tokens"] == 0
    assert plain["tokens_per_forward"] == 1.0
    assert drafted["num_accepted_draft_tokens"] > 0
    assert drafted["tokens_per_forward"] > 2.0


def test_many_clients_in_mixed_modes_get_what_one_gets(client):
    expected = {question: ask(client, question, "ar").choices[0].message.content for question in QUESTIONS}
    jobs = [(question, mode) for question in QUESTIONS for mode in MODES]
    with concurrent.futures.ThreadPoolExecutor(len(jobs)) as pool:
        answers = pool.map(lambda job: stream(client, *job)[0], jobs)
    assert dict(zip(jobs, answers, strict=True)) == {job: expected[job[0]] for job in jobs}


def test_metrics_tell_of_drafts(client, url):
    ask(client, QUESTIONS[0], "tidar")
    families = {f.name: f for f in text_string_to_metric_families(httpx.get(f"{url}/metrics").text)}
    for name in (
        "vllm:spec_decode_num_drafts",
        "vllm:spec_decode_num_accepted_tokens",
        "vllm:generation_tokens",
        "tidar:forwards",
    ):
        assert families[name].samples[0].value > 0, name


def test_an_error_has_the_envelope(client, url):
    body = {"model": "gpt-4", "messages": [{"role": "user", "content": "hi"}]}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body)
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"
    body = {"messages": [{"role": "user", "content": "hi " * 3000}]}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"


def test_sigterm_ends_an_idle_server_cleanly():
    with serving("--async-depth", "1") as (process, url):
        assert httpx.get(f"{url}/health/ready").status_code == 200
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        assert "Traceback" not in errors
