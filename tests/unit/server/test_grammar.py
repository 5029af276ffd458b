"""Which texts the grammars of a request let through, by llguidance itself on a byte vocabulary."""

from __future__ import annotations

import asyncio
import json

import pytest
from llguidance import LLMatcher, LLTokenizer

from server import grammar as module
from server.call_grammar import forced_grammar
from server.errors import ApiError
from server.grammar import json_grammar, requested_grammar
from server.protocol import GenerationFields
from server.tools import Tools, requested_tools


@pytest.fixture(scope="module")
def accepts():
    tokenizer = LLTokenizer("byte")

    def accepts(grammar: str, text: str) -> bool:
        matcher = LLMatcher(tokenizer, grammar)
        assert not matcher.is_error(), matcher.get_error()
        tokens = tokenizer.tokenize_str(text)
        return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()

    return accepts


def grammar_of(**fields) -> str:
    found = asyncio.run(requested_grammar(GenerationFields(**fields)))
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("fields", "good", "bad"),
    [
        ({"guided_choice": ["yes", 'n"o', "é🙂", "a\nb"]}, ["yes", 'n"o', "é🙂", "a\nb"], ["y", "no", "yesyes"]),
        ({"guided_regex": "[0-9]{2}"}, ["12"], ["1", "123", "ab"]),
        ({"guided_grammar": 'start: "a" start | "b"'}, ["b", "aab"], ["a", "ba"]),
        ({"guided_json": {"enum": [1, "x"]}}, ["1", '"x"'], ["2", "x"]),
        ({"response_format": {"type": "json_object"}}, ["{}", '{"a": [1, {"b": null}]}', '{"a":[1,2]}'], ["[]", "1", "{"]),
        ({"structured_outputs": {"json_object": True}}, ["{}"], ["[]"]),
    ],
)
def test_what_a_constraint_lets_through(accepts, fields, good, bad):
    grammar = grammar_of(**fields)
    assert [text for text in good if not accepts(grammar, text)] == []
    assert [text for text in bad if accepts(grammar, text)] == []


def test_white_space_is_one_blank_where_people_write_it(accepts):
    """Or a weak model fills its context with it."""
    schema = {"type": "object", "properties": {"a": {"type": "array"}, "b": {}}, "required": ["a", "b"]}
    value = {"a": [1, {"c": "  "}], "b": None}
    good = [json.dumps(value, separators=separators) for separators in ((", ", ": "), (",", ":"), (", ", ":"))]
    bad = ['{"a":  [1], "b": 1}', '{"a": [1],  "b": 1}', '{ "a": [1], "b": 1}', good[0] + " ", json.dumps(value, indent=1)]
    for grammar in (grammar_of(guided_json=schema), grammar_of(response_format={"type": "json_object"})):
        assert [text for text in good if not accepts(grammar, text)] == []
        assert [text for text in bad if accepts(grammar, text)] == []


def test_a_client_cannot_set_the_options_of_the_compiler(accepts):
    """``lenient`` would let through what a keyword that is not known forbids, and an unknown option be an error of ours."""
    options = {"x-guidance": {"lenient": True, "json_allowed_escapes": "", "unknown": 1}}
    schema = {"type": "object", "properties": {"x-guidance": {"const": "\n"}}, "required": ["x-guidance"]}
    grammar = grammar_of(guided_json={**schema, **options})
    assert grammar == grammar_of(guided_json=schema)
    assert accepts(grammar, json.dumps({"x-guidance": "\n"}))
    with pytest.raises(ApiError, match="cannot be used"):
        grammar_of(guided_json={"not": {"type": "string"}, **options})


def tools_of(*functions, **fields) -> Tools:
    from server.protocol import ChatCompletionRequest

    tools = [{"type": "function", "function": function} for function in functions]
    return requested_tools(ChatCompletionRequest(messages=[{"role": "user"}], tools=tools, **fields))


