from __future__ import annotations

import pytest

from engine import TokenLogprobs
from server.logprobs import LEAST, LogprobsWriter, TextPlace

BOS, RESERVED = 5, 6


def entry(token_id, logprob=-1.0, top=()):
    return TokenLogprobs(token_id, logprob, 1, top)


def ids_of(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


def test_offsets_point_at_the_character_that_a_token_belongs_to(tokenizer):
    text = "a🙂é b"
    ids = ids_of(tokenizer, text)
    place = TextPlace("", keeps_special=False)
    lists = LogprobsWriter(tokenizer).completion([entry(i) for i in ids], place)
    data = b""
    for token, offset in zip(ids, lists.text_offset, strict=True):
        assert offset == len(data.decode(errors="ignore"))
        data += tokenizer.token_bytes(token)
    assert data.decode() == text
    assert place.offset == len(text)


@pytest.mark.parametrize(
    ("echo", "keeps_special", "tokens", "offsets"),
    [
        ("a", False, [BOS, "a", "b"], [0, 0, 1]),  # what the tokenizer put in front is not in the text
        ("<|bos|>a", False, [BOS, "a", "b"], [0, 7, 8]),  # but what the client sent is
        ("", False, ["a", RESERVED, "b"], [0, 1, 1]),
        ("", True, ["a", RESERVED, "b"], [0, 1, 13]),
        ("a", True, [BOS, "a", RESERVED, "b"], [0, 0, 1, 13]),
    ],
)
def test_special_tokens_have_the_width_that_they_have_in_the_text(tokenizer, echo, keeps_special, tokens, offsets):
    ids = [ids_of(tokenizer, t)[0] if isinstance(t, str) else t for t in tokens]
    lists = LogprobsWriter(tokenizer).completion([entry(i) for i in ids], TextPlace(echo, keeps_special=keeps_special))
    assert lists.text_offset == offsets


def test_the_token_that_came_is_among_the_likeliest(tokenizer):
    a, b, c = (ids_of(tokenizer, text)[0] for text in "abc")
    lists = LogprobsWriter(tokenizer).completion([entry(c, -9.0, ((a, -1.0), (b, -2.0)))], TextPlace("", keeps_special=False))
    assert list(lists.top_logprobs[0].items()) == [("a", -1.0), ("b", -2.0), ("c", -9.0)]


def test_parts_of_characters_are_told_apart(tokenizer):
    first, second, *_ = ids_of(tokenizer, "🙂")
    lists = LogprobsWriter(tokenizer).completion([entry(first, -2.0, ((second, -1.0),))], TextPlace("", keeps_special=False))
    assert lists.tokens == ["bytes:\\xf0"]
    assert lists.top_logprobs == [{"bytes:\\x9f": -1.0, "bytes:\\xf0": -2.0}]


def test_minus_infinity_becomes_a_number(tokenizer):
    [written] = LogprobsWriter(tokenizer).chat([entry(70, float("-inf"), ((71, float("-inf")),))]).content
    assert (written.logprob, written.top_logprobs[0].logprob) == (LEAST, LEAST)


def test_an_empty_prompt_has_no_entries(tokenizer):
    assert LogprobsWriter(tokenizer).prompt([], []) == []


def test_ids_past_the_vocabulary_are_spelt_as_nothing(tokenizer):
    [written] = LogprobsWriter(tokenizer).chat([entry(10**6)]).content
    assert (written.token, written.bytes) == ("", [])
