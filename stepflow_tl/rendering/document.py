"""A report as a list of blocks, and two ways to write it: Markdown, and an HTML page that asks for nothing.

1. Both are made from the same blocks, so they never disagree.
2. Words are text, never markup: in Markdown every character that could mean something is escaped, in HTML
   everything is; what a model wrote goes into a fence longer than any in it, or a `pre`, with characters that
   steer a terminal or turn the writing direction shown as escapes.
3. The page has one style, no script, and a content security policy that allows this style by its hash and
   nothing else. It follows light and dark, and is read on a phone as well as on a desk.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files

from stepflow_tl.rendering.depth_chart import RULES, DepthChart
from stepflow_tl.results.tables import printable

_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>#|~$&])")


@dataclass(frozen=True)
class Heading:
    """A heading of level 1, 2 or 3."""

    level: int
    text: str


@dataclass(frozen=True)
class Paragraph:
    """Plain words."""

    text: str


@dataclass(frozen=True)
class Bullets:
    """One sentence each."""

    items: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """Rows of cells, the first column a name.

    Attributes:
        header: One word or more per column.
        rows: As many cells each.
        notes: What one has to know to read it.

    Raises:
        ValueError: If a row is longer or shorter than the header.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse a row of another width."""
        if wrong := [row for row in self.rows if len(row) != len(self.header)]:
            raise ValueError(f"{len(self.header)} columns, but a row of {len(wrong[0])}: {wrong[0]}")


@dataclass(frozen=True)
class Facts:
    """Names and values, which may be long."""

    rows: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Charts:
    """Charts beside each other.

    Attributes:
        charts: Each with the name of the file that Markdown shows, relative to the report.
        caption: What they show.
    """

    charts: tuple[tuple[str, DepthChart], ...]
    caption: str


@dataclass(frozen=True)
class Passage:
    """Something that was written, word for word.

    Attributes:
        title: What it is.
        text: The text; may hold anything.
        link: Address of a page about it, relative to the report; empty for none.
        link_text: What that page is.
    """

    title: str
    text: str
    link: str = ""
    link_text: str = ""


@dataclass(frozen=True)
class SideBySide:
    """Passages to be read against each other."""

    passages: tuple[Passage, ...]


Block = Heading | Paragraph | Bullets | Table | Facts | Charts | SideBySide


def markdown(blocks: Sequence[Block]) -> str:
    """The report as Markdown, as GitHub shows it."""
    return "\n\n".join(map(_markdown_block, blocks)) + "\n"


def html_page(blocks: Sequence[Block], title: str) -> str:
    """The report as one page; its links are relative to where it lies."""
    style = asset("shared.css") + asset("study.css") + RULES
    policy = f"default-src 'none'; style-src {hash_source(style)}; base-uri 'none'; form-action 'none'"
    body = "\n".join(map(_html_block, blocks))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(printable(title))}</title>\n<style>{style}</style>\n</head>\n<body>\n"
        f"<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def asset(name: str) -> str:
    """A file of `assets/`, with the line ends a browser would make of it before it takes the hash."""
    text = files("stepflow_tl.rendering").joinpath("assets").joinpath(name).read_text(encoding="utf-8")
    return text.replace("\r\n", "\n")


def hash_source(text: str) -> str:
    """A style or script as a content security policy allows it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _markdown_block(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f"{'#' * level} {_words(text)}"
        case Paragraph(text):
            return _words(text)
        case Bullets(items):
            return "\n".join(f"- {_words(item)}" for item in items)
        case Table(header, rows, notes):
            lines = [f"| {' | '.join(map(_words, line))} |" for line in (header, *rows)]
            lines.insert(1, f"|{':---|' + '---:|' * (len(header) - 1)}")
            return "\n\n".join(["\n".join(lines), *map(_words, notes)])
        case Facts(rows):
            return "\n".join(f"- {_words(name)}: {_words(value)}" for name, value in rows)
        case Charts(charts, caption):
            images = [f"![{_words(chart.title)}]({name})" for name, chart in charts]
            return "\n".join([*images, "", _words(caption)])
        case SideBySide(passages):
            return "\n\n".join(map(_markdown_passage, passages))


def _markdown_passage(passage: Passage) -> str:
    text = _shown(passage.text)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    lines = [f"**{_words(passage.title)}**", f"{fence}text\n{text}\n{fence}"]
    if passage.link:
        lines.append(f"[{_words(passage.link_text)}]({passage.link})")
    return "\n\n".join(lines)


def _html_block(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f'<h{level} dir="auto">{_safe(text)}</h{level}>'
        case Paragraph(text):
            return f"<p>{_safe(text)}</p>"
        case Bullets(items):
            return f"<ul>{''.join(f'<li>{_safe(item)}</li>' for item in items)}</ul>"
        case Table(header, rows, notes):
            head = "".join(f'<th scope="col">{_safe(cell)}</th>' for cell in header)
            body = "".join(
                f'<tr><th scope="row">{_safe(row[0])}</th>'
                + "".join(f"<td>{_safe(cell)}</td>" for cell in row[1:])
                + "</tr>"
                for row in rows
            )
            small = "".join(f'<p class="note">{_safe(note)}</p>' for note in notes)
            table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
            return f'<div class="scroll" tabindex="0">{table}</div>{small}'
        case Facts(rows):
            listed = "".join(f"<dt>{_safe(name)}</dt><dd>{_safe(value)}</dd>" for name, value in rows)
            return f"<dl>{listed}</dl>"
        case Charts(charts, caption):
            drawn = "".join(chart.svg() for _, chart in charts)
            return (
                f'<figure><div class="charts">{drawn}</div><figcaption>{_safe(caption)}</figcaption></figure>'
            )
        case SideBySide(passages):
            return f'<div class="beside">{"".join(map(_html_passage, passages))}</div>'


def _html_passage(passage: Passage) -> str:
    link = ""
    if passage.link:
        link = f'<p><a href="{escape(passage.link)}">{_safe(passage.link_text)}</a></p>'
    text = f'<pre dir="auto">{escape(_shown(passage.text))}</pre>'
    return f"<section><h4>{_safe(passage.title)}</h4>{text}{link}</section>"


def _words(text: str) -> str:
    """Text of one line as Markdown that means nothing but itself."""
    return _MARKDOWN.sub(r"\\\1", printable(" ".join(text.split())))


def _safe(text: str) -> str:
    return escape(printable(" ".join(text.split())))


def _shown(text: str) -> str:
    """What was written, line by line, with whatever cannot be seen as escapes."""
    return "\n".join(printable(line.replace("\t", "    ")) for line in text.split("\n"))
