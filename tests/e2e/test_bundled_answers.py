"""The bundled model's level on questions that were written without sight of its training phrasings."""

import pytest

from benchmarks.bundled import MODEL
from benchmarks.stdlib_questions import ask, load_held_out


@pytest.fixture(scope="module")
def close():
    return ask(MODEL, load_held_out()["close"], branches=None)


def test_most_close_paraphrases_are_answered_rightly(close):
    answered, _ = close
    right = sum(a.is_right for a in answered)
    assert right >= 0.7 * len(answered), f"{right} of {len(answered)}"


def test_fifty_names_are_known(close):
    answered, _ = close
    assert len({a.question.name for a in answered if a.is_right and a.question.intent == "about"}) >= 50


def test_a_step_with_all_branches_gives_four_tokens(close):
    _, tokens_per_decode_step = close
    assert tokens_per_decode_step >= 4.0
