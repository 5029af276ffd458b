"""What the benchmark of grammars says about steps and answers; its clock proves nothing here."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from benchmarks import grammar_cost
from benchmarks.bundled import MODEL, load_bundled
from benchmarks.prompts import prompt_sets


@pytest.fixture
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_cost, "MODES", {name: grammar_cost.MODES[name] for name in ("ar", "tidar k=8 branches=1")})
    monkeypatch.setattr(grammar_cost, "MAX_TOKENS", 24)


@pytest.mark.usefixtures("_few")
def test_every_mode_and_case_is_measured_and_drafting_pays_under_a_grammar_that_fits() -> None:
    prompts = prompt_sets(AutoTokenizer.from_pretrained(MODEL), 9)["known"]
    rows = grammar_cost.measure(load_bundled(), prompts, rounds=1)
    found = {(r.mode, r.grammar, r.constrained): r for r in rows}
    assert len(found) == 2 * len(grammar_cost.CASES)
    assert all(r.tokens_per_forward == 1.0 for key, r in found.items() if key[0] == "ar")
    free, bound = (found["tidar k=8 branches=1", *case].tokens_per_forward for case in (("free", 0), ("known answer", 8)))
    assert bound > 0.8 * free > 3.0
    assert all(r.step_ratio == 1.0 for key, r in found.items() if key[1] == "free")
    assert all(r.cpu_ms_per_step > 0 and r.step_ratio > 0 for r in rows)
    assert len(grammar_cost.report(rows).splitlines()) == 2 + len(rows)


@pytest.mark.usefixtures("_few")
def test_an_answer_that_a_grammar_must_not_change_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    grammars = grammar_cost._grammars()
    monkeypatch.setattr(grammar_cost, "_grammars", lambda: {**grammars, "any text": grammars["json"]})
    prompts = prompt_sets(AutoTokenizer.from_pretrained(MODEL), 8)["known"]
    with pytest.raises(SystemExit, match="other tokens than ar with 1 of 8 under 'any text'"):
        grammar_cost.measure(load_bundled(), prompts, rounds=1)
