from __future__ import annotations

import functools
import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from server.parsers import Content, ToolCallArguments, ToolCallBegin, merge
from server.parsers.tools import CallArrayParser, HermesParser, Llama3Parser, MistralParser, NamedFunctionParser
from tests.unit.server.parsers.replay import call, parse, parse_however_cut, text_of

PARIS = '{"city": "Paris", "unit": "°C"}'
TRICKY = (
    r'{"code": "if (a) { return \"}\\\"; } // ] <\/x>\n", "emoji": "🙂\ud83d\ude42", '
    r'"n": [1, {"deep": [{}, []]}, -2.5e3, null]}'
)
WITH_TAGS = '{"text": "</tool_call><tool_call>[TOOL_CALLS][ARGS]<|python_tag|>; {"}'

HERMES = [
    ('<tool_call>\n{"name": "weather", "arguments": ' + PARIS + "}\n</tool_call>", call("weather", PARIS)),
    ('<tool_call>{"name":"run","arguments":' + TRICKY + "}</tool_call>", call("run", TRICKY)),
    ('<tool_call>{"name": "echo", "arguments": ' + WITH_TAGS + "}</tool_call>", call("echo", WITH_TAGS)),
    ('<tool_call>\n{"arguments": ' + PARIS + ', "name": "weather"}\n</tool_call>', call("weather", PARIS)),
    (
        'Let me see.\n\n<tool_call>\n{"name": "a", "arguments": {}}\n</tool_call>\n<tool_call>\n{"name": "b", "arguments": '
        '{"x": 1}}\n</tool_call>\n\nDone: 1 < 2.\n',
        [Content("Let me see."), *call("a", "{}"), *call("b", '{"x": 1}', 1), Content("Done: 1 < 2.\n")],
    ),
    ('<tool_call>{"name": "now"}</tool_call>', call("now", "{}")),
    ('<tool_call>{"id": 7, "name": "nów\\u0021", "parameters": {}, "more": {"name": "x"}}</tool_call>', call("nów!", "{}")),
    ('<tool_call>{"name": "f", "arguments": "{\\"a\\": \\"\\\\u00e9\\\\n\\"}"}</tool_call>', call("f", r'{"a": "\u00e9\n"}')),
    ('<tool_call>{"name": "f", "arguments": {"a": "two\nlines \\d"}}</tool_call>', call("f", r'{"a": "two\nlines \\d"}')),
    # Tags and braces that are missing or too many.
    (
        '<tool_call>{"name": "a", "arguments": {}}<tool_call>{"name": "b", "arguments": {}}',
        [*call("a", "{}"), *call("b", "{}", 1)],
    ),
    ('<tool_call>{"name": "a", "arguments": {}}\n</tool_call>\n</tool_call>', [*call("a", "{}"), Content("</tool_call>")]),
    ('<tool_call>{"name": "a", "arguments": {"b": 1}\n</tool_call> c', [*call("a", '{"b": 1}'), Content("c")]),
    ('<tool_call>{"name": "a", "arguments": {}}}</tool_call>', [*call("a", "{}"), Content("}</tool_call>")]),
    ("a </tool_call> b\n", [Content("a </tool_call> b\n")]),
    ("<tool_call></tool_call>", [Content("<tool_call></tool_call>")]),
    (
        'So: <tool_call>\n<tool_call>{"name": "a", "arguments": {}}</tool_call>',
        [Content("So: <tool_call>"), *call("a", "{}")],
    ),
    # What is no call.
    ("1 < 2 <tool> <tool_cal l>\n ", [Content("1 < 2 <tool> <tool_cal l>\n ")]),
    (
        ' <tool_call>\nget_weather("Paris")\n</tool_call>\n',
        [Content(' <tool_call>\nget_weather("Paris")\n</tool_call>\n')],
    ),
    ('<tool_call>{"name": "", "arguments": {}}</tool_call>', [Content('<tool_call>{"name": "", "arguments": {}}</tool_call>')]),
    ('<tool_call>{"name": 1, "arguments": {}}</tool_call>', [Content('<tool_call>{"name": 1, "arguments": {}}</tool_call>')]),
    ('<tool_call>{"arguments": {"a": 1}}</tool_call>', [Content('<tool_call>{"arguments": {"a": 1}}</tool_call>')]),
    ('<tool_call>{"name": "f", "arguments": [1]}', [Content('<tool_call>{"name": "f", "arguments": [1]}')]),
    ('<tool_call>{"name": "f", "arguments": "x"}', [Content('<tool_call>{"name": "f", "arguments": "x"}')]),
    ("<tool_call>[]", [Content("<tool_call>[]")]),
    (
        "<tool_call>{'name': 'f'}</tool_call>\n<tool_call>{\"name\": \"g\"}</tool_call>",
        [Content("<tool_call>{'name': 'f'}</tool_call>"), *call("g", "{}")],
    ),
    # What breaks off.
    (
        '<tool_call>{"name": "f", "arguments": {"a": 1,, "b": 2}}</tool_call> c',
        [*call("f", '{"a": 1,'), Content(', "b": 2}}</tool_call> c')],
    ),
    (
        '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1"}</tool_call>',
        [*call("f", '{"a": 1'), Content('"}</tool_call>')],
    ),
    ('<tool_call>{"name": "f", "arguments": {"a": "Par', call("f", '{"a": "Par')),
    ('<tool_call>{"name": "f", "arguments": {"a": "\\u00', call("f", '{"a": "')),
    ('<tool_call>{"name": "f", "arguments": {}, "i', call("f", "{}")),
    ('<tool_call>{"name": "f", "arguments": {}}\n</tool_c', call("f", "{}")),
    ('a\n<tool_call>\n{"name": "f", "argu', [Content('a\n<tool_call>\n{"name": "f", "argu')]),
    ('<tool_call>{"arguments": {"a": 1}, ', [Content('<tool_call>{"arguments": {"a": 1}, ')]),
    ("a\n<tool_ca", [Content("a\n<tool_ca")]),
]

