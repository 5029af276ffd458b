from __future__ import annotations

import functools

import pytest

from server.parsers import (
    Content,
    ForcedCall,
    Reasoning,
    ReasoningFormat,
    ToolCallArguments,
    ToolCallBegin,
    ToolFormat,
    begins_in_reasoning,
    build_parser,
    detect_reasoning_format,
    detect_tool_format,
    merge,
)
from tests.unit.server.parsers.replay import call, parse_however_cut

HERMES_CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'

QWEN = '{{- \'<tool_call>\\n{"name": "\' }}{{- \'", "arguments": \' }}'
LLAMA = "<|start_header_id|>{{ '{\"name\": \"' + tool_call.name + '\", ' }}{{- '\"parameters\": ' }}"


@pytest.mark.parametrize(
    ("template", "tool_format"),
    [
        (None, None),
        ("{{ messages[0].content }}", None),
        (QWEN, ToolFormat.HERMES),
        ("<|start_header_id|>" + QWEN, ToolFormat.HERMES),
        ("<tool_call>\\n<function=name>", None),
        ("<tool_call>name\\n<arg_key>", None),
        ("<|start_header_id|>user<|end_header_id|>", None),
        (LLAMA, ToolFormat.LLAMA3),
        ("{{- '<|python_tag|>' + tool_call.name }}", ToolFormat.LLAMA3),
        ("{{- '[TOOL_CALLS] [' }}", ToolFormat.MISTRAL),
        ("{{ '[TOOL_CALLS]' + name + '[ARGS]' + arguments }}", ToolFormat.MISTRAL),
    ],
)
def test_the_template_tells_the_tool_format(template, tool_format):
    assert detect_tool_format(template) is tool_format


@pytest.mark.parametrize(
    ("template", "is_reasoning"),
    [(None, False), ("{{ content }}", False), ("{{ '<think>\\n' }}", True), ("{{ content.split('</think>')[-1] }}", True)],
)
def test_the_template_tells_whether_the_model_thinks(template, is_reasoning):
    assert detect_reasoning_format(template) is (ReasoningFormat.THINK if is_reasoning else None)


@pytest.mark.parametrize(
    ("prompt", "begins"),
    [
        ("<|im_start|>assistant\n<think>\n", True),
        ("<|im_start|>assistant\n<think>", True),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
        ("What does <think> mean?<|im_end|>\n<|im_start|>assistant\n", False),
        ("", False),
    ],
)
def test_a_prompt_that_ends_with_an_open_tag_begins_in_reasoning(prompt, begins):
    assert begins_in_reasoning(prompt) is begins


def hermes(**kwargs):
    return functools.partial(build_parser, ToolFormat.HERMES, ReasoningFormat.THINK, **kwargs)


@pytest.mark.parametrize(
    ("make", "text", "expected"),
    [
        (build_parser, f" <think>a</think> {HERMES_CALL}\n", [Content(f" <think>a</think> {HERMES_CALL}\n")]),
        (
            functools.partial(build_parser, reasoning=ReasoningFormat.THINK),
            f"<think>a</think>{HERMES_CALL}",
            [Reasoning("a"), Content(HERMES_CALL)],
        ),
        (
            functools.partial(build_parser, ToolFormat.HERMES),
            f"<think>{HERMES_CALL}",
            [Content("<think>"), *call("f", '{"a": 1}')],
        ),
        (
            hermes(),
            f"<think>\nA call: {HERMES_CALL}\n</think>\n\nHere:\n{HERMES_CALL}\n{HERMES_CALL}",
            [Reasoning(f"A call: {HERMES_CALL}"), Content("Here:"), *call("f", '{"a": 1}'), *call("f", '{"a": 1}', 1)],
        ),
        (hermes(is_reasoning=True), f"a\n</think>\n\n{HERMES_CALL}", [Reasoning("a"), *call("f", '{"a": 1}')]),
        (hermes(is_reasoning=True), HERMES_CALL, [Reasoning(HERMES_CALL)]),
        (hermes(), HERMES_CALL, call("f", '{"a": 1}')),
        (hermes(max_calls=1), f"{HERMES_CALL}\n{HERMES_CALL}b", [*call("f", '{"a": 1}'), Content("b")]),
        (hermes(), "<think>a</think>b \n<tool", [Reasoning("a"), Content("b \n<tool")]),
        (hermes(), "", []),
        (
            functools.partial(build_parser, ToolFormat.LLAMA3, ReasoningFormat.THINK),
            '<think>{"x"}</think>\n\n{"name": "f", "parameters": {}}',
            [Reasoning('{"x"}'), *call("f", "{}")],
        ),
        (functools.partial(build_parser, ToolFormat.MISTRAL), "[TOOL_CALLS]f[ARGS]{}", call("f", "{}")),
        (
            functools.partial(build_parser, ForcedCall("g"), ReasoningFormat.THINK, is_reasoning=True),
            '{"not": "it"}\n</think>\n\n{"a": "</think>"}',
            [Reasoning('{"not": "it"}'), *call("g", '{"a": "</think>"}')],
        ),
        (
            functools.partial(build_parser, ForcedCall(), max_calls=1),
            '[{"name": "a", "parameters": {}}, {"name": "b", "parameters": {}}]',
            call("a", "{}"),
        ),
    ],
)
def test_parsers_are_composed(make, text, expected):
    assert parse_however_cut(make, text) == expected


def test_markers_are_those_of_all_parts():
    assert build_parser().markers == ()
    assert build_parser(ForcedCall("f")).markers == ()
    assert hermes()().markers == ("<think>", "</think>", "<tool_call>", "</tool_call>")
    assert build_parser(ToolFormat.LLAMA3).markers == ("<|python_tag|>",)
    assert build_parser(ToolFormat.MISTRAL).markers == ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]")


def test_events_of_one_kind_and_call_are_merged():
    begins = [ToolCallBegin(0, "f"), ToolCallBegin(1, "g")]
    texts = [Content("a"), Content("b"), Reasoning("c"), Reasoning("d"), Content("e")]
    arguments = [ToolCallArguments(0, "{"), ToolCallArguments(0, "}"), ToolCallArguments(1, "{}")]
    assert merge([*texts, *begins, *arguments]) == [
        *(Content("ab"), Reasoning("cd"), Content("e")),
        *begins,
        *(ToolCallArguments(0, "{}"), ToolCallArguments(1, "{}")),
    ]
