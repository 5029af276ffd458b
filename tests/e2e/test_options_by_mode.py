"""Every request option in every decode mode, through the API: the reference page is what is observed now."""

from docs.generate import REFERENCE
from docs.options_by_mode import page


def test_the_matrix_is_current():
    assert (REFERENCE / "options-by-mode.md").read_text() == page(), "run `make docs`"
