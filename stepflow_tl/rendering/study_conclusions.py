"""What a study found, and what that says: every sentence of the report's summary follows from its numbers.

1. Does the repair help, against nothing and against its control of equal size? One that does not is said not
   to, with what the interval still leaves possible.
2. Do right and wrong answers differ where the paper says that they do, in all traces, in traces of equal
   length and within questions? Each comparison is held against the paper's prediction.
3. What does the repair change in the same traces?

A difference is called one where its p-value, corrected over the headline numbers, is at most `LEVEL`. The
repair's own p-value needs no correction: it is one comparison, named before.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from stepflow_tl.diagnosis import Comparison
from stepflow_tl.diagnosis.layer_metrics import Band, headline_name
from stepflow_tl.evaluation import Answer, Evaluation, Question, Verdict
from stepflow_tl.evaluation.evaluation import PLAIN, controls
from stepflow_tl.results.tables import number, probability
from stepflow_tl.statistics.effects import Effect
from stepflow_tl.stepflow.report import FlowReport

LEVEL = 0.05
"""Corrected p-value up to which a difference is said to be one."""

# Metric, band, failure, and the sign that the paper predicts for right minus wrong.
_HEADLINE: tuple[tuple[str, Band | None, str, int], ...] = (
    ("lock_in", "shallow", "Shallow Lock-in", -1),
    ("thinking_share", "deep", "Deep Decay", 1),
    ("decay_slope", None, "Deep Decay", 1),
)


@dataclass(frozen=True)
class Contrast:
    """Two groups of traces compared in one way, or why they cannot be.

    Attributes:
        name: In which way: "all traces", "matched on length".
        comparison: The comparison, or None.
        notes: What was left out, or why there is none.
    """

    name: str
    comparison: Comparison | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ShownAnswer:
    """One answer to a question that was gained or lost.

    Attributes:
        condition: Under which it was written.
        answer: What was written.
        verdict: Whether it is right, and why not.
        page: Address of its map's page, relative to the report; empty where there is none.
    """

    condition: str
    answer: Answer
    verdict: Verdict
    page: str = ""


@dataclass(frozen=True)
class ChangedQuestion:
    """A question on which the repair scores higher or lower than the plain model.

    Attributes:
        question: What was asked.
        gained: Whether it scores higher.
        answers: The plain model's answer, and the repaired one's.
    """

    question: Question
    gained: bool
    answers: tuple[ShownAnswer, ShownAnswer]


@dataclass(frozen=True)
class StudyFindings:
    """Everything that the report of a study states.

    Attributes:
        title: What was studied.
        evaluation: The answers under every condition.
        repair: The condition that is compared with the plain model.
        contrasts: Right against wrong plain answers: all traces first, then matched, then within questions.
        repaired: The same traces under the repair against without it.
        flow: What the repair did on these traces, counted over all of them.
        n_flow_traces: How many traces that are.
        n_layers: Layers of the model.
        changed: Questions gained and lost that are shown.
        n_changed: How many there are.
        run: What was run: names and values.
        exclusions: What was left out, and why.
    """

    title: str
    evaluation: Evaluation
    repair: str
    contrasts: tuple[Contrast, ...]
    repaired: Contrast
    flow: FlowReport
    n_flow_traces: int
    n_layers: int
    changed: tuple[ChangedQuestion, ...]
    n_changed: int
    run: tuple[tuple[str, str], ...]
    exclusions: tuple[str, ...]


def in_short(findings: StudyFindings) -> Iterator[str]:
    """The conclusions, one sentence or two each, all of them computed."""
    yield from repair_in_words(findings.evaluation, findings.repair)
    for metric, band, failure, expected in _HEADLINE:
        parts = [contrast_in_words(contrast, metric, band, expected) for contrast in findings.contrasts]
        name = headline_name(metric, band)
        yield f"{failure} ({name}), right answers minus wrong ones. {' '.join(parts)}"
    if findings.repaired.comparison is None:
        yield f"The maps under {findings.repair} cannot be compared: {'; '.join(findings.repaired.notes)}."
        return
    for metric, band, failure, _ in _HEADLINE:
        effect = _headline(findings.repaired.comparison, metric, band)
        moved = "moves it" if effect.p_corrected <= LEVEL else "does not move it beyond chance"
        yield (
            f"{failure} ({headline_name(metric, band)}) on the same {effect.n} traces: {findings.repair} "
            f"{moved}, {_difference(effect)}, corrected {_p(effect.p_corrected)}."
        )


def repair_in_words(evaluation: Evaluation, repair: str) -> Iterator[str]:
    """Whether a condition helps, against the plain model and against its control.

    Args:
        evaluation: Of both, and of the control if there is one.
        repair: The condition.
    """
    found = evaluation.difference(repair, PLAIN)
    right = (
        f"{100 * evaluation.accuracy(PLAIN):.1f} % right without, {100 * evaluation.accuracy(repair):.1f} %"
    )
    counts = f"gained {found.gained}, lost {found.lost} of {found.n} questions, {_p(found.p_value)}"
    points = _points(found.difference, found.low, found.high)
    if not found.differs:
        yield (
            f"{repair} does not help here: it changes the score of none of {found.n} questions ({right} with "
            "it)."
        )
    elif found.p_value <= LEVEL and found.difference > 0:
        yield f"{repair} helps: {points} ({right} with it; {counts})."
    elif found.p_value <= LEVEL:
        yield f"{repair} does not help here, it does harm: {points} ({right} with it; {counts})."
    else:
        limit = f" A gain of more than {100 * found.high:.1f} points is unlikely." if found.high > 0 else ""
        yield (
            f"That {repair} helps is not shown by these {found.n} questions: {points} ({right} with it; "
            f"{counts}).{limit}"
        )
    control = controls(evaluation.results).get(repair)
    if control is None:
        return
    other = evaluation.difference(repair, control)
    if not other.differs:
        yield f"Its control of equal size, in a random place, has the same score on all {other.n} questions."
        return
    points = _points(other.difference, other.low, other.high)
    p = _p(other.p_value)
    if other.p_value > LEVEL:
        yield (
            f"Against its control of equal size, in a random place: {points}, {p}. That is not beyond "
            "chance, so nothing here says that the place of the intervention matters."
        )
    else:
        better = "more" if other.difference > 0 else "fewer"
        yield f"It gets {better} right than its control of equal size, in a random place: {points}, {p}."


def contrast_in_words(contrast: Contrast, metric: str, band: Band | None, expected: int) -> str:
    """What one comparison of right against wrong says of one headline number.

    Args:
        contrast: The comparison.
        metric: The metric.
        band: The band of its headline number.
        expected: Sign of the difference that the paper predicts.
    """
    name = contrast.name[0].upper() + contrast.name[1:]
    if contrast.comparison is None:
        return f"{name}: {'; '.join(contrast.notes) or 'not compared'}."
    effect = _headline(contrast.comparison, metric, band)
    counts = f"n {effect_count(effect)}"
    if math.isnan(effect.p_corrected):
        return f"{name}: too few traces with a value ({counts})."
    size = f"{size_name(contrast.comparison)} {number(effect.effect_size)}"
    numbers = f"{_difference(effect)}, {size}, corrected {_p(effect.p_corrected)}, {counts}"
    if effect.p_corrected > LEVEL:
        return f"{name}: no difference beyond chance ({numbers})."
    where = "lower" if effect.difference < 0 else "higher"
    fits = "as the paper predicts" if expected * effect.difference > 0 else "against what the paper predicts"
    return f"{name}: {where} in right answers, {fits} ({numbers})."


def _headline(comparison: Comparison, metric: str, band: Band | None) -> Effect:
    return next(each for each in comparison.headline if (each.metric, each.band) == (metric, band))


def size_name(comparison: Comparison) -> str:
    """What a comparison measures the size of an effect by."""
    return "d_z" if comparison.is_paired else "g"


def effect_count(effect: Effect) -> str:
    """Traces or pairs behind an effect."""
    return str(effect.n) if effect.n == effect.other_n else f"{effect.n}, {effect.other_n}"


def _difference(effect: Effect) -> str:
    return f"{effect.difference:+.4f} [{effect.low:+.4f}, {effect.high:+.4f}]"


def _points(difference: float, low: float, high: float) -> str:
    return f"{100 * difference:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]"


def _p(value: float) -> str:
    return "p below 0.0001" if value < 0.0001 else f"p {probability(value)}"
