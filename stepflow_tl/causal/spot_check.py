"""`spot_check`: is this one map to be believed? A dozen cuts of its own strongest pairs and of controls.

A map says which earlier step a step draws on most. How far that is what the model uses differs from trace to
trace, and no figure over other traces says it of this one. So:

1. Shares: each layer's head mean, rows divided by their sum over earlier steps, averaged over layers (by
   size, where the score has signs; a cut score is in nats and is summed over heads and layers first).
2. Of every thinking and summary step with two earlier steps or more, its strongest source. The `n_pairs`
   steps whose strongest source has the largest share are checked: the cells that a reader looks at first.
3. Each has a control: of the same step's sources with at most half of that share, the one nearest to the
   strongest (where there is none, the weakest). Same reader, much the same distance, another share.
4. Both are cut, alone. By the size of the effects, the map is right where the strongest source costs
   `threshold` or more, and more than its control.

A map that knew nothing would be ahead in half of the steps, and 6 of 6 happens by chance once in 64: one
trace gives numbers, not a verdict. A map that knows only the order of steps gains as far as the model reads
what is near. Effects are of single cuts, so a source that another one stands in for looks idle.

Cost: 2 `n_pairs` cuts (`step_knockout`), or none where a knockout holds them.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Any

from jaxtyping import Float
from torch import Tensor

from stepflow_tl.causal.knockout import step_knockout
from stepflow_tl.causal.knockout_result import StepKnockout
from stepflow_tl.errors import ComparisonError
from stepflow_tl.results.tables import html_table, number, text_table
from stepflow_tl.saliency.result import StepSaliency
from stepflow_tl.trace import ReasoningTrace, Segment


@dataclass(frozen=True)
class Cut:
    """A source of a step: its label, its share of the step's row, and the effect of cutting it, alone."""

    source: str
    share: float
    effect: float


@dataclass(frozen=True)
class CheckedStep:
    """A step that reads, its strongest source by the map, and the control: a weak one near that."""

    query: str
    strongest: Cut
    control: Cut


@dataclass(frozen=True)
class SpotCheck:
    """How far a map agrees with the cuts of its own strongest pairs.

    Attributes:
        steps: Those checked, by the share of their strongest source.
        n_readers: Thinking and summary steps that could have been checked.
        threshold: Size of an effect from which a source counts as used, in the unit of `measure`.
        measure: What was measured: "nll", in nats; "nll onto summary".
        score: What the map is: score, objective, model.
        trace: The trace.
    """

    steps: tuple[CheckedStep, ...]
    n_readers: int
    threshold: float
    measure: str
    score: str
    trace: ReasoningTrace

    @property
    def n_used(self) -> int:
        """Strongest sources whose cut has an effect of `threshold` or more."""
        return sum(abs(step.strongest.effect) >= self.threshold for step in self.steps)

    @property
    def n_controls_used(self) -> int:
        """Controls whose cut has."""
        return sum(abs(step.control.effect) >= self.threshold for step in self.steps)

    @property
    def n_ahead(self) -> int:
        """Steps whose strongest source has a larger effect than the control."""
        return sum(abs(step.strongest.effect) > abs(step.control.effect) for step in self.steps)

    @property
    def line(self) -> str:
        """The check in one sentence, for a caption or a page."""
        n, unit = len(self.steps), "nats" if self.measure.split()[0] in ("nll", "kl") else self.measure
        sizes = [
            number(median(abs(cut.effect) for cut in cuts))
            for cuts in ([step.strongest for step in self.steps], [step.control for step in self.steps])
        ]
        return (
            f"Spot check by {2 * n} cuts: {self.n_used} of the map's {n} strongest sources have an effect of "
            f"{self.threshold:g} {unit} or more (median {sizes[0]}), {self.n_controls_used} of {n} weak ones "
            f"near them (median {sizes[1]}); the strongest has the larger effect in {self.n_ahead} of {n} "
            "steps, where a map that knows nothing has half."
        )

    def line_for(self, saliency: StepSaliency) -> str:
        """The sentence, to stand beside the map `saliency`; a ComparisonError if another map was checked."""
        if saliency.trace != self.trace or _name(saliency) != self.score:
            raise ComparisonError(
                f"the spot check is of another map ({self.score}) than this one ({_name(saliency)}), or of "
                "another trace: run spot_check on the map that is shown"
            )
        return self.line

    def __str__(self) -> str:
        """The table."""
        return text_table(*self._table())

    def _repr_html_(self) -> str:
        return html_table(*self._table())

    def _table(self) -> tuple[str, list[str], list[list[str]], list[str]]:
        rows = [[step.query, *_cells(step.strongest), *_cells(step.control)] for step in self.steps]
        header = ["step", "strongest source", "its share", f"effect ({self.measure})"]
        header += ["weak source", "its share", f"effect ({self.measure})"]
        return f"Spot check: {self.score}", header, rows, [self.line]


