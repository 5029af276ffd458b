from __future__ import annotations

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from server.parsers.json_scanner import JsonScanner, StringDecoder

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=15,
)
STYLES = st.fixed_dictionaries(
    {
        "ensure_ascii": st.booleans(),
        "indent": st.sampled_from([None, 0, 2]),
        "separators": st.sampled_from([None, (",", ":"), (" , ", " : ")]),
    }
)


def scan(text):
    """The scanner after the text and what it gave, None if it refused a character."""
    scanner, texts = JsonScanner(), []
    for character in text:
        scanned = scanner.push(character)
        if scanned is None:
            return scanner, None
        texts.append(scanned)
    return scanner, "".join(texts)


def is_json(text):
    def refuse(constant):
        raise ValueError(constant)

    try:
        json.loads(text, strict=False, parse_constant=refuse)
    except ValueError:
        return False
    return True


@given(value=VALUES, style=STYLES)
def test_json_goes_through_unchanged_and_ends_where_it_ends(value, style):
    text = json.dumps(value, **style)
    scanner, scanned = scan(text)
    assert scanned == text
    if isinstance(value, (str, list, dict)):
        assert scanner.is_complete
        assert not scan(text[:-1])[0].is_complete
        assert scanner.push("x") is None


@given(value=st.dictionaries(st.text(max_size=8), VALUES, max_size=5), style=STYLES)
def test_values_of_top_level_keys_are_where_json_has_them(value, style):
    scanner, texts, ended = JsonScanner(), {}, set()
    for character in json.dumps(value, **style):
        scanned = scanner.push(character)
        if scanner.key is not None:
            assert scanner.key not in ended
            texts.setdefault(scanner.key, []).append(scanned)
        if scanner.value_is_complete:
            ended.add(scanner.key)
    assert {key: json.loads("".join(parts)) for key, parts in texts.items()} == value
    assert ended == {key for key, item in value.items() if isinstance(item, (str, list, dict))}


@settings(max_examples=1000)
@given(text=st.text('{}[]",: \n01.-eE', max_size=12) | st.text('{}[]"aé\t', max_size=8))
@example('{"a":1,}')
@example("[1 2]")
@example("-")
@example("01")
@example("1.e1")
@example('{"a" 1}')
@example("tru")
@example("truee")
@example("[NaN]")
@example("\ufeff1")
def test_exactly_what_json_takes_is_taken(text):
    scanner, scanned = scan(text + " ")
    assert (scanned is not None and scanner.is_complete) == is_json(text)


@settings(max_examples=500)
@given(body=st.text('\\"u0dé8/n\n\x00', max_size=15))
@example("\\")
@example("\\u12")
@example("\\ud83d")
@example("C:\\users\\new")
@example("\\\n")
def test_any_string_comes_back_as_json(body):
    # An escape that is still open takes the first quote.
    scans = [scan(f'["{body}{end}') for end in ('"]', '""]')]
    closed = [scanned for scanner, scanned in scans if scanned is not None and scanner.is_complete]
    assert closed or '"' in body
    for scanned in closed:
        json.loads(scanned)


@pytest.mark.parametrize(
    ("text", "scanned"),
    [
        ('"a\nb\tc"', r'"a\nb\tc"'),
        (r'"\d+ \'x\'"', r'"\\d+ \\' + "'x" + r"\\'" + '"'),
        (r'"C:\users"', r'"C:\\users"'),
        (r'"\u12"', r'"\\u12"'),
        (r'"\u1\n"', r'"\\u1\n"'),
        (r'"\"\\\/\b\u00e9"', r'"\"\\\/\b\u00e9"'),
    ],
)
def test_strings_are_repaired(text, scanned):
    assert scan(text)[1] == scanned


@given(
    text=st.text(st.characters(codec="utf-8"), max_size=20) | st.text("a😀é\n\"\\'", max_size=20),
    ensure_ascii=st.booleans(),
    data=st.data(),
)
def test_strings_are_decoded_however_cut(text, ensure_ascii, data):
    written = json.dumps(text, ensure_ascii=ensure_ascii)
    cut = data.draw(st.integers(0, len(written)))
    decoder = StringDecoder()
    assert not decoder.is_complete
    assert decoder.push(written[:cut]) + decoder.push(written[cut:]) == text
    assert decoder.is_complete


def test_half_a_surrogate_pair_is_no_character():
    assert StringDecoder().push(r'"\ud83d!\ude00 \ud83d\ud83d\ude00"') == "\ufffd!\ufffd \ufffd😀"


def test_depth_has_no_bound():
    depth = 200_000
    scanner, scanned = scan('{"a": ' + "[" * depth)
    assert scanned is not None
    assert scanner.depth == depth + 1
    for closer in "]" * depth + "}":
        assert not scanner.is_complete
        assert scanner.push(closer) == closer
    assert scanner.is_complete
