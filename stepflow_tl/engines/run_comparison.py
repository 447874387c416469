"""Two or three runs of another engine on the same questions: what of the differences could be chance?

1. Questions are paired by their ids; two that share an id must be the same question. Those that a run lacks
   are left out, and counted.
2. A question's score under a run is the mean over its samples. Every further run is compared with the first,
   and the third with the second (a repair with its control): mean difference with its interval, McNemar's
   exact test where every question has one sample that is right or wrong, else sign flips
   (`statistics.paired`). P-values are Holm's over these comparisons.
3. The same by subject, Holm's over the subjects of one comparison.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from jaxtyping import Bool, Float

from stepflow_tl.engines.run_samples import RunSample
from stepflow_tl.errors import ComparisonError
from stepflow_tl.evaluation.paired_cells import AFTER_DIFFERENCE, difference_cells
from stepflow_tl.results.tables import text_table
from stepflow_tl.statistics.effects import corrected
from stepflow_tl.statistics.paired import PairedDifference, paired_difference

_HEADER = ["", "n", "right", "minus", "difference", *AFTER_DIFFERENCE]


@dataclass(frozen=True)
class RunComparison:
    """Scores of the same questions under several runs.

    Attributes:
        names: Of the runs, the plain one first.
        questions: Ids.
        subjects: Of each question.
        scores: Mean score of each question under each run.
        is_binary: Whether every score is of one sample, right or wrong.
        n_left_out: Questions of each run that another run lacks.
        seed: Of the resampling.
    """

    names: tuple[str, ...]
    questions: tuple[str, ...]
    subjects: tuple[str, ...]
    scores: Float[np.ndarray, "run question"]
    is_binary: bool
    n_left_out: tuple[int, ...]
    seed: int = 0

    @classmethod
    def of(cls, runs: Mapping[str, Sequence[RunSample]], seed: int = 0) -> RunComparison:
        """Pair the samples of several runs.

        Args:
            runs: By name, in order: the first is what the others are compared with.
            seed: Of the resampling.

        Raises:
            ComparisonError: If there are not two or three runs, they share no question, or an id stands for
                different questions.
        """
        if len(runs) not in (2, 3):
            raise ComparisonError(f"{len(runs)} runs: expected two or three, the plain one first")
        by_question = {name: _by_question(name, samples) for name, samples in runs.items()}
        first, *others = by_question.values()
        shared = [question for question in first if all(question in other for other in others)]
        if not shared:
            examples = ", ".join(repr(next(iter(found))) for found in by_question.values())
            raise ComparisonError(f"the runs share no question: their first ones are {examples}")
        for question in shared:
            if len({found[question][0].digest for found in by_question.values()}) > 1:
                raise ComparisonError(f"{question} is not the same question in all runs: not the same data")
        return cls(
            tuple(runs),
            tuple(shared),
            tuple(first[question][0].subject for question in shared),
            np.array([[np.mean([s.score for s in f[q]]) for q in shared] for f in by_question.values()]),
            all(len(f[q]) == 1 and f[q][0].score in (0, 1) for f in by_question.values() for q in shared),
            tuple(len(found) - len(shared) for found in by_question.values()),
            seed,
        )

    def difference(self, run: str, against: str, subject: str | None = None) -> PairedDifference:
        """One run minus another on the same questions, all or those of one subject; p is not corrected."""
        scores = [self.scores[self.names.index(name)][self._of(subject)] for name in (run, against)]
        return paired_difference(*scores, binary=self.is_binary, seed=self.seed)

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Which run is compared with which."""
        plain, *others = self.names
        return [(name, plain) for name in others] + ([(others[0], others[1])] if len(others) == 2 else [])

    def table(self) -> str:
        """All comparisons, over all questions and by subject, as text."""
        test = "McNemar's exact test" if self.is_binary else "sign flips over the questions"
        notes = [
            f"paired over {len(self.questions)} questions; BCa bootstrap, 10000 resamples; p from {test}"
        ]
        notes += [
            f"{name}: {n} questions left out, which another run lacks"
            for name, n in zip(self.names, self.n_left_out, strict=True)
            if n
        ]
        notes.append(f"{self.names[0]}: {self.scores[0].mean():.4f} right")
        tables = [
            text_table("Right answers", _HEADER, self._rows([(*pair, None) for pair in self.pairs]), notes)
        ]
        subjects = list(dict.fromkeys(self.subjects))
        if len(subjects) > 1:
            for run, against in self.pairs:
                rows = self._rows([(run, against, subject) for subject in subjects])
                tables.append(text_table(f"{run} minus {against}, by subject", _HEADER, rows))
        return "\n\n".join(tables)

    def to_json(self) -> str:
        """Scores and comparisons as JSON."""
        found = {
            "questions": self.questions,
            "subjects": self.subjects,
            "scores": {name: row.tolist() for name, row in zip(self.names, self.scores, strict=True)},
            "differences": [
                {"run": run, "against": against, **asdict(self.difference(run, against))}
                for run, against in self.pairs
            ],
        }
        return json.dumps(found, indent=1)

    def _of(self, subject: str | None) -> Bool[np.ndarray, " question"]:
        return np.array([subject in (None, each) for each in self.subjects])

    def _rows(self, wanted: Sequence[tuple[str, str, str | None]]) -> list[list[str]]:
        found = [self.difference(*each) for each in wanted]
        p_values = corrected(np.array([each.p_value for each in found]), "holm")
        rows = []
        for (run, against, subject), d, p in zip(wanted, found, p_values, strict=True):
            right = self.scores[self.names.index(run)][self._of(subject)].mean()
            name = run if subject is None else subject
            rows.append([name, str(d.n), f"{right:.4f}", against, *difference_cells(d, p)])
        return rows


def _by_question(name: str, samples: Sequence[RunSample]) -> dict[str, list[RunSample]]:
    found: dict[str, list[RunSample]] = {}
    for sample in samples:
        if not 0 <= sample.score <= 1:
            raise ComparisonError(
                f"{name}: the score of {sample.question} is {sample.score}: expected 0 to 1; name another "
                "metric"
            )
        found.setdefault(sample.question, []).append(sample)
    return found


def trace_lines(runs: Mapping[str, Sequence[RunSample]]) -> Iterator[str]:
    """The answers as JSON lines for `analyze`: `--group-by is_correct`, `--where condition=NAME`.

    Args:
        runs: By name.

    Raises:
        ComparisonError: If a run has no texts: it scored what was given to it.
    """
    for name, samples in runs.items():
        seen: dict[str, int] = {}
        for sample in samples:
            number = seen[sample.question] = seen.get(sample.question, -1) + 1
            if not sample.parts:
                raise ComparisonError(f"{name}: {sample.question} has no generated text, thus no trace")
            yield (
                json.dumps(
                    {
                        "id": f"{name}/{sample.question}/{number}",
                        "condition": name,
                        "problem_id": sample.question,
                        "is_correct": sample.score == 1,
                        "subject": sample.subject,
                        **sample.parts,
                    }
                )
                + "\n"
            )
