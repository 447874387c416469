r"""Questions with options, of which the model names one: by its letter, or by its text.

Where the answer stands is looked for in this order; the first place that names one option decides:

1. the last `\boxed{...}`;
2. the last statement of the kind "the answer is ...", "Answer: ...";
3. the whole answer, its last line, its first line, if they begin with a label or are an option's text;
4. the text of an option, if the answer holds that of exactly one.

A letter is one that stands alone, or before a full stop, colon or bracket, so the article in "A planet" is
not option A. An answer that names no option is wrong, and the verdict says so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from stepflow_tl.evaluation.generation import Answer
from stepflow_tl.evaluation.grading import Grader, Question, Row, Verdict, register_grader

_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_STATED = re.compile(r"\b(?:answer|choice|option)\b(?:\s+[\w'-]+){0,3}?\s*(?:\bis\b|:|=)([^\n]*)", re.I)
_LEADING_WORDS = re.compile(
    r"^(?:(?:the|therefore|thus|probably|option|choice|letter|answer)\b[\s:]*)+", re.I
)
_MARKUP = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}|[*_`$\"“”]")


def choice(question: Question, answer: Answer) -> Verdict:
    """Whether the summary names the right option, by its label or its text.

    Args:
        question: Read with the fields `choices` and `labels`.
        answer: What was written.

    Raises:
        ProblemError: If the question has no options.
    """
    labels, choices = question.field("labels"), question.field("choices")
    named = named_option(answer.summary, labels, choices)
    if named is None:
        return Verdict(False, "names no option")
    return Verdict(named == question.answer, "" if named == question.answer else f"names {named}")


def named_option(text: str, labels: Sequence[str], choices: Sequence[str]) -> str | None:
    """Label of the option that a text names, or None."""
    options = dict(zip(labels, choices, strict=True))
    statements = [*reversed(_BOXED.findall(text)), *reversed(_STATED.findall(text))]
    lines = [line for line in text.splitlines() if line.strip()]
    for piece in statements:
        if (found := _by_label(piece, options) or _by_text(piece, options)) is not None:
            return found
    for piece in (text, *lines[-1:], *lines[:1]):
        if (found := _by_label(piece, options) or _by_text(piece, options, whole=True)) is not None:
            return found
    plain = f" {_plain(text)} "
    texts = {label: _plain(option) for label, option in options.items()}
    held = [label for label, option in texts.items() if option and f" {option} " in plain]
    return held[0] if len(held) == 1 else None


def _by_label(piece: str, options: Mapping[str, str]) -> str | None:
    """The label with which a piece begins."""
    piece = _bare(piece)
    longest_first = sorted(options, key=len, reverse=True)
    match = re.match(rf"[(\[]?({'|'.join(map(re.escape, longest_first))})(?![\w'])", piece, re.I)
    if match is None:
        return None
    label = next(label for label in options if label.casefold() == match[1].casefold())
    rest = piece[match.end() :]
    if not rest.strip(" .!") or re.match(r"\s*(?:[)\]:;,–—-]|\.(?!\d))", rest):
        return label
    if match[1] == label and (
        re.match(r"\s+(?:because|since|as)\b", rest) or (label not in ("A", "I") and rest[0].isspace())
    ):
        return label
    return label if f"{_plain(rest)} ".startswith(f"{_plain(options[label])} ") else None


def _by_text(piece: str, options: Mapping[str, str], *, whole: bool = False) -> str | None:
    """The option with whose text a piece begins, or which it is as a whole; the longest one."""
    plain = f"{_plain(_bare(piece))} "
    texts = {label: f"{_plain(option)} " for label, option in options.items() if _plain(option)}
    held = [label for label, text in texts.items() if (plain == text if whole else plain.startswith(text))]
    return max(held, key=lambda label: len(texts[label])) if held else None


def _bare(piece: str) -> str:
    """Without markup, and without the words that lead to an answer."""
    return _LEADING_WORDS.sub("", _MARKUP.sub(lambda match: match[1] or "", piece).strip())


def _plain(text: str) -> str:
    """Letters and digits in lower case, everything else a single space: "25 °C." is "25 c"."""
    return " ".join(re.findall(r"[^\W_]+", text.casefold()))


def _ask(row: Row) -> str:
    options = "\n".join(f"{label}. {text}" for label, text in zip(row["labels"], row["choices"], strict=True))
    return f'{row["question"]}\n\n{options}\n\nEnd with the letter of the right option: "Answer: LETTER".'


def _problems(row: Row) -> list[str]:
    labels, choices = row["labels"], row["choices"]
    found = []
    if len(choices) < 2:
        found.append(f"`choices` has {len(choices)}, expected at least two")
    if len(labels) != len(choices):
        found.append(f"there are {len(choices)} `choices` but {len(labels)} `labels`")
    if len({label.casefold() for label in labels}) != len(labels):
        found.append("`labels` names one twice")
    if len({text.strip() for text in choices}) != len(choices):
        found.append("`choices` has one twice")
    if row["answer"] not in labels:
        found.append(f"`answer` is {row['answer']!r}, which is none of the labels {', '.join(labels)}")
    return found


register_grader(
    Grader(
        "choice",
        {"question": "text", "choices": "texts", "labels": "texts", "answer": "text"},
        choice,
        ask=_ask,
        problems=_problems,
    )
)