LLAMA3 = [
    ('{"name": "weather", "parameters": ' + PARIS + "}", call("weather", PARIS)),
    ('<|python_tag|>{"name": "weather", "parameters": ' + PARIS + "}", call("weather", PARIS)),
    ('\n {"type": "function", "name": "run", "parameters": ' + TRICKY + "}\n", call("run", TRICKY)),
    ('{"name": "echo", "arguments": ' + WITH_TAGS + "}", call("echo", WITH_TAGS)),
    ('{"parameters": {"a": 1}, "name": "f"}', call("f", '{"a": 1}')),
    ('{"name": "f", "parameters": {}}', call("f", "{}")),
    ('{"name": "f", "parameters": "{\\"a\\": {}}"}', call("f", '{"a": {}}')),
    *[
        (
            '{"name": "a", "parameters": {"x": "é"}}' + separator + '{"name": "b", "parameters": {}}',
            [*first, *call("b", "{}", 1)],
        )
        for first in [call("a", '{"x": "é"}')]
        for separator in ("; ", "\n", "", " ;\n\n", ";<|python_tag|>", "<|python_tag|> ")
    ],
    ('Look: <|python_tag|>{"name": "f", "parameters": {}}', [Content("Look:"), *call("f", "{}")]),
    # JSON that is no call.
    ('{"name": "Ada", "age": 36}', [Content('{"name": "Ada", "age": 36}')]),
    (' {"name": "Ada"}\n', [Content(' {"name": "Ada"}\n')]),
    ('{"name": {"first": "Ada"}, "parameters": {}}', [Content('{"name": {"first": "Ada"}, "parameters": {}}')]),
    ('{"name": "Ada", "parameters": [1]}', [Content('{"name": "Ada", "parameters": [1]}')]),
    ("{}", [Content("{}")]),
    ("{x | x > 0} is a set; {} too\n", [Content("{x | x > 0} is a set; {} too\n")]),
    ('[{"name": "f", "parameters": {}}]', [Content('[{"name": "f", "parameters": {}}]')]),
    ('Use {"name": "f", "parameters": {}}', [Content('Use {"name": "f", "parameters": {}}')]),
    ('<|python_tag|>search.call(query="x")', [Content('<|python_tag|>search.call(query="x")')]),
    ("  plain < text\n\n", [Content("  plain < text\n\n")]),
    # What follows a call or breaks off.
    ('{"name": "f", "parameters": {}}\n\nThat was it.', [*call("f", "{}"), Content("That was it.")]),
    ('{"name": "f", "parameters": {}}; {"x": 1}', [*call("f", "{}"), Content('; {"x": 1}')]),
    ('{"name": "f", "parameters": {}};\n', call("f", "{}")),
    ('{"name": "f", "parameters": {}}}', [*call("f", "{}"), Content("}")]),
    ('{"name": "f", "parameters": {"a": tru, }} b', [*call("f", '{"a": tru'), Content(", }} b")]),
    ('{"name": "f", "parameters": {"a": [1, 2', call("f", '{"a": [1, 2')),
    ('{"name": "f", "para', [Content('{"name": "f", "para')]),
    ("<|python", [Content("<|python")]),
]

