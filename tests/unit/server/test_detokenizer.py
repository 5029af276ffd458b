from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.detokenizer import MAX_HELD_TOKENS, Detokenizer, StopMatcher, StopTable, TextDecoder

TEXTS = ["the cat sat", "naïve 🙂 e\u0301", "日本語", "🏳️‍🌈", " leading", "a\n\n b", "\ufffd\ufffd"]


def bytes_as_tokens(tokenizer, data: bytes) -> list[int]:
    """One token per byte, whatever the merges would make of them."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    names = bytes_to_unicode()
    ids = {name: i for i, name in enumerate(tokenizer.token_strings(range(tokenizer.num_tokens)))}
    return [ids[names[byte]] for byte in data]


@pytest.mark.parametrize("text", TEXTS)
def test_characters_are_whole_and_nothing_is_lost(tokenizer, text):
    decoder = TextDecoder(tokenizer, skipped_ids=tokenizer.special_ids)
    ids = bytes_as_tokens(tokenizer, text.encode())
    parts = [decoder.push(i) for i in ids]
    assert "".join(parts) + decoder.flush() == text
    if "\ufffd" not in text:
        assert all("\ufffd" not in part for part in parts)


@settings(deadline=None, max_examples=200)
@given(data=st.binary(max_size=60))
def test_any_bytes_decode_as_the_tokenizer_decodes_them_whole(tokenizer, data):
    ids = bytes_as_tokens(tokenizer, data)
    decoder = TextDecoder(tokenizer, skipped_ids=tokenizer.special_ids)
    text = "".join(decoder.push(i) for i in ids) + decoder.flush()
    if len(data) < MAX_HELD_TOKENS:
        assert text == data.decode(errors="replace")


def test_a_long_run_of_bad_bytes_is_let_go(tokenizer):
    ids = bytes_as_tokens(tokenizer, b"\xff" * 100)
    decoder = TextDecoder(tokenizer, skipped_ids=tokenizer.special_ids)
    parts = [decoder.push(i) for i in ids]
    assert sum(map(len, parts)) > 50
    assert set("".join(parts)) == {"\ufffd"}


def test_special_and_unknown_tokens(tokenizer):
    a = tokenizer.encode("a", add_special_tokens=False)[0]
    hidden = Detokenizer(tokenizer, StopTable([]), skipped_ids=tokenizer.special_ids)
    shown = Detokenizer(tokenizer, StopTable([]), skipped_ids=())
    ids = [a, 6, a, 10**6, a]
    assert hidden.append(ids).text + hidden.finish().text == "aaa"
    assert shown.append(ids).text + shown.finish().text == "a<|reserved|>aa"


@pytest.mark.parametrize(
    ("stops", "text", "before", "stop"),
    [
        (["b"], "abc", "a", "b"),
        (["bc", "b"], "abc", "a", "b"),
        (["abc", "b"], "xabc", "xa", "b"),
        (["abc", "bc"], "xabc", "x", "abc"),
        (["aab"], "aaab", "a", "aab"),
        (["abab"], "abacabab", "abac", "abab"),
        (["\n\n"], "a\nb\n\nc", "a\nb", "\n\n"),
        (["zz"], "fizz", "fi", "zz"),
        (["zzz"], "fizz", "fizz", None),
        (["🙂!"], "🙂🙂!", "🙂", "🙂!"),
    ],
)
def test_stop_strings_at_every_split(stops, text, before, stop):
    for first in range(len(text) + 1):
        for second in range(first, len(text) + 1):
            matcher = StopMatcher(StopTable(stops))
            sent, found = "", None
            for part in (text[:first], text[first:second], text[second:]):
                piece, found = matcher.push(part)
                sent += piece
                if found is not None:
                    break
                assert not any(s in sent for s in stops)
            if found is None:
                sent += matcher.flush()
            assert (sent, found) == (before, stop)


@settings(deadline=None, max_examples=300)
@given(text=st.text("ab", max_size=30), stops=st.lists(st.text("ab", min_size=1, max_size=5), max_size=3))
def test_the_stop_string_that_ends_first_counts(text, stops):
    """Against the plain definition: the shortest prefix of the text that ends with a stop string, the longest such string."""
    expected = (text, None)
    for end in range(1, len(text) + 1):
        hits = [s for s in stops if text[:end].endswith(s)]
        if hits:
            stop = max(hits, key=len)
            expected = (text[: end - len(stop)], stop)
            break
    matcher = StopMatcher(StopTable(stops))
    sent, found = "", None
    for character in text:
        piece, found = matcher.push(character)
        sent += piece
        if found:
            break
    assert (sent if found else sent + matcher.flush(), found) == expected


def test_only_what_may_become_a_stop_string_is_held():
    matcher = StopMatcher(StopTable(["</s>"]))
    assert matcher.push("a<") == ("a", None)
    assert matcher.push("b") == ("<b", None)
    assert matcher.push("</s") == ("", None)
    assert matcher.flush() == "</s"


@pytest.mark.parametrize("stop", ["cat", "at s", "t", "sat on"])
def test_tokens_count_up_to_the_one_that_completes_the_stop(tokenizer, stop):
    text = "the cat sat on"
    ids = bytes_as_tokens(tokenizer, text.encode())
    for first in range(len(ids) + 1):
        detokenizer = Detokenizer(tokenizer, StopTable([stop]), skipped_ids=tokenizer.special_ids)
        one = detokenizer.append(ids[:first])
        count = one.num_tokens
        two = one if one.stop else detokenizer.append(ids[first:])
        if not one.stop:
            count += two.num_tokens
        assert two.stop == stop
        assert count == text.index(stop) + len(stop)
        assert (one.text if one.stop else one.text + two.text) == text[: text.index(stop)]
