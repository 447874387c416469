"""The report of a study, block by block: the conclusions first, then the numbers behind them.

1. In short (`study_conclusions`).
2. Answers: every condition, paired by question.
3. Right against wrong: the headline numbers, and lock-in and decay at every layer.
4. What the repair did: rows raised, mass moved, injections, and the maps with and without it.
5. Questions gained and lost: both answers, word for word, each with a link to its map.
6. What was run, and what was left out.

`write_study_report` writes it as `report.md`, with `figures/*.svg` beside it, and as `report.html`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from stepflow_tl.diagnosis import Comparison
from stepflow_tl.diagnosis.layer_metrics import HEADLINE, headline_name
from stepflow_tl.evaluation import Evaluation
from stepflow_tl.rendering.depth_chart import Curve, DepthChart
from stepflow_tl.rendering.document import (
    Block,
    Bullets,
    Charts,
    Facts,
    Heading,
    Paragraph,
    Passage,
    SideBySide,
    Table,
    html_page,
    markdown,
)
from stepflow_tl.rendering.study_conclusions import (
    LEVEL,
    Contrast,
    ShownAnswer,
    StudyFindings,
    effect_count,
    in_short,
    size_name,
)
from stepflow_tl.results.files import write_atomically
from stepflow_tl.results.tables import number, probability
from stepflow_tl.statistics.effects import Effect

_SHOWN = (("lock_in", "Shallow Lock-in"), ("thinking_share", "Deep Decay"))


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


def _answers(evaluation: Evaluation) -> Iterator[Block]:
    yield Heading(2, "Answers")
    for title, header, rows, notes in evaluation.tables():
        yield Heading(3, title)
        yield Table(tuple(header), tuple(map(tuple, rows)), tuple(notes))


def _right_against_wrong(findings: StudyFindings) -> Iterator[Block]:
    yield Heading(2, "Right against wrong")
    yield Paragraph(
        "Step-Saliency of the plain model's own answers. Shares depend on how many steps and tokens there "
        "are, and right answers tend to be shorter, so traces of equal length are compared beside all "
        "traces. Right and wrong answers to the same question rule difficulty out."
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
    for place, (metric, band) in enumerate(HEADLINE):
        for contrast in contrasts:
            comparison = _comparison(contrast)
            effect = comparison.headline[place]
            rows.append(
                (
                    headline_name(metric, band),
                    contrast.name,
                    effect_count(effect),
                    number(effect.mean),
                    number(effect.other_mean),
                    number(effect.difference),
                    f"[{number(effect.low)}, {number(effect.high)}]",
                    f"{size_name(comparison)} {number(effect.effect_size)}",
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
        f"{findings.n_changed} questions have another score under {findings.repair}; shown here: {gained} "
        f"gained, {shown - gained} lost."
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
    yield Facts(findings.run)
    yield Heading(3, "What was left out")
    yield Bullets(findings.exclusions or ("Nothing.",))


def _by_layer(comparison: Comparison, metric: str) -> list[Effect]:
    return sorted(comparison.of(metric), key=lambda effect: effect.layer or 0)


def _comparison(contrast: Contrast) -> Comparison:
    assert contrast.comparison is not None  # whoever asks has looked
    return contrast.comparison