MISTRAL = [
    ('[TOOL_CALLS][{"name": "weather", "arguments": ' + PARIS + "}]", call("weather", PARIS)),
    ('[TOOL_CALLS] [{"name": "run", "arguments": ' + TRICKY + ', "id": "123456789"}]', call("run", TRICKY)),
    (
        'Wait.\n[TOOL_CALLS] [ {"name": "a", "arguments": {}} , {"arguments": {"x": "é"}, "name": "b"} ]\n Done.',
        [Content("Wait."), *call("a", "{}"), *call("b", '{"x": "é"}', 1), Content("Done.")],
    ),
    ('[TOOL_CALLS][{"name": "f", "arguments": "{\\"a\\": \\"]\\"}"}]', call("f", '{"a": "]"}')),
    ('[TOOL_CALLS][{"name": "f"}]', call("f", "{}")),
    ("[TOOL_CALLS]weather[ARGS]" + PARIS, call("weather", PARIS)),
    ("[TOOL_CALLS]run[CALL_ID]aB3-_9xyz[ARGS]" + TRICKY, call("run", TRICKY)),
    ("[TOOL_CALLS]echo[ARGS]" + WITH_TAGS + "\n", call("echo", WITH_TAGS)),
    (
        'I see.\n\n[TOOL_CALLS]a.b-c[ARGS]{"x": 1}[TOOL_CALLS]d_1[CALL_ID]1[ARGS] {}\nok',
        [Content("I see."), *call("a.b-c", '{"x": 1}'), *call("d_1", "{}", 1), Content("ok")],
    ),
    ('[TOOL_CALLS]f[ARGS]"{\\"a\\": \\"\\\\n\\"}"', call("f", r'{"a": "\n"}')),
    # What is no call.
    ("[1] [TOOL_CALL] [[ARGS] {}\n", [Content("[1] [TOOL_CALL] [[ARGS] {}\n")]),
    ("[TOOL_CALLS][]", [Content("[TOOL_CALLS][]")]),
    ('[TOOL_CALLS]{"name": "f"}', [Content('[TOOL_CALLS]{"name": "f"}')]),
    (" [TOOL_CALLS] I cannot.", [Content(" [TOOL_CALLS] I cannot.")]),
    ("[TOOL_CALLS]f[ARGS]none", [Content("[TOOL_CALLS]f[ARGS]none")]),
    ('[TOOL_CALLS]f[ARGS]"none"', [Content('[TOOL_CALLS]f[ARGS]"none"')]),
    ("[TOOL_CALLS][ARGS]{}", [Content("[TOOL_CALLS][ARGS]{}")]),
    ("[TOOL_CALLS]f[TOOL_CALLS]g[ARGS]{}", [Content("[TOOL_CALLS]f"), *call("g", "{}")]),
    (
        '[TOOL_CALLS][{"name": "f", "arguments": {}}, {"nome": "g"}]',
        [*call("f", "{}"), Content(', {"nome": "g"}]')],
    ),
    # What breaks off.
    ('[TOOL_CALLS][{"name": "f", "arguments": {}} and]', [*call("f", "{}"), Content("and]")]),
    ('[TOOL_CALLS][{"name": "f", "arguments": {]}, 1', [*call("f", "{"), Content("]}, 1")]),
    ('[TOOL_CALLS][{"name": "f", "arguments": {}}, ', call("f", "{}")),
    ('[TOOL_CALLS][{"name": "f", "arguments": {"a": "b', call("f", '{"a": "b')),
    ('[TOOL_CALLS]f[ARGS]{"a": "b', call("f", '{"a": "b')),
    ('[TOOL_CALLS]f[ARGS]{"a"; 1}', [*call("f", '{"a"'), Content("; 1}")]),
    ("[TOOL_CALLS]f[CALL_ID]1[AR", [Content("[TOOL_CALLS]f[CALL_ID]1[AR")]),
    ("a [TOOL_", [Content("a [TOOL_")]),
]

