"""Which answers of a study are mapped, and the files of traces that the two analyses read.

1. Of the plain answers, those that the token limit cut off are left out: their length is the limit's, not
   the model's. So are those without thinking or without a summary, of which there is no map of both.
2. In each group, right and wrong, answers to different questions come first, and among them those to
   questions that have right and wrong answers, which can be compared within the question; then second
   answers, and so on. Of a question that has both, the right and the wrong answer nearest in tokens come
   first, because shares depend on length. Equals are in an order that a seed and the answer's id decide. The
   first N of each group are taken, so a larger N adds traces and changes none.
3. Beside them, for the pages: both answers to the questions that the repair gained or lost. Those that are
   not among the chosen have no `right` in the file, so that no comparison counts them.

Every row holds the answer's token ids, from which the trace is built: nothing is tokenised again.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product, zip_longest
from pathlib import Path

from stepflow_tl.evaluation import Answer, Evaluation
from stepflow_tl.evaluation.evaluation import PLAIN
from stepflow_tl.results.files import write_atomically
from stepflow_tl.runs.answer_file import answer_id


@dataclass(frozen=True)
class TraceRow:
    """One answer as a row of a file of traces.

    Attributes:
        id: Of the answer, as in the answer file.
        question_id: Of its question.
        tokens: Prompt and answer.
        right: Whether it is right; None for an answer that is mapped for its page alone.
    """

    id: str
    question_id: str
    tokens: tuple[int, ...]
    right: bool | None


@dataclass(frozen=True)
class Choice:
    """The plain answers that are compared.

    Attributes:
        rows: Right ones first.
        left_out: What was left out, in words.
    """

    rows: tuple[TraceRow, ...]
    left_out: tuple[str, ...]

    def ids(self, right: bool) -> tuple[str, ...]:
        """Ids of one group."""
        return tuple(row.id for row in self.rows if row.right is right)


@dataclass(frozen=True)
class Change:
    """A question on which the repair scores otherwise, and the sample that shows it.

    Attributes:
        question: Which one, from 0.
        sample: The first sample that is right under one condition and wrong under the other.
        gained: Whether the repair scores higher.
    """

    question: int
    sample: int
    gained: bool


def trace_row(
    evaluation: Evaluation, question: int, condition: str, sample: int, *, right: bool | None = None
) -> TraceRow:
    """The row of one answer."""
    asked = evaluation.questions[question]
    return TraceRow(
        answer_id(asked, condition, sample),
        asked.id,
        evaluation.results[condition].answers[question][sample].tokens,
        right,
    )


def choose_traces(evaluation: Evaluation, most: int, seed: int) -> Choice:
    """The plain answers to compare, up to `most` right and `most` wrong ones.

    Args:
        evaluation: With the plain condition.
        most: Of each group.
        seed: Of the order among equals.
    """
    plain, left_out = evaluation.results[PLAIN], Counter[str]()
    groups: dict[bool, list[tuple[int, bool, str, TraceRow]]] = {True: [], False: []}
    for question, (answers, verdicts) in enumerate(zip(plain.answers, plain.verdicts, strict=True)):
        why = list(map(_unusable, answers))
        left_out.update(filter(None, why))
        usable = [sample for sample, reason in enumerate(why) if not reason]
        taken = Counter[bool]()
        rows = [
            trace_row(evaluation, question, PLAIN, sample, right=bool(verdicts[sample])) for sample in usable
        ]
        rows.sort(key=lambda row: _order(seed, row.id))
        nearest = _nearest_pair(rows)
        for row in (*nearest, *(row for row in rows if row not in nearest)):
            right = bool(row.right)
            groups[right].append((taken[right], not nearest, _order(seed, row.id), row))
            taken[right] += 1
    chosen, words = [], [f"{count} plain {reason}" for reason, count in sorted(left_out.items())]
    for right, group in groups.items():
        group.sort(key=lambda entry: entry[:3])
        chosen += [row for *_, row in group[:most]]
        if len(group) > most:
            name = "right" if right else "wrong"
            words.append(
                f"{len(group) - most} of {len(group)} {name} plain answers are not mapped (--maps {most})"
            )
    return Choice(tuple(chosen), tuple(words))


def changes(evaluation: Evaluation, repair: str) -> list[Change]:
    """The questions on which the repair has another score, gained and lost in turn, each in its order."""
    plain, other = evaluation.results[PLAIN], evaluation.results[repair]
    found: dict[bool, list[Change]] = {True: [], False: []}
    for question, difference in enumerate(other.scores - plain.scores):
        if difference:
            gained = bool(difference > 0)
            pairs = enumerate(zip(plain.right[question], other.right[question], strict=True))
            sample = next(i for i, (before, after) in pairs if before is not gained and after is gained)
            found[gained].append(Change(question, sample, gained))
    turns = zip_longest(found[True], found[False])
    return [change for pair in turns for change in pair if change is not None]


def with_pages(
    evaluation: Evaluation, chosen: Sequence[TraceRow], shown: Iterable[Change], condition: str
) -> list[TraceRow]:
    """The chosen rows, and those of a condition's answers to the questions that are shown."""
    rows = {row.id: row for row in chosen}
    for change in shown:
        answer = evaluation.results[condition].answers[change.question][change.sample]
        if answer.thinking or answer.summary:  # of nothing there is no map
            row = trace_row(evaluation, change.question, condition, change.sample)
            rows.setdefault(row.id, row)
    return list(rows.values())


def write_rows(path: Path, rows: Iterable[TraceRow]) -> None:
    """The rows as JSON lines, for `analyze_dataset`.

    Raises:
        ResultFileError: If the file cannot be written.
    """
    write_atomically(path, "".join(_lines(rows)).encode("ascii"))


def _lines(rows: Iterable[TraceRow]) -> Iterator[str]:
    for row in rows:
        yield json.dumps({**asdict(row), "tokens": list(row.tokens)}) + "\n"


def _nearest_pair(rows: Sequence[TraceRow]) -> tuple[TraceRow, ...]:
    """A right and a wrong answer that differ least in tokens, of equals the first; empty without both."""
    right, wrong = ([row for row in rows if row.right is right] for right in (True, False))
    return min(
        product(right, wrong), key=lambda pair: abs(len(pair[0].tokens) - len(pair[1].tokens)), default=()
    )


def _unusable(answer: Answer) -> str:
    """Why there is no comparing this answer; empty where there is."""
    if not answer.finished:
        return "answers were cut off by the token limit"
    if not answer.thinking.strip() or not answer.summary.strip():
        return "answers have no thinking or no summary"
    return ""


def _order(seed: int, name: str) -> str:
    return hashlib.sha256(f"{seed}/{name}".encode("utf-8", "surrogatepass")).hexdigest()
