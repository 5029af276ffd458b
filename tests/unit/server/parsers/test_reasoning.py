from __future__ import annotations

import functools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.parsers import Content, Reasoning
from server.parsers.reasoning import ThinkParser
from tests.unit.server.parsers.replay import parse, parse_however_cut, text_of

CLOSED = functools.partial(ThinkParser, is_open=False)
OPEN = functools.partial(ThinkParser, is_open=True)

SAMPLES = [
    # The model writes both tags.
    (CLOSED, "<think>\nTwo and two.\n</think>\n\nFour.", "Two and two.", "Four."),
    (CLOSED, "\n <think>Hm</think>Four.", "Hm", "Four."),
    (CLOSED, "<think>\n\n</think>\n\nFour.", "", "Four."),
    (CLOSED, "<think></think>", "", ""),
    (CLOSED, "<think>\n  a\n\n  b \n\n</think>\n  c\n", "  a\n\n  b ", "  c\n"),
    (CLOSED, "<think>日本語 🙂\n</think>\nnaïve 🏳️‍🌈", "日本語 🙂", "naïve 🏳️‍🌈"),
    (CLOSED, "<think>a < b, </ think>, <think> and </thin\n</think>c", "a < b, </ think>, <think> and </thin", "c"),
    (CLOSED, "<think>a\n<b>\n</think>\n\n<think>c</think>", "a\n<b>", "<think>c</think>"),
    (CLOSED, "<think>a</think>b</think>\n\nc", "a", "b</think>\n\nc"),
    (CLOSED, "<think>a<<</think></think>", "a<<", "</think>"),
    # The text ends early.
    (CLOSED, "<think>never ends\n", "never ends\n", ""),
    (CLOSED, "<think>a\n</thi", "a\n</thi", ""),
    (CLOSED, "<think>", "", ""),
    (CLOSED, "<thi", "", "<thi"),
    # There is no thinking.
    (CLOSED, "Four.\n", "", "Four.\n"),
    (CLOSED, "\n\n  Four.", "", "\n\n  Four."),
    (CLOSED, "A tag: <think>x</think>", "", "A tag: <think>x</think>"),
    (CLOSED, "</think>\nFour.", "", "</think>\nFour."),
    (CLOSED, " <<think>", "", " <<think>"),
    (CLOSED, "", "", ""),
    # The prompt has opened it.
    (OPEN, "\nTwo and two.\n</think>\n\nFour.", "Two and two.", "Four."),
    (OPEN, "Two.</think>Four.", "Two.", "Four."),
    (OPEN, "\n<think>\nTwo.\n</think>Four.", "Two.", "Four."),
    (OPEN, "\n\n</think>\n\nFour.", "", "Four."),
    (OPEN, " \n</think> Four.", " ", " Four."),
    (OPEN, "<thing>\n</think>", "<thing>", ""),
    (OPEN, "all of it is thinking\n\n", "all of it is thinking\n\n", ""),
    (OPEN, "\n", "", ""),
]


@pytest.mark.parametrize(("make", "text", "reasoning", "content"), SAMPLES)
def test_thinking_and_content(make, text, reasoning, content):
    expected = [Reasoning(reasoning)] if reasoning else []
    expected += [Content(content)] if content else []
    assert parse_however_cut(make, text) == expected


@given(parts=st.lists(st.sampled_from(["<think>", "</think>", "\n", " ", "<", "</", "think", ">", "a", "é"]), max_size=12))
def test_nothing_is_lost_but_tags_and_newlines(parts):
    text = "".join(parts)
    for make in (CLOSED, OPEN):
        events = parse(make, text)
        assert parse(make, *text) == events
        told = text_of(events, Reasoning) + text_of(events)
        remaining = iter(text)
        assert all(character in remaining for character in told), "a subsequence"
        dropped = len(text) - len(told)
        assert dropped <= text.count("\n") + text.count(" ") + len("<think></think>")


def test_thinking_streams():
    parser = OPEN()
    assert parser.push("a") == [Reasoning("a")]
    assert parser.push(" b\n") == [Reasoning(" b")]
    assert parser.push("<") == []
    assert parser.push("c") == [Reasoning("\n<c")]
    assert parser.push("</think>\n") == []
    assert parser.push("d") == [Content("d")]
