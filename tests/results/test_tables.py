import math

import pytest

from stepflow_tl.results import tables


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0.0000"), (0.25, "0.2500"), (-0.00012, "-1.20e-04"), (2.5e7, "2.50e+07"), (math.nan, "-")],
)
def test_numbers_keep_their_digits_at_any_scale(value, text):
    assert tables.number(value) == text


def test_columns_line_up_under_headings_in_two_lines():
    text = tables.text_table("title", ["layer", "lock in"], [["0", "0.5"], ["10", "-"]], ["a note"])
    assert text.splitlines() == [
        "title",
        "-----------",
        "       lock",
        "layer    in",
        "-----------",
        "    0   0.5",
        "   10     -",
        "-----------",
        "a note",
    ]


def test_every_part_of_an_html_table_is_escaped():
    html = tables.html_table("<1>", ["<2>"], [["<3>"]], ["<4>"])
    assert all(f"&lt;{i}&gt;" in html and f"<{i}>" not in html for i in range(1, 5))
