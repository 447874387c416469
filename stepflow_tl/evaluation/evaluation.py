"""`evaluate`: the same questions under several conditions, and what of the differences could be chance.

1. The conditions are the plain model, StepFlow, each half of it, and a control of equal size for each. A
   difference to the plain model says that something changed; only a difference to the control says that it
   was the bridge's region or the momentum's direction that changed it.
2. Every condition answers every question with the same batches, seeds and decoding (`generation`).
3. A grader says which answers are right; a question's score is the share of its answers that are.
4. Each condition is compared with the plain model and with its control, question by question
   (`statistics.paired`); p-values are corrected for the number of comparisons of each kind (Holm).

Cost: all answers are generated once per condition. Nothing of a condition stays on the model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from stepflow_tl.evaluation.decoding import Decoding
from stepflow_tl.evaluation.generation import Answer, Prompting, write_answers
from stepflow_tl.evaluation.graders import exact
from stepflow_tl.evaluation.grading import Grade, Grader, Question, Verdict, graded, prepared
from stepflow_tl.evaluation.paired_cells import AFTER_DIFFERENCE, difference_cells
from stepflow_tl.results.tables import text_table
from stepflow_tl.statistics.effects import corrected
from stepflow_tl.statistics.paired import PairedDifference, paired_difference
from stepflow_tl.stepflow.flow import StepFlow

Stop = Literal["", "interrupted", "disk full", "worker died"]

PLAIN = "plain"
_CONTROL_OF = {"bridge": "bridge control", "momentum": "momentum control", "StepFlow": "StepFlow control"}
#: In place of a difference and its interval, where every question has the same score under both conditions.
Table = tuple[str, list[str], list[list[str]], list[str]]
"""Title, header, rows and notes, as `results.tables.text_table` takes them."""


def standard_conditions(flow: StepFlow | None = None) -> dict[str, StepFlow | None]:
    """The seven conditions around one StepFlow, the paper's by default.

    Args:
        flow: Strengths, bands and the rest, with both halves on.

    Returns:
        By name: None for the plain model, else what is put on it.

    Raises:
        ValueError: If a half of `flow` is off, or it is a control itself.
    """
    flow = StepFlow() if flow is None else flow
    if not flow.tau_max or not flow.alpha or flow.placebo is not None:
        raise ValueError(f"{flow!r}: expected both halves on and placebo=None; the halves are made from it")
    return {
        PLAIN: None,
        "bridge": replace(flow, alpha=0.0),
        "momentum": replace(flow, tau_max=0.0),
        "StepFlow": flow,
        "bridge control": replace(flow, alpha=0.0, placebo="bridge"),
        "momentum control": replace(flow, tau_max=0.0, placebo="momentum"),
        "StepFlow control": replace(flow, placebo="both"),
    }


def refuse_nothing(questions: Sequence[Question], conditions: Mapping[str, StepFlow | None]) -> None:
    """Refuse an evaluation without a question or a condition.

    Raises:
        ValueError: If there is none.
    """
    if not questions:
        raise ValueError("no questions: expected at least one")
    if not conditions:
        raise ValueError("no conditions: expected at least one, such as {'plain': None}")


def controls(names: Iterable[str]) -> dict[str, str]:
    """The control of each of these conditions that has one among them."""
    present = set(names)
    return {name: control for name, control in _CONTROL_OF.items() if {name, control} <= present}


@dataclass(frozen=True)
class ConditionResult:
    """How one condition did.

    Attributes:
        flow: What was on the model; None for nothing.
        answers: `answers[question][sample]`.
        verdicts: Whether each is right, and why not, `verdicts[question][sample]`.
        seconds: Time of generation.
    """

    flow: StepFlow | None
    answers: tuple[tuple[Answer, ...], ...]
    verdicts: tuple[tuple[Verdict, ...], ...]
    seconds: float

    @property
    def right(self) -> tuple[tuple[bool, ...], ...]:
        """Whether each answer is right, `right[question][sample]`."""
        return tuple(tuple(map(bool, samples)) for samples in self.verdicts)

    @property
    def scores(self) -> Float[np.ndarray, " question"]:
        """Share of right answers to each question."""
        return np.array([np.mean(samples) for samples in self.right])

    @property
    def n_tokens(self) -> int:
        """Tokens written."""
        return sum(answer.n_new for samples in self.answers for answer in samples)

    @property
    def unfinished(self) -> float:
        """Share of the answers that the token limit cut off."""
        ended = [answer.finished for samples in self.answers for answer in samples]
        return 1 - sum(ended) / len(ended) if ended else 0.0


@dataclass(frozen=True)
class Evaluation:
    """Answers to the same questions under several conditions.

    Attributes:
        questions: What was asked.
        decoding: How answers were written.
        results: By condition.
        seed: Of the resampling.
        n_missing: Questions that do not count, because not all their answers are written yet.
        stopped: Why the run that wrote them ended early; empty if it did not.
    """

    questions: tuple[Question, ...]
    decoding: Decoding
    results: Mapping[str, ConditionResult]
    seed: int = 0
    n_missing: int = 0
    stopped: Stop = ""

    def accuracy(self, condition: str, difficulty: str | None = None) -> float:
        """Share of right answers of `condition`, over all questions or those of one `difficulty`."""
        scores = self.results[condition].scores
        return float(scores[self._of(difficulty)].mean())

    def regraded(self, grader: Grader | Grade | str, *, allow_code_execution: bool = False) -> Evaluation:
        """The same answers, counted by another grader.

        Args:
            grader: As in `evaluate`.
            allow_code_execution: As in `evaluate`.

        Raises:
            StepflowError: If the grader cannot work: see `grading.prepared`.
        """
        grade = prepared(grader, self.questions, allow_code_execution=allow_code_execution)
        return replace(
            self,
            results={
                name: replace(result, verdicts=graded(self.questions, result.answers, grade))
                for name, result in self.results.items()
            },
        )

    def difference(self, condition: str, against: str, difficulty: str | None = None) -> PairedDifference:
        """`condition` minus `against` on the same questions, all or those of one `difficulty`.

        Its p-value is not corrected.
        """
        scores = [self.results[name].scores[self._of(difficulty)] for name in (condition, against)]
        return paired_difference(*scores, binary=self.decoding.n_samples == 1, seed=self.seed)

    @property
    def difficulties(self) -> tuple[str, ...]:
        """Classes of difficulty in the order in which they first occur; empty without any."""
        return tuple(dict.fromkeys(question.difficulty for question in self.questions if question.difficulty))

    def table(self) -> str:
        """Accuracy of every condition, with paired differences, as text."""
        missing = f"{self.n_missing} of {self.n_missing + len(self.questions)} questions are not answered yet"
        if not self.questions:
            return f"{missing} under every condition: there is nothing to compare"
        parts = [f"{missing} under every condition, and left out"] if self.n_missing else []
        return "\n\n".join([*parts, *(text_table(*table) for table in self.tables())])

    def tables(self) -> list[Table]:
        """The same, each table as title, header, rows and notes; at least one question must count."""
        tables: list[Table] = []
        if PLAIN in self.results and self._others():
            tables.append(self._differences(PLAIN, dict.fromkeys(self._others(), PLAIN)))
        if matched := controls(self.results):
            tables.append(self._differences("its control", matched))
        return [*tables, self._by_difficulty()]

    def to_json(self) -> str:
        """Scores, tokens and seconds by condition and question, and the differences, as JSON."""
        conditions = {
            name: {
                "flow": repr(result.flow) if result.flow is not None else None,
                "scores": result.scores.tolist(),
                "tokens": result.n_tokens,
                "unfinished": result.unfinished,
                "seconds": result.seconds,
            }
            for name, result in self.results.items()
        }
        pairs = [(name, PLAIN) for name in self._others() if PLAIN in self.results]
        pairs += list(controls(self.results).items())
        differences = [
            {"condition": name, "against": other, **asdict(self.difference(name, other))}
            for name, other in pairs
            if self.questions
        ]
        questions = [{"id": q.id, "difficulty": q.difficulty} for q in self.questions]
        found = dict(
            decoding=asdict(self.decoding),
            questions=questions,
            conditions=conditions,
            differences=differences,
            n_missing=self.n_missing,
        )
        return json.dumps(found, indent=1)

    def _of(self, difficulty: str | None) -> list[bool]:
        """Which questions are of this difficulty; None chooses all."""
        return [difficulty in (None, question.difficulty) for question in self.questions]

    def _others(self) -> list[str]:
        return [name for name in self.results if name != PLAIN]

    def _differences(self, title: str, pairs: Mapping[str, str]) -> Table:
        found = {name: self.difference(name, other) for name, other in pairs.items()}
        p_values = corrected(np.array([d.p_value for d in found.values()]), "holm")
        header = ["condition", "right", f"minus {title}", *AFTER_DIFFERENCE]
        rows = [
            [name, f"{self.accuracy(name):.4f}", *difference_cells(d, p)]
            for (name, d), p in zip(found.items(), p_values, strict=True)
        ]
        test = "McNemar's exact test" if self.decoding.n_samples == 1 else "sign flips"
        notes = [
            f"paired over {len(self.questions)} questions; BCa bootstrap, 10000 resamples; p from {test}"
        ]
        if title == PLAIN:
            notes.insert(0, f"plain: {self.accuracy(PLAIN):.4f} right")
        return f"Right answers, and the difference to {title}", header, rows, notes

    def _by_difficulty(self) -> Table:
        header = ["condition", *self.difficulties, "all", "tokens", "tokens/s", "cut off", "seconds"]
        rows = [
            [
                name,
                *(f"{self.accuracy(name, difficulty):.3f}" for difficulty in self.difficulties),
                f"{self.accuracy(name):.3f}",
                str(result.n_tokens),
                f"{result.n_tokens / result.seconds:.0f}" if result.seconds else "-",
                f"{result.unfinished:.3f}",
                f"{result.seconds:.0f}",
            ]
            for name, result in self.results.items()
        ]
        counts = [sum(q.difficulty == difficulty for q in self.questions) for difficulty in self.difficulties]
        notes = [f"questions: {', '.join(map(str, counts))}"] if counts else []
        return "Right answers by difficulty", header, rows, notes


def evaluate(
    model: Any,
    questions: Sequence[Question],
    *,
    conditions: Mapping[str, StepFlow | None] | None = None,
    decoding: Decoding | None = None,
    grader: Grader | Grade | str = exact,
    allow_code_execution: bool = False,
    prompting: Prompting | None = None,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> Evaluation:
    """Ask the same questions under every condition.

    Args:
        model: A TransformerLens model with a tokenizer.
        questions: What to ask.
        conditions: By name: None for the plain model, or the StepFlow to put on it. Default: the paper's
            StepFlow, its halves, a control of each, and the plain model.
        decoding: How to decode; greedy by default.
        grader: Says whether an answer is right: a registered grader or its name, or any function
            `(question, answer) -> bool`.
        allow_code_execution: Lets the grader "code" execute what the model writes, in a sandbox.
        prompting: How to ask: format, splitter, system prompt, words around the question.
        seed: Of the resampling; `decoding` has the seed of the sampling.
        progress: Called with one line of text when a condition is done.

    Raises:
        ValueError: If there is no question or no condition.
        ModelError: If the model cannot be asked, or a condition does not fit it.
        StepflowError: If the grader cannot work: see `grading.prepared`. Nothing is asked then.
    """
    conditions = standard_conditions() if conditions is None else conditions
    refuse_nothing(questions, conditions)
    grade = prepared(grader, questions, allow_code_execution=allow_code_execution)
    decoding = Decoding() if decoding is None else decoding
    results: dict[str, ConditionResult] = {}
    for name, flow in conditions.items():
        texts = [question.text for question in questions]
        answers, seconds = write_answers(model, texts, flow, decoding, prompting=prompting)
        verdicts = graded(questions, answers, grade)
        results[name] = ConditionResult(flow, tuple(map(tuple, answers)), verdicts, seconds)
        if progress is not None:
            progress(f"{name}: {results[name].scores.mean():.4f} right, {seconds:.0f} s")
    return Evaluation(tuple(questions), decoding, results, seed)