def spot_pairs(saliency: StepSaliency, *, n_pairs: int = 6) -> list[tuple[int, int, int]]:
    """What `spot_check` cuts: (query step, strongest source, control) as indices of the trace's steps.

    Args:
        saliency: The step map of one trace.
        n_pairs: Steps to check, at least 1; fewer where fewer have two earlier steps.

    Raises:
        ComparisonError: If `n_pairs` is below 1, or no thinking or summary step has two earlier steps, a row
            with mass and a prediction.
    """
    return [found[1:] for found in _readers(saliency, _shares(saliency), n_pairs)[0]]


def spot_check(saliency: StepSaliency, by: Any, *, n_pairs: int = 6, threshold: float = 0.5) -> SpotCheck:
    """Cut the strongest pairs of a map and their controls, and count how often it is right.

    Args:
        saliency: The step map of one trace.
        by: The model of the map, which then makes 2 `n_pairs` cuts in all layers; or a `StepKnockout` of the
            same trace that holds them (`spot_pairs` says which), for other layers, measures, or under
            StepFlow.
        n_pairs: Steps to check, each with one strongest source and one control.
        threshold: Size of an effect from which a source counts as used.

    Raises:
        ComparisonError: As `spot_pairs`; or if the knockout is of another trace, or has not measured a pair.
        ModelError: As `step_knockout`.
    """
    shares = _shares(saliency)
    chosen, n_readers = _readers(saliency, shares, n_pairs)
    pairs = [(query, key) for _, query, *keys in chosen for key in keys]
    knockout = by if isinstance(by, StepKnockout) else step_knockout(by, saliency.trace, pairs=pairs)
    labels = saliency.labels
    if knockout.trace != saliency.trace:
        raise ComparisonError(
            "saliency and knockout are of different traces: check a map by cuts of its own trace"
        )
    missing = [(labels[query], labels[key]) for query, key in pairs if not knockout.measured[query, key]]
    if missing:
        raise ComparisonError(
            f"the knockout has not measured {len(missing)} of the {len(pairs)} pairs to check, such as "
            f"{missing[0]}: pass the model, or run step_knockout with the pairs of spot_pairs(saliency)"
        )

    def cut(query: int, key: int) -> Cut:
        return Cut(labels[key], float(shares[query, key]), float(knockout.effects[query, key]))

    steps = tuple(CheckedStep(labels[q], cut(q, strongest), cut(q, weak)) for _, q, strongest, weak in chosen)
    measure = knockout.measure if knockout.onto is None else f"{knockout.measure} onto {knockout.onto}"
    return SpotCheck(steps, n_readers, threshold, measure, _name(saliency), saliency.trace)


def _readers(
    saliency: StepSaliency, shares: Float[Tensor, "query_step key_step"], n_pairs: int
) -> tuple[list[tuple[float, int, int, int]], int]:
    """Share, query, strongest source and control of the steps to check; and how many there were to choose."""
    trace = saliency.trace
    found: list[tuple[float, int, int, int]] = []
    for step in trace.steps:
        row = shares[step.index, : step.index].tolist()
        if (
            step.segment == Segment.QUESTION
            or len(row) < 2
            or step.token_start >= len(trace) - 1
            or not any(row)
        ):
            continue
        strongest = max(range(len(row)), key=row.__getitem__)
        others = [key for key in range(len(row)) if key != strongest]
        weak = [key for key in others if row[key] <= row[strongest] / 2] or [min(others, key=row.__getitem__)]
        control = min(weak, key=lambda key: (abs(key - strongest), row[key]))
        found.append((row[strongest], step.index, strongest, control))
    if n_pairs < 1 or not found:
        raise ComparisonError(
            f"{len(found)} thinking or summary steps have two earlier steps and a row with mass, and "
            f"n_pairs is {n_pairs}: a spot check needs at least one of either"
        )
    return sorted(found, key=lambda reader: -reader[0])[:n_pairs], len(found)


def _shares(saliency: StepSaliency) -> Float[Tensor, "query_step key_step"]:
    """Rows as shares of earlier steps, float64; a row without mass is 0."""
    maps = saliency.head_mean().double()
    if saliency.score == "cut":
        maps = saliency.sums.double().sum((0, 1))[None]
    sizes = maps.abs().tril(-1)
    totals = sizes.sum(-1, keepdim=True)
    return (sizes / totals.where(totals > 0, totals.new_ones(()))).mean(0)


def _name(saliency: StepSaliency) -> str:
    p = saliency.provenance
    return f"{saliency.title}, {p.objective}: {p.model_name}"


def _cells(cut: Cut) -> list[str]:
    return [cut.source, number(cut.share), number(cut.effect)]
