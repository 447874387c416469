"""Results as tables: text and HTML from the same rows, data frames, and the words and numbers in their cells.

Terminal and notebook get the same rows, so they never disagree. pandas is imported only where a data frame is
asked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from stepflow_tl.errors import require


def number(value: float) -> str:
    """Four significant decimals at most; "-" for a value that does not exist."""
    if math.isnan(value):
        return "-"
    if value != 0 and not 1e-3 <= abs(value) < 1e4:
        return f"{value:.2e}"
    return f"{value:.4f}"


def probability(value: float) -> str:
    """Four decimals; "-" for a value that does not exist."""
    return "-" if math.isnan(value) else f"{value:.4f}"


def text_table(
    title: str, header: Sequence[str], rows: Sequence[Sequence[str]], footer: Sequence[str] = ()
) -> str:
    """Right-aligned columns under headings that break at their first space; footer lines below a rule."""
    headings = [name.split(" ", 1) if " " in name else ["", name] for name in header]
    widths = [
        max([len(part) for part in heading] + [len(row[column]) for row in rows])
        for column, heading in enumerate(headings)
    ]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    lines = [title, rule]
    body = [[heading[part] for heading in headings] for part in (0, 1)] + [list(row) for row in rows]
    lines += ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in body]
    lines.insert(4, rule)
    return "\n".join([line.rstrip() for line in lines] + [rule, *footer])


def html_table(
    title: str, header: Sequence[str], rows: Sequence[Sequence[str]], footer: Sequence[str] = ()
) -> str:
    """The same table for notebooks; every cell is escaped."""
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    notes = "".join(f"<br>{escape(line)}" for line in footer)
    return (
        f'<table style="font-variant-numeric: tabular-nums; text-align: right">'
        f'<caption style="text-align: left">{escape(title)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        f"<small>{notes}</small>"
    )


def shortened(text: str, width: int = 32) -> str:
    """The text on one line, cut off after `width` characters."""
    words = " ".join(text.split())
    return words if len(words) <= width else words[: width - 1] + "…"


def printable(text: str) -> str:
    """The text with unprintable characters escaped, so that an id cannot steer a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def dataframe(columns: Mapping[str, Sequence[Any]]) -> Any:
    """A `pandas.DataFrame` with these columns.

    Raises:
        MissingExtraError: If pandas is not installed.
    """
    pandas = require("pandas", purpose="to_dataframe", extra="dataframes")
    return pandas.DataFrame(dict(columns))