NAMED = [
    (PARIS, call("f", PARIS)),
    ("\n" + TRICKY + "\n", call("f", TRICKY)),
    ("{}", call("f", "{}")),
    ('{"a": [1, ', call("f", '{"a": [1, ')),
    ('"{}"', call("f", "{}")),
    ("{} and", [*call("f", "{}"), Content("and")]),
    ("No.\n", [Content("No.\n")]),
    ("", []),
    (" \n", []),
]

REQUIRED = [
    ('[{"name": "a", "parameters": ' + PARIS + "}]", call("a", PARIS)),
    (
        ' [ {"name": "a", "parameters": {}},\n{"name": "b", "parameters": ' + TRICKY + "}\n]\n",
        [*call("a", "{}"), *call("b", TRICKY, 1)],
    ),
    ('[{"parameters": {"x": 1}, "name": "é"}]', call("é", '{"x": 1}')),
    ('[{"name": "a", "parameters": {}}, {"name": "b", "parameters": {"x', [*call("a", "{}"), *call("b", '{"x', 1)]),
    # What is cut off before its arguments.
    ('[{"name": "a", "parameters": {}}, {"na', call("a", "{}")),
    ('[{"name": "a", "parameters": {}}, {"name": "b"', [*call("a", "{}"), *call("b", "", 1)]),
    ('[{"name": "a", "parameters": ', call("a", "")),
    ('[{"name": "a", "par', call("a", "")),
    ('[{"name": "a"', call("a", "")),
    *[(text, []) for text in ("[", "[ ", "[{", '[{"na', '[{"name": ', '[{"name": "a')],
    ("[]", [Content("[]")]),
    ("No [1].", [Content("No [1].")]),
    ("", []),
]

SAMPLES = [
    pytest.param(make, text, expected, id=f"{name}-{number}")
    for name, make, samples in [
        ("hermes", HermesParser, HERMES),
        ("llama3", Llama3Parser, LLAMA3),
        ("mistral", MistralParser, MISTRAL),
        ("named", functools.partial(NamedFunctionParser, "f"), NAMED),
        ("required", CallArrayParser, REQUIRED),
    ]
    for number, (text, expected) in enumerate(samples)
]


@pytest.mark.parametrize(("make", "text", "expected"), SAMPLES)
def test_calls_and_content(make, text, expected):
    assert parse_however_cut(make, text) == expected


@pytest.mark.parametrize("limit", [0, 1])
@pytest.mark.parametrize(("make", "text", "expected"), SAMPLES)
def test_only_the_first_calls_are_passed_on(make, text, expected, limit):
    kept = merge(event for event in expected if isinstance(event, Content) or event.index < limit)
    assert parse(functools.partial(make, max_calls=limit), text) == kept


FRAGMENTS = [
    *(
        "<tool_call>",
        "</tool_call>",
        "[TOOL_CALLS]",
        "[ARGS]",
        "[CALL_ID]",
        "<|python_tag|>",
        "[",
        "]",
        "{",
        "}",
        ", ",
        ";",
        "\n",
    ),
    *('"name": ', '"arguments": ', '"parameters": ', '"f"', '"{}"', '"', "\\", "f", "1", "é "),
    *('{"name": "g", "arguments": {"a": ', '{"name": "h", "parameters": {}}', '{"arguments": {}'),
]
FORCED = [CallArrayParser, functools.partial(NamedFunctionParser, "f")]
PARSERS = [HermesParser, Llama3Parser, MistralParser, *FORCED]


