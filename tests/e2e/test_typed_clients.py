"""The typed helpers of the OpenAI client against the bundled model: a grammar makes even a tiny model's answers valid.

What comes back must be the same in every exact mode, to the last log-probability, streamed or not.
"""

import json
from typing import Literal

import httpx
import pytest
from openai import BadRequestError, LengthFinishReasonError, OpenAI, pydantic_function_tool
from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel, Field

MODEL = "tidar-stdlib"
MESSAGES = [{"role": "user", "content": "What does json.dumps do?"}]
MODES = ("ar", "linear", "tidar", "auto")
NEAR = 1e-4
"""Log-probabilities of one token in batches of different shape differ in the last bits of float32."""


class Thing(BaseModel):
    module: Literal["json", "os", "re"]
    summary: str = Field(max_length=24)
    flags: list[bool] = Field(max_length=3)


class Lookup(BaseModel):
    """Looks a name up."""

    name: str = Field(max_length=16)
    depth: Literal[1, 2, 3]


class Say(BaseModel):
    """Says a word."""

    word: Literal["yes", "no"]


TOOLS = [pydantic_function_tool(Lookup, name="lookup"), pydantic_function_tool(Say, name="say")]
NAMED = {"type": "function", "function": {"name": "lookup"}}


@pytest.fixture(scope="module")
def client(url):
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def options(mode, **fields):
    defaults = {"model": MODEL, "messages": MESSAGES, "temperature": 1.0, "seed": 7, "max_tokens": 150}
    return {**defaults, **fields, "extra_body": {"decoding": mode, **fields.pop("extra_body", {})}}


def probabilities(logprobs):
    return [(e.token, e.logprob, [(t.token, t.logprob) for t in e.top_logprobs]) for e in logprobs.content]


def assert_near(one, other):
    assert [entry[0] for entry in one] == [entry[0] for entry in other]
    for (_, first, first_top), (_, second, second_top) in zip(one, other, strict=True):
        assert first == pytest.approx(second, abs=NEAR)
        assert [p for _, p in first_top] == pytest.approx([p for _, p in second_top], abs=NEAR)


def test_parse_gives_an_object_of_the_type_the_same_in_every_mode(client):
    answers = {}
    for mode in MODES:
        choice = client.chat.completions.parse(response_format=Thing, **options(mode)).choices[0]
        assert isinstance(choice.message.parsed, Thing)
        assert choice.finish_reason == "stop"
        answers[mode] = choice.message.content
    assert len(set(answers.values())) == 1, answers


def test_an_answer_that_was_cut_off_is_an_error_of_the_helper(client):
    with pytest.raises(LengthFinishReasonError):
        client.chat.completions.parse(response_format=Thing, **options("tidar", max_tokens=3))


@pytest.mark.parametrize("mode", MODES)
def test_the_stream_helper_has_events_and_the_same_answer(client, mode):
    fields = options(mode, logprobs=True, top_logprobs=2)
    whole = client.chat.completions.parse(response_format=Thing, **fields)
    with client.chat.completions.stream(response_format=Thing, **fields) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done", "logprobs.content.delta", "logprobs.content.done"} <= {
        e.type for e in events
    }
    assert "".join(e.delta for e in events if e.type == "content.delta") == whole.choices[0].message.content
    assert final.choices[0].message.parsed == whole.choices[0].message.parsed
    assert_near(probabilities(final.choices[0].logprobs), probabilities(whole.choices[0].logprobs))


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_demanded_calls_are_valid_and_the_same_streamed_or_not(client, choice):
    answers = set()
    for mode in MODES:
        fields = options(mode, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False)
        whole = client.chat.completions.parse(**fields).choices[0]
        with client.chat.completions.stream(**fields) as stream:
            events = list(stream)
            final = stream.get_final_completion().choices[0]
        [call], [streamed] = whole.message.tool_calls, final.message.tool_calls
        assert isinstance(call.function.parsed_arguments, Lookup | Say)
        assert (streamed.function.name, streamed.function.arguments) == (call.function.name, call.function.arguments)
        assert streamed.function.parsed_arguments == call.function.parsed_arguments
        [done] = [e for e in events if e.type == "tool_calls.function.arguments.done"]
        deltas = [e for e in events if e.type == "tool_calls.function.arguments.delta"]
        assert "".join(e.arguments_delta for e in deltas) == done.arguments == call.function.arguments
        assert whole.finish_reason == final.finish_reason == ("stop" if choice is NAMED else "tool_calls")
        answers.add((call.function.name, call.function.arguments))
    assert len(answers) == 1
    assert choice == "required" or answers.pop()[0] == "lookup"


