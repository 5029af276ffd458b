"""Texts parsed whole and in pieces."""

from __future__ import annotations

import random

from server.parsers import Content, ToolCallArguments, ToolCallBegin, merge


def parse(make, *pieces):
    """The merged events of a text that comes in pieces."""
    parser = make()
    events = []
    for piece in pieces:
        pushed = parser.push(piece)
        assert pushed == merge(pushed)
        events += pushed
    events += parser.finish()
    assert all(event.text for event in events if not isinstance(event, ToolCallBegin))
    return merge(events)


def parse_however_cut(make, text):
    """The events of the whole text, after a check that no cut changes them."""
    whole = parse(make, text)
    for split in range(len(text) + 1):
        assert parse(make, text[:split], text[split:]) == whole, (text[:split], text[split:])
    assert parse(make, *text) == whole
    generator = random.Random(text)
    for _ in range(20):
        cuts = sorted(generator.choices(range(len(text) + 1), k=generator.randint(2, 10)))
        pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert parse(make, *pieces) == whole, pieces
    return whole


def call(name, arguments, index=0):
    """The events of one call."""
    begin = ToolCallBegin(index, name)
    return [begin, ToolCallArguments(index, arguments)] if arguments else [begin]


def text_of(events, kind=Content):
    return "".join(event.text for event in events if isinstance(event, kind))
