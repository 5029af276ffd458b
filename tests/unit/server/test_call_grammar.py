"""Calls in a model's own format beside a constrained answer, by llguidance itself, with tags that are tokens and with texts."""

from __future__ import annotations

import asyncio
import json

import pytest
from llguidance import LLMatcher, LLTokenizer

from server.call_grammar import answer_or_calls
from server.grammar import json_grammar
from server.parsers import ToolFormat
from server.protocol import ChatCompletionRequest
from server.tokenizer import load_tokenizer
from server.tools import requested_tools
from tests.server.conftest import TOOL_TEMPLATE, save_tiny_tokenizer

TAGS = ("<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")
HERMES, LLAMA3, MISTRAL = ToolFormat.HERMES, ToolFormat.LLAMA3, ToolFormat.MISTRAL
POINT = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"], "additionalProperties": False}
ANSWER = {"type": "object", "properties": {"n": {"type": "boolean"}}, "required": ["n"], "additionalProperties": False}


@pytest.fixture(scope="module", params=["special tokens", "added tokens", "texts"])
def vocabulary(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tags")
    save_tiny_tokenizer(folder, TOOL_TEMPLATE, () if request.param == "texts" else TAGS)
    content = json.loads((folder / "tokenizer.json").read_text())
    for token in content["added_tokens"]:
        token["special"] &= request.param == "special tokens" or token["content"] not in TAGS
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return load_tokenizer(str(folder)), LLTokenizer(json.dumps(content), n_vocab=400, eos_token=[4])


def tools_of(**fields):
    functions = ({"name": "f", "parameters": POINT}, {"name": "g", "parameters": POINT})
    tools = [{"type": "function", "function": function} for function in functions]
    return requested_tools(ChatCompletionRequest(messages=[{"role": "user"}], tools=tools, **fields))


@pytest.fixture
def accepts(vocabulary):
    tokenizer, grammar_tokenizer = vocabulary

    def accepts(written, text, answer=ANSWER, **fields):
        grammar = asyncio.run(json_grammar(answer, "response_format"))
        grammar = asyncio.run(answer_or_calls(grammar, tools_of(**fields), written, tokenizer.special_id_of))
        matcher = LLMatcher(grammar_tokenizer, grammar)
        assert not matcher.is_error(), matcher.get_error()
        ids = tokenizer.encode(text, add_special_tokens=False)
        count = 0
        for token_id in ids:
            mask = matcher.compute_bitmask()
            is_allowed = bool(mask[token_id // 8] >> token_id % 8 & 1)
            assert (matcher.try_consume_tokens([token_id]) == 1) is is_allowed
            if not is_allowed:
                break
            count += 1
        is_accepted = count == len(ids) and matcher.is_accepting()
        # Drafts go back and forth over a tag as over any token.
        assert not count or (matcher.rollback(count) and matcher.try_consume_tokens(ids) == count)
        return is_accepted

    return accepts


def hermes(name):
    return f'<tool_call>\n{{"name": "{name}", "arguments": {{"x": 1}}}}\n</tool_call>'


GOOD = [
    (HERMES, hermes("f")),
    (HERMES, '<tool_call>{"name":"g","arguments":{"x":1}}</tool_call>'),
    (HERMES, hermes("f") + "\n" + hermes("g")),
    (LLAMA3, '{"name": "f", "parameters": {"x": 1}}'),
    (LLAMA3, '<|python_tag|>{"name": "f", "parameters": {"x": 1}}; {"name": "g", "parameters": {"x": 1}}'),
    (MISTRAL, '[TOOL_CALLS][{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {"x": 1}}]'),
]
BAD = [
    (HERMES, hermes("h")),
    (HERMES, hermes("f")[:-1]),
    (HERMES, '{"n": true}\n' + hermes("f")),
    (HERMES, "Well. " + hermes("f")),
    (LLAMA3, '{"name": "h", "parameters": {"x": 1}}'),
    (LLAMA3, '{"name": "f", "parameters": {"x": "1"}}'),
    (MISTRAL, '[{"name": "f", "arguments": {"x": 1}}]'),
]
WITH_TOKENS = (
    '[TOOL_CALLS]f[ARGS]{"x": 1}[TOOL_CALLS]g[ARGS]{"x": 2}',
    '[TOOL_CALLS]f[CALL_ID]abcdefgh9[ARGS]{"x": 1}',
)


@pytest.mark.parametrize(("written", "text"), GOOD)
def test_calls_that_a_model_writes(accepts, written, text):
    assert accepts(written, text)


@pytest.mark.parametrize(("written", "text"), BAD)
def test_what_is_no_call_of_these_tools(accepts, written, text):
    assert not accepts(written, text)


@pytest.mark.parametrize("written", ToolFormat)
def test_the_answer_may_come_instead(accepts, written):
    assert accepts(written, '{"n": true}')
    assert not accepts(written, '{"n": 1}')
    for value in ({"name": "Ada"}, {"n": {"name": "f"}}, {"naming": 1}, {}):
        assert accepts(written, json.dumps(value), {"type": "object"})
        assert accepts(written, json.dumps(value), {"const": value})
    assert accepts(written, "[1]", {"type": "array"})


def test_mistrals_newer_calls_need_their_tokens(accepts, vocabulary):
    has_tokens = vocabulary[0].special_id_of("[ARGS]") is not None
    assert [accepts(MISTRAL, text) for text in WITH_TOKENS] == [has_tokens] * 2


def test_one_call_where_calls_must_not_be_parallel(accepts):
    for written, text in GOOD:
        is_one = text.count('"name"') == 1
        assert accepts(written, text, parallel_tool_calls=False) is is_one