NODE = {
    "$defs": {"node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}, "additionalProperties": False}},
    "properties": {"head": {"$ref": "#/$defs/node"}},
    "required": ["head"],
    "additionalProperties": False,
}


def test_required_calls_follow_the_schema_of_their_function(accepts):
    point = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"], "additionalProperties": False}
    tools = tools_of(
        {"name": "f", "parameters": point}, {"name": "g", "parameters": NODE}, {"name": "h"}, tool_choice="required"
    )
    grammar = asyncio.run(forced_grammar(tools))

    def calls(*pairs):
        return json.dumps([{"name": name, "parameters": parameters} for name, parameters in pairs])

    assert accepts(grammar, calls(("f", {"x": 1})))
    assert accepts(grammar, calls(("f", {"x": 1}), ("g", {"head": {"next": {"next": {}}}}), ("h", {"any": [1]})))
    assert not accepts(grammar, calls())
    assert not accepts(grammar, calls(("f", {"x": "1"})))
    assert not accepts(grammar, calls(("g", {"x": 1}))), "the schema of another function"
    assert not accepts(grammar, calls(("g", {"head": {"last": {}}})))
    assert not accepts(grammar, calls(("i", {})))
    assert not accepts(grammar, calls(("h", 3)))


def test_one_call_where_calls_must_not_be_parallel(accepts):
    tools = tools_of({"name": "h"}, tool_choice="required", parallel_tool_calls=False)
    grammar = asyncio.run(forced_grammar(tools))
    assert accepts(grammar, '[{"name": "h", "parameters": {}}]')
    assert not accepts(grammar, '[{"name": "h", "parameters": {}}, {"name": "h", "parameters": {}}]')


def test_references_start_in_the_schema_that_has_them(accepts):
    """With an id or an anchor too, and what a constant says is no reference."""
    integer = {"type": "integer"}
    schemas = {
        "f": {"$id": "http://x/y", "$defs": {"k": integer}, "properties": {"a": {"$ref": "#/$defs/k"}}},
        "g": {"$defs": {"k": {"$anchor": "k", **integer}}, "properties": {"a": {"$ref": "#k"}}},
        "h": {"properties": {"a": {"const": {"$ref": "#/k"}}}},
    }
    functions = ({"name": name, "parameters": {**schema, "required": ["a"]}} for name, schema in schemas.items())
    grammar = asyncio.run(forced_grammar(tools_of(*functions, tool_choice="required")))
    for name, value, other in (("f", 1, "1"), ("g", 1, "1"), ("h", {"$ref": "#/k"}, {"$ref": "#/items/k"})):
        assert accepts(grammar, json.dumps([{"name": name, "parameters": {"a": value}}]))
        assert not accepts(grammar, json.dumps([{"name": name, "parameters": {"a": other}}]))


def test_a_named_function_is_its_arguments(accepts):
    choice = {"type": "function", "function": {"name": "g"}}
    grammar = asyncio.run(forced_grammar(tools_of({"name": "f"}, {"name": "g", "parameters": NODE}, tool_choice=choice)))
    assert accepts(grammar, '{"head": {"next": {}}}')
    assert not accepts(grammar, "3")
    assert not accepts(grammar, "{}")


def test_a_model_that_decides_is_not_forced():
    for choice in (None, "auto", "none"):
        assert asyncio.run(forced_grammar(tools_of({"name": "f"}, tool_choice=choice))) is None


def test_the_search_for_what_is_wrong_has_an_end(monkeypatch):
    monkeypatch.setattr(module, "MAX_LOCATED_CHARS", 200)
    properties = {f"p{i}": {"type": "integer"} for i in range(20)} | {"last": {"type": "wrong"}}
    with pytest.raises(ApiError, match=r"at \$: "):
        asyncio.run(json_grammar({"properties": properties}, "guided_json"))


def test_the_place_is_the_deepest_one_that_is_wrong_by_itself():
    schema = {
        "$defs": {"a": {"type": "integer"}},
        "properties": {"ok": {"$ref": "#/$defs/a"}, "list": {"prefixItems": [{"$ref": "#/$defs/a"}, {"items": {"type": 3}}]}},
    }
    with pytest.raises(ApiError) as refused:
        asyncio.run(json_grammar(schema, "response_format"))
    assert refused.value.code == "invalid_grammar"
    assert "at $.properties.list.prefixItems[1].items:" in refused.value.message