@settings(max_examples=500)
@given(parts=st.lists(st.sampled_from(FRAGMENTS), max_size=12))
@example(["<tool_call>", '{"name": "g", "arguments": {"a": ', '"', "\\", '"', "}", "}", "</tool_call>"])
def test_anything_is_calls_in_order_or_content_in_full(parts):
    text = "".join(parts)
    for make in PARSERS:
        events = parse(make, text)
        assert parse(make, *parts) == parse(make, *text) == events
        begun = [event.index for event in events if isinstance(event, ToolCallBegin)]
        assert begun == list(range(len(begun)))
        latest = -1
        for event in events:
            if isinstance(event, ToolCallArguments):
                assert event.index == latest
                assert event.text.startswith("{")
            latest = event.index if isinstance(event, ToolCallBegin) else latest
        if not begun:
            content = text_of(events)
            assert content == text or (make in FORCED and text.startswith(content))


@given(arguments=st.dictionaries(st.text(), st.text() | st.integers() | st.lists(st.text(), max_size=2), max_size=4))
def test_any_arguments_arrive(arguments):
    written = json.dumps(arguments, ensure_ascii=False)
    as_object = f'{{"name": "f", "arguments": {written}}}'
    as_string = f'{{"name": "f", "arguments": {json.dumps(written)}}}'
    for value in (as_object, as_string):
        assert parse(HermesParser, *f"<tool_call>\n{value}\n</tool_call>") == call("f", written)
        assert parse(Llama3Parser, *value) == call("f", written)
        assert parse(MistralParser, *f"[TOOL_CALLS][{value}]") == call("f", written)
    assert parse(MistralParser, *f"[TOOL_CALLS]f[ARGS]{written}") == call("f", written)


@pytest.mark.parametrize(
    ("make", "before"),
    [
        (HermesParser, '<tool_call>\n{"name": "f", "arguments": '),
        (Llama3Parser, '{"name": "f", "parameters": '),
        (MistralParser, '[TOOL_CALLS][{"name": "f", "arguments": '),
        (MistralParser, "[TOOL_CALLS]f[ARGS]"),
        (functools.partial(NamedFunctionParser, "f"), ""),
        (CallArrayParser, '[{"name": "f", "parameters": '),
    ],
)
def test_arguments_stream_as_they_come(make, before):
    parser = make()
    assert parser.push(before) == []
    assert parser.push("{") == [ToolCallBegin(0, "f"), ToolCallArguments(0, "{")]
    for text in ('"a', '": ', "[", "1", "0]", "}"):
        assert parser.push(text) == [ToolCallArguments(0, text)]


def test_content_streams_but_for_what_may_stand_before_a_call():
    parser = HermesParser()
    assert parser.push("a b") == [Content("a b")]
    assert parser.push(" \n") == []
    assert parser.push("<tool") == []
    assert parser.push("s>c") == [Content(" \n<tools>c")]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (HermesParser, '<tool_call>{"name": "f", "arguments": {"a": "' + "x" * 200_000 + '"}}</tool_call>'),
        (HermesParser, '<tool_call>{"arguments": {"a": "' + "x" * 200_000 + '"}, "name": "f"}</tool_call>'),
        (HermesParser, '<tool_call>{"name": "f", "arguments": ' + '{"a":' * 50_000 + "1" + "}" * 50_000 + "}</tool_call>"),
        (HermesParser, "a" + "\n" * 200_000 + "b"),
        (HermesParser, "<tool_cal" * 20_000),
        (Llama3Parser, '{"x": "' + "y" * 200_000 + '"}'),
        (MistralParser, "[TOOL_CALLS]" + "f" * 200_000),
    ],
)
def test_long_texts_take_linear_work(make, text):
    """Quadratic work on these takes minutes."""
    assert parse(make, *text)