def test_a_conversation_goes_on_after_a_call(client):
    fields = options("tidar", tools=TOOLS, tool_choice=NAMED)
    message = client.chat.completions.create(**fields).choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "JSON text"}
    fields["messages"] = [*MESSAGES, message.model_dump(exclude_none=True), result]
    again = client.chat.completions.create(**{**fields, "tool_choice": "none"})
    assert again.choices[0].message.tool_calls is None


def test_a_wrong_schema_names_its_place_and_troubles_nobody(client):
    schema = {
        "type": "object",
        "properties": {"a": {"type": "array", "items": {"type": "number", "pattern": 3}}, "b": {"type": "x"}},
    }
    wrong = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with pytest.raises(BadRequestError, match=r"at \$\.properties\.(a\.items|b): ") as refused:
        client.chat.completions.create(response_format=wrong, **options("tidar"))
    assert refused.value.code == "invalid_grammar"
    assert client.chat.completions.create(**options("tidar", max_tokens=3)).usage.completion_tokens == 3


SAMPLINGS = {
    "greedy": {"temperature": 0},
    "seeded": {"temperature": 1.3, "top_p": 0.95},
    "penalties": {"frequency_penalty": 0.7, "presence_penalty": 0.5, "extra_body": {"repetition_penalty": 1.2}},
    "bias": {"logit_bias": {"100": 5, "101": -100, "4": -3}},
    "min_tokens": {"extra_body": {"min_tokens": 40, "min_p": 0.02, "top_k": 50}},
}


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_choices_tokens_and_logprobs_are_the_same_in_every_mode(client, sampling):
    expected = None
    for mode in MODES:
        extra = {"return_token_ids": True, **sampling.get("extra_body", {})}
        fields = {**sampling, "extra_body": extra, "n": 3, "logprobs": True, "top_logprobs": 5, "max_tokens": 60}
        answer = client.chat.completions.create(**options(mode, **fields))
        told = [(c.message.content, c.token_ids, c.finish_reason) for c in answer.choices]
        entries = [entry for c in answer.choices for entry in probabilities(c.logprobs)]
        assert len(entries) == answer.usage.completion_tokens
        expected = expected or (told, entries)
        assert told == expected[0], mode
        assert_near(entries, expected[1])


def test_choices_are_those_of_their_seeds(client):
    def texts(mode, **fields):
        answer = client.chat.completions.create(**options(mode, temperature=1.9, max_tokens=40, **fields))
        return [c.message.content for c in answer.choices]

    three = texts("tidar", n=3)
    assert len(set(three)) > 1
    assert three == texts("ar", n=3)
    assert three != texts("tidar", n=3, seed=8)
    assert three[:1] == texts("tidar")


def test_an_echoed_prompt_has_the_same_logprobs_in_every_mode_and_from_the_cache(client, url):
    prompt = "json.dumps turns a Python object into JSON text. " * 12
    ids = httpx.post(f"{url}/tokenize", json={"prompt": prompt}).json()["tokens"]
    assert len(ids) > 128, "more than a page, so that the prefix cache has something to find"
    expected = None
    for mode in (*MODES, "ar"):
        for given in (prompt, ids, [ids, ids[:5]]):
            fields = {"model": MODEL, "prompt": given, "echo": True, "logprobs": 3, "max_tokens": 4, "temperature": 0}
            answer = client.completions.create(**fields, extra_body={"decoding": mode})
            choice = answer.choices[0]
            assert choice.text.startswith(prompt)
            found = choice.logprobs.token_logprobs
            assert found[0] is None
            expected = expected or (choice.text, found)
            assert choice.text == expected[0]
            assert found[1:] == pytest.approx(expected[1][1:], abs=NEAR)
            assert len(found) == len(ids) + 4
    assert len(answer.choices[1].logprobs.tokens) == 5 + 4


