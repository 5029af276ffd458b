"""The generated reference pages are those of the code, and the README's file tree is the repository's."""

import re
from pathlib import Path

import pytest

from docs.generate import PAGES, REFERENCE

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", PAGES)
def test_reference_pages_are_current(name):
    assert (REFERENCE / name).read_text() == PAGES[name](), "run `make docs`"


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
