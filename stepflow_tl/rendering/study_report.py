"""The report of a study: what its numbers say, in words that follow from them, then the numbers themselves.

1. In short: does the repair help, against nothing and against its control of equal size; do right and wrong
   answers differ where the paper says they do, in all traces, in traces of equal length and within questions;
   what the repair changes in the same traces. Every sentence is computed: a repair that does not help is said
   not to help.
2. Answers: every condition, paired by question.
3. Right against wrong: the headline numbers, and lock-in and decay at every layer.
4. What the repair did: rows raised, mass moved, injections, and the maps with and without it.
5. Questions gained and lost: both answers, word for word, each with a link to its map.
6. What was run, and what was left out.

`study_blocks` makes the report, `write_study_report` writes it as `report.md`, with `figures/*.svg` beside it,
and as `report.html`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from stepflow_tl.diagnosis import LAYER_METRICS, Comparison
from stepflow_tl.evaluation import Answer, Evaluation, Question, Verdict
from stepflow_tl.evaluation.evaluation import PLAIN, controls
from stepflow_tl.rendering.depth_chart import Curve, DepthChart
from stepflow_tl.rendering.document import (
    Block,
    Bullets,
    Charts,
    Heading,
    Paragraph,
    Passage,
    SideBySide,
    Table,
    html_page,
    markdown,
)
from stepflow_tl.results.files import write_atomically
from stepflow_tl.results.tables import number, probability
from stepflow_tl.statistics.effects import Effect
from stepflow_tl.stepflow.report import FlowReport

LEVEL = 0.05
"""Corrected p-value up to which a difference is said to be one."""

_SHOWN = (("lock_in", "Shallow Lock-in"), ("thinking_share", "Deep Decay"))
_HEADLINE = (("lock_in", "shallow", "Shallow Lock-in"), ("thinking_share", "deep", "Deep Decay"))


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


def write_study_report(findings: StudyFindings, folder: Path) -> tuple[Path, Path]:
    """Write `report.md` with its figures, and `report.html`; both paths.

    Args:
        findings: What to state.
        folder: Where; its pages are linked from there.

    Raises:
        ResultFileError: If a file cannot be written; those that were there are then as they were.
    """
    blocks = study_blocks(findings)
    (folder / "figures").mkdir(exist_ok=True)
    for block in blocks:
        if isinstance(block, Charts):
            for name, chart in block.charts:
                write_atomically(folder / name, chart.svg(alone=True).encode())
    written = folder / "report.md", folder / "report.html"
    for path, text in zip(written, (markdown(blocks), html_page(blocks, findings.title)), strict=True):
        write_atomically(path, text.encode("utf-8", "backslashreplace"))
    return written


def study_blocks(findings: StudyFindings) -> list[Block]:
    """The report, block by block."""
    return [
        Heading(1, findings.title),
        Heading(2, "In short"),
        Bullets(tuple(in_short(findings))),
        *_answers(findings.evaluation),
        *_right_against_wrong(findings),
        *_what_the_repair_did(findings),
        *_changed(findings),
        *_what_was_run(findings),
    ]


def in_short(findings: StudyFindings) -> Iterator[str]:
    """The conclusions, one sentence or two each, all of them computed."""
    yield from repair_in_words(findings.evaluation, findings.repair)
    for metric, band, failure in _HEADLINE:
        parts = [contrast_in_words(contrast, metric, band) for contrast in findings.contrasts]
        yield f"{failure} ({metric}, {band} layers), right answers minus wrong ones. {' '.join(parts)}"
    if findings.repaired.comparison is None:
        yield f"The maps under {findings.repair} cannot be compared: {'; '.join(findings.repaired.notes)}."
        return
    for metric, band, failure in _HEADLINE:
        effect = _headline(findings.repaired.comparison, metric, band)
        moved = "moves it" if effect.p_corrected <= LEVEL else "does not move it beyond chance"
        yield (
            f"{failure} on the same {effect.n} traces: {findings.repair} {moved}, {_difference(effect)}, "
            f"corrected p {probability(effect.p_corrected)}."
        )


def repair_in_words(evaluation: Evaluation, repair: str) -> Iterator[str]:
    """Whether a condition helps, against the plain model and against its control.

    Args:
        evaluation: Of both, and of the control if there is one.
        repair: The condition.
    """
    found = evaluation.difference(repair, PLAIN)
    right = f"{100 * evaluation.accuracy(PLAIN):.1f} % right without, {100 * evaluation.accuracy(repair):.1f} %"
    counts = f"gained {found.gained}, lost {found.lost} of {found.n} questions, p {probability(found.p_value)}"
    points = _points(found.difference, found.low, found.high)
    if not found.differs:
        yield f"{repair} does not help here: it changes the score of none of {found.n} questions ({right} with)."
    elif found.p_value <= LEVEL and found.difference > 0:
        yield f"{repair} helps: {points} ({right} with it; {counts})."
    elif found.p_value <= LEVEL:
        yield f"{repair} does not help here, it does harm: {points} ({right} with it; {counts})."
    else:
        limit = f" A gain of more than {100 * found.high:.1f} points is unlikely." if found.high > 0 else ""
        yield (
            f"{repair} does not help here, as far as {found.n} questions can tell: {points} ({right} with it; "
            f"{counts}).{limit}"
        )
    control = controls(evaluation.results).get(repair)
    if control is None:
        return
    other = evaluation.difference(repair, control)
    if not other.differs:
        yield f"Nor does it differ from its control of equal size in a random place, on any of {other.n} questions."
        return
    points = _points(other.difference, other.low, other.high)
    p = f"p {probability(other.p_value)}"
    if other.p_value > LEVEL:
        yield (
            f"Against its control of equal size in a random place: {points}, {p}. That is not beyond chance, so "
            f"nothing here says that the place of the intervention matters."
        )
    else:
        better = "more" if other.difference > 0 else "fewer"
        yield f"It gets {better} questions right than its control of equal size in a random place: {points}, {p}."


def contrast_in_words(contrast: Contrast, metric: str, band: str) -> str:
    """What one comparison of right against wrong says of one headline number.

    Args:
        contrast: The comparison.
        metric: The metric.
        band: The band of its headline number.
    """
    name = contrast.name[0].upper() + contrast.name[1:]
    if contrast.comparison is None:
        return f"{name}: {'; '.join(contrast.notes) or 'not compared'}."
    effect = _headline(contrast.comparison, metric, band)
    counts = f"n {_count(effect)}"
    if math.isnan(effect.p_corrected):
        return f"{name}: too few traces with a value ({counts})."
    numbers = f"{_difference(effect)}, {_size(contrast.comparison)} {number(effect.effect_size)}, corrected p "
    numbers += f"{probability(effect.p_corrected)}, {counts}"
    if effect.p_corrected > LEVEL:
        return f"{name}: no difference beyond chance ({numbers})."
    expected = -LAYER_METRICS[metric].direction * effect.difference > 0
    where = "lower" if effect.difference < 0 else "higher"
    fits = "as the paper predicts" if expected else "against what the paper predicts"
    return f"{name}: {where} in right answers, {fits} ({numbers})."


def _answers(evaluation: Evaluation) -> Iterator[Block]:
    yield Heading(2, "Answers")
    for title, header, rows, notes in evaluation.tables():
        yield Heading(3, title)
        yield Table(tuple(header), tuple(map(tuple, rows)), tuple(notes))


def _right_against_wrong(findings: StudyFindings) -> Iterator[Block]:
    yield Heading(2, "Right against wrong")
    yield Paragraph(
        "Step-Saliency of the plain model's own answers. Shares depend on how many steps and tokens there are, "
        "and right answers tend to be shorter, so traces of equal length are compared beside all traces. "
        "Right and wrong answers to the same question rule difficulty out."
    )
    compared = [each for each in findings.contrasts if each.comparison is not None]
    if compared:
        yield _headline_table(compared)
    yield Bullets(
        tuple(
            f"{contrast.name}: {'; '.join(contrast.notes) or 'nothing was left out'}"
            for contrast in findings.contrasts
        )
    )
    if not compared:
        return
    for metric, failure in _SHOWN:
        yield Heading(3, f"{failure}: {metric} at every layer")
        yield _depth_charts(compared, metric, findings.n_layers)
        yield _layer_table(compared, metric)


def _headline_table(contrasts: Sequence[Contrast]) -> Table:
    first = _comparison(contrasts[0])
    name, other_name = first.names
    percent = f"{100 * first.resampling.confidence:g} %"
    header = ("number", "compared", "n", name, other_name, "difference", percent, "size", "p", "corrected p")
    rows = []
    for place, effect in enumerate(first.headline):
        for contrast in contrasts:
            comparison = _comparison(contrast)
            effect = comparison.headline[place]
            rows.append(
                (
                    f"{effect.metric} {effect.band}" if effect.band else effect.metric,
                    contrast.name,
                    _count(effect),
                    number(effect.mean),
                    number(effect.other_mean),
                    number(effect.difference),
                    f"[{number(effect.low)}, {number(effect.high)}]",
                    f"{_size(comparison)} {number(effect.effect_size)}",
                    probability(effect.p_value),
                    probability(effect.p_corrected),
                )
            )
    notes = (
        f"{name} minus {other_name}; means over the band's layers. BCa bootstrap, p from permutations, "
        f"corrected over these numbers: {first.correction}. Size: Hedges' g, or d_z for pairs.",
    )
    return Table(header, tuple(rows), notes)


def _depth_charts(contrasts: Sequence[Contrast], metric: str, n_layers: int) -> Charts:
    first = _comparison(contrasts[0])
    effects = _by_layer(first, metric)
    layers = tuple(effect.layer or 0 for effect in effects)
    means = DepthChart(
        f"{metric}: means, {contrasts[0].name}",
        (
            Curve(first.names[0], layers, tuple(effect.mean for effect in effects)),
            Curve(first.names[1], layers, tuple(effect.other_mean for effect in effects)),
        ),
        n_layers,
    )
    shown = contrasts[:2]
    difference = DepthChart(
        f"{metric}: {first.names[0]} minus {first.names[1]}",
        tuple(_difference_curve(contrast, metric) for contrast in shown),
        n_layers,
    )
    caption = (
        f"Left or above, the mean of each group; beside or below it, their difference with its "
        f"{100 * first.resampling.confidence:g} % interval ({' and '.join(each.name for each in shown)}). A "
        f"filled marker is a layer whose corrected p-value is at most {LEVEL:g}."
    )
    stem = "-".join([*first.names, metric]).replace(" ", "_")
    charts = ((f"figures/{stem}-means.svg", means), (f"figures/{stem}-difference.svg", difference))
    return Charts(charts, caption)


def _difference_curve(contrast: Contrast, metric: str) -> Curve:
    effects = _by_layer(_comparison(contrast), metric)
    return Curve(
        contrast.name,
        tuple(effect.layer or 0 for effect in effects),
        tuple(effect.difference for effect in effects),
        tuple(effect.low for effect in effects),
        tuple(effect.high for effect in effects),
        tuple(effect.p_corrected <= LEVEL for effect in effects),
    )


def _layer_table(contrasts: Sequence[Contrast], metric: str) -> Table:
    header = ["layer", *_comparison(contrasts[0]).names]
    families = [_by_layer(_comparison(contrast), metric) for contrast in contrasts]
    for contrast in contrasts:
        header += [f"difference, {contrast.name}", "interval", "corrected p"]
    rows = []
    for effects in zip(*families, strict=True):
        row = [str(effects[0].layer), number(effects[0].mean), number(effects[0].other_mean)]
        for effect in effects:
            row += [number(effect.difference), f"[{number(effect.low)}, {number(effect.high)}]"]
            row += [probability(effect.p_corrected)]
        rows.append(tuple(row))
    return Table(tuple(header), tuple(rows), ("p corrected over the layers of this metric.",))


def _what_the_repair_did(findings: StudyFindings) -> Iterator[Block]:
    repair, flow = findings.repair, findings.flow
    yield Heading(2, f"What {repair} did")
    yield Paragraph(
        f"Counted over {findings.n_flow_traces} plain answers, each read once under {repair}: the tokens are "
        "the same, only the flow between them is not. A row is one query in one head."
    )
    header = ("layer", "rows", "raised", "of rows", "capped", "mean mass moved", "injections", "mean norm")
    rows = tuple(
        (
            str(layer["layer"]),
            str(layer["rows"]),
            str(layer["adjusted"]),
            f"{100 * layer['adjusted'] / layer['rows']:.1f} %" if layer["rows"] else "-",
            str(layer["capped"]),
            number(layer["mean_shift"]),
            str(layer["injections"]),
            number(layer["mean_norm"]),
        )
        for layer in flow.to_json()
    )
    if rows:
        yield Table(header, rows, ("Mass moved: tau minus the bridge's own mass, mean over raised rows.",))
    else:
        yield Paragraph("No trace was read under it.")
    yield Heading(3, f"The same traces with {repair} and without")
    if findings.repaired.comparison is None:
        yield Paragraph(f"Not compared: {'; '.join(findings.repaired.notes)}")
        return
    yield _headline_table([findings.repaired])
    if findings.repaired.notes:
        yield Bullets(findings.repaired.notes)
    for metric, _ in _SHOWN:
        yield _depth_charts([findings.repaired], metric, findings.n_layers)


def _changed(findings: StudyFindings) -> Iterator[Block]:
    yield Heading(2, "Questions gained and lost")
    gained = sum(each.gained for each in findings.changed)
    shown = len(findings.changed)
    if not shown:
        yield Paragraph(f"No question has another score under {findings.repair}.")
        return
    yield Paragraph(
        f"{findings.n_changed} questions have another score under {findings.repair}; shown here: {gained} gained, "
        f"{shown - gained} lost."
    )
    for each in sorted(findings.changed, key=lambda each: not each.gained):
        level = f" ({each.question.difficulty})" if each.question.difficulty else ""
        yield Heading(3, f"{'Gained' if each.gained else 'Lost'}: {each.question.id}{level}")
        yield SideBySide((Passage("Question", each.question.text),))
        if each.question.answer:
            yield Paragraph(f"Right answer: {each.question.answer}")
        yield SideBySide(tuple(map(_passage, each.answers)))


def _passage(shown: ShownAnswer) -> Passage:
    verdict = "right" if shown.verdict else "wrong"
    reason = f": {shown.verdict.reason}" if shown.verdict.reason else ""
    cut = "" if shown.answer.finished else ", cut off"
    title = f"{shown.condition}, {verdict}{reason} ({shown.answer.n_new} tokens{cut})"
    text = f"{shown.answer.thinking}{shown.answer.summary}"
    return Passage(title, text, shown.page, f"Map of this answer ({shown.condition})")


def _what_was_run(findings: StudyFindings) -> Iterator[Block]:
    yield Heading(2, "What was run")
    yield Table(("what", "value"), findings.run)
    yield Heading(3, "What was left out")
    yield Bullets(findings.exclusions or ("Nothing.",))


def _by_layer(comparison: Comparison, metric: str) -> list[Effect]:
    return sorted(comparison.of(metric), key=lambda effect: effect.layer or 0)


def _headline(comparison: Comparison, metric: str, band: str) -> Effect:
    return next(each for each in comparison.headline if (each.metric, each.band) == (metric, band))


def _comparison(contrast: Contrast) -> Comparison:
    assert contrast.comparison is not None  # whoever asks has looked
    return contrast.comparison


def _size(comparison: Comparison) -> str:
    return "d_z" if comparison.pairing else "g"


def _count(effect: Effect) -> str:
    return str(effect.n) if effect.n == effect.other_n else f"{effect.n}, {effect.other_n}"


def _difference(effect: Effect) -> str:
    return f"{effect.difference:+.4f} [{effect.low:+.4f}, {effect.high:+.4f}]"


def _points(difference: float, low: float, high: float) -> str:
    return f"{100 * difference:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]"