def test_the_likelihood_of_a_text_is_that_of_generating_it(client):
    """Prompt log-probabilities are the ones that its tokens had when they were generated."""
    fields = {"model": MODEL, "temperature": 1, "seed": 3, "extra_body": {"decoding": "tidar", "return_token_ids": True}}
    generated = client.completions.create(prompt="The function", max_tokens=20, logprobs=0, **fields).choices[0]
    whole = [*generated.prompt_token_ids, *generated.token_ids]
    scored = client.completions.create(prompt=whole, max_tokens=1, echo=True, logprobs=0, **fields).choices[0].logprobs
    first = len(generated.prompt_token_ids)
    assert scored.token_logprobs[first : len(whole)] == pytest.approx(generated.logprobs.token_logprobs, abs=NEAR)


def test_a_regular_expression_a_choice_and_a_grammar(client):
    for constraint, is_right in (
        ({"guided_regex": "[a-c]{5,9}x"}, lambda text: set(text[:-1]) <= set("abc") and text.endswith("x")),
        ({"guided_choice": ["naïve 🙂", "plain"]}, lambda text: text in ("naïve 🙂", "plain")),
        ({"structured_outputs": {"grammar": 'start: "<" /[0-9]{3}/ ">"'}}, lambda text: text[1:4].isdigit() and len(text) == 5),
    ):
        texts = set()
        for mode in MODES:
            answer = client.completions.create(
                model=MODEL, prompt="Say", seed=1, max_tokens=60, extra_body={"decoding": mode, **constraint}
            )
            assert answer.choices[0].finish_reason == "stop"
            texts.add(answer.choices[0].text)
        assert len(texts) == 1
        assert is_right(texts.pop())


SPECULATION = {
    "num_spec_steps": "vllm:spec_decode_num_drafts",
    "num_draft_tokens": "vllm:spec_decode_num_draft_tokens",
    "num_accepted_draft_tokens": "vllm:spec_decode_num_accepted_tokens",
}


def counters(url):
    families = {f.name: f for f in text_string_to_metric_families(httpx.get(f"{url}/metrics").text)}
    per_position = families["vllm:spec_decode_num_accepted_tokens_per_pos"].samples
    return {name: families[name].samples[0].value for name in SPECULATION.values()} | {
        "per position": sum(s.value for s in per_position)
    }


def test_what_requests_report_adds_up_to_the_counters(client, url):
    before = counters(url)
    reported = dict.fromkeys(SPECULATION, 0)
    for mode in (*MODES, "diffusion"):
        answer = client.chat.completions.create(**options(mode, n=2, max_tokens=40))
        told = answer.metrics["speculative_decoding"]
        assert (told["num_draft_tokens"] == 0) == (mode in ("ar", "diffusion"))
        for name in reported:
            reported[name] += told[name]
        if told["num_spec_steps"]:
            rate = told["num_accepted_draft_tokens"] / told["num_draft_tokens"]
            assert told["draft_acceptance_rate"] == pytest.approx(rate)
            length = 1 + told["num_accepted_draft_tokens"] / told["num_spec_steps"]
            assert told["mean_acceptance_length"] == pytest.approx(length)
    after = counters(url)
    for name, counter in SPECULATION.items():
        assert after[counter] - before[counter] == reported[name], name
    assert after["per position"] - before["per position"] == reported["num_accepted_draft_tokens"]


def test_diffusion_is_labelled_lossy_by_what_it_refuses(client):
    for fields in ({"response_format": {"type": "json_object"}}, {"frequency_penalty": 1}, {"logprobs": True}):
        with pytest.raises(BadRequestError, match="diffusion"):
            client.chat.completions.create(**options("diffusion", **fields))
    answer = client.chat.completions.create(**options("diffusion", temperature=0, max_tokens=40))
    assert answer.choices[0].message.content


def test_json_object_is_an_object(client):
    fields = options("tidar", response_format={"type": "json_object"}, seed=2, max_tokens=400)
    choice = client.chat.completions.create(**fields).choices[0]
    assert choice.message.content.lstrip().startswith("{")
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content), dict)
