"""The generated reference pages are those of the code, and the README's file tree is the repository's."""

from pathlib import Path

import pytest

from docs.generate import PAGES, REFERENCE

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", PAGES)
def test_reference_pages_are_current(name):
    assert (REFERENCE / name).read_text() == PAGES[name](), "run `make docs`"


def test_the_readme_names_every_top_level_folder():
    tree = (ROOT / "README.md").read_text().split("## The tree")[1]
    for folder in ("server", "engine", "kernels", "training", "benchmarks", "tests", "docs", "docker"):
        assert (ROOT / folder).is_dir()
        assert f"{folder}/" in tree, folder
