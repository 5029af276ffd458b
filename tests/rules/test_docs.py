"""The generated reference pages are those of the code, and the README's file tree is the repository's."""

import re
from pathlib import Path

import pytest

from docs import options_by_mode
from docs.generate import PAGES, REFERENCE
from docs.options_by_mode import OPTIONS, rows
from server.protocol import ChatCompletionRequest, CompletionRequest

ROOT = Path(__file__).parents[2]


MATRIX = "options-by-mode.md"


@pytest.mark.parametrize("name", PAGES.keys() - {MATRIX})
def test_reference_pages_are_current(name):
    assert (REFERENCE / name).read_text() == PAGES[name](), "run `make docs`"


def test_a_sample_of_the_matrix_is_current():
    """All of it takes a minute: ``tests/e2e`` has that."""
    page = (REFERENCE / MATRIX).read_text()
    assert options_by_mode.HEADER in page, "run `make docs`"
    found = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith(("| option", "| ---"))]
    assert [line.split(" | ")[0].removeprefix("| ") for line in found] == [option.name for option in OPTIONS], "run `make docs`"
    for option, row in rows(OPTIONS[2::7]).items():
        assert row in found, f"{option.name}: run `make docs`"


def test_the_matrix_has_every_field_that_shapes_an_answer():
    shown = {name for option in OPTIONS for name in (*option.fields, *options_by_mode.PLAIN)}
    declared = ChatCompletionRequest.model_fields.keys() | CompletionRequest.model_fields.keys()
    assert declared - shown == {"messages", "model", "decoding", "add_special_tokens"}


def test_no_page_has_a_placeholder_or_a_dead_link():
    pages = [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "server").rglob("*.md")]
    for page in pages:
        text = page.read_text()
        assert not re.findall(r"^[A-Z]+_(?:TABLE|LINE)$", text, re.MULTILINE), page
        for link in re.findall(r"\]\(([^)#\s]+)\)", text):
            assert link.startswith("http") or (page.parent / link).exists(), f"{page}: {link}"


def test_the_readme_names_every_top_level_folder():
    tree = (ROOT / "README.md").read_text().split("## The tree")[1]
    for folder in ("server", "engine", "kernels", "training", "benchmarks", "tests", "docs", "docker"):
        assert (ROOT / folder).is_dir()
        assert f"{folder}/" in tree, folder
