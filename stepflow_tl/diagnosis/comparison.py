"""`compare`: do two groups of traces differ in where they look?

1. Every trace gets its `Diagnosis`; the traces are the unit of resampling.
2. Per metric and layer: means, difference, effect size, BCa bootstrap interval, permutation p
   (`statistics.effects`).
3. p-values are corrected over the layers, within each metric.
4. The headline says it in six numbers: band means where the paper predicts a difference, and the decay slope.
   Its p-values are corrected over the six. context_reach is 1 - lock_in, so for Holm the family is one test
   larger than it need be: the correction errs on the safe side.

The difference is first group minus other group. Without `pair_by`, traces count as independent: if several
traces answer the same problem, pair by problem, or the intervals are too narrow. A share on one step falls as
a trace gets more steps, whatever the model does, so the table states both groups' mean number of thinking
steps.

`compare_groups` does the same for traces of a data set, which a field of theirs tells apart.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

import numpy as np

from stepflow_tl.diagnosis.diagnosis import Diagnosis
from stepflow_tl.diagnosis.groups import (
    LabelledTrace,
    Pairing,
    check_comparable,
    column_names,
    diagnoses,
    left_out,
    matrix,
    pair,
)
from stepflow_tl.diagnosis.layer_metrics import HEADLINE, LAYER_METRICS
from stepflow_tl.errors import ComparisonError
from stepflow_tl.results.tables import dataframe, html_table, nan_to_none, number, probability, text_table
from stepflow_tl.saliency.pooling import Pooling
from stepflow_tl.saliency.result import StepSaliency
from stepflow_tl.statistics.effects import Correction, Effect, Resampling, column_effects, corrected

_SHOWN = ("mean", "other_mean", "difference", "low", "high", "effect_size")


@dataclass(frozen=True)
class Comparison:
    """Two groups of traces, metric by metric.

    Attributes:
        names: Names of the two groups; differences are first minus second.
        n_traces: Traces given in each group.
        headline: Effects on the band means and the decay slope, p-values corrected over these.
        by_layer: Effects of every metric at every layer, p-values corrected over the layers of a metric.
        pairing: What pairing by problem left, or None for independent groups.
        thinking_steps: Mean number of thinking steps per trace, in each group.
        resampling: Confidence level, numbers of resamples, seed.
        correction: Method behind `p_corrected`.
        model_name: Model that was analysed.
        objective: Objective that was differentiated.
    """

    names: tuple[str, str]
    n_traces: tuple[int, int]
    headline: tuple[Effect, ...]
    by_layer: tuple[Effect, ...]
    pairing: Pairing | None
    thinking_steps: tuple[float, float]
    resampling: Resampling
    correction: Correction
    model_name: str
    objective: str

    def of(self, metric: str) -> tuple[Effect, ...]:
        """Effects of one `metric`, layer by layer; for "decay_slope", its one effect.

        Raises:
            ComparisonError: If there is no such metric.
        """
        found = tuple(effect for effect in self.by_layer if effect.metric == metric)
        found = found or tuple(effect for effect in self.headline if effect.metric == metric)
        if not found:
            known = ", ".join((*LAYER_METRICS, "decay_slope"))
            raise ComparisonError(f"no metric {metric!r} in this comparison: expected one of {known}")
        return found

    def significant(self, metric: str, level: float = 0.05) -> tuple[Effect, ...]:
        """Effects of one `metric` whose corrected p-value is at most `level`.

        Raises:
            ComparisonError: If there is no such metric.
        """
        return tuple(effect for effect in self.of(metric) if effect.p_corrected <= level)

    def to_dataframe(self, rows: Literal["layers", "headline"] = "layers") -> Any:
        """A pandas data frame: one row per metric and layer, or per headline number; columns as `Effect`.

        Raises:
            ValueError: If `rows` is neither.
        """
        if rows not in ("layers", "headline"):
            raise ValueError(f"unknown rows {rows!r}: expected 'layers' or 'headline'")
        effects = self.by_layer if rows == "layers" else self.headline
        columns = [field.name for field in fields(Effect)]
        empty = "band" if rows == "layers" else "layer"
        return dataframe({name: [getattr(e, name) for e in effects] for name in columns if name != empty})

    def to_json(self) -> dict[str, Any]:
        """Plain data; NaN is written as None, so that any JSON reader takes it."""
        data = asdict(self)
        for family in ("headline", "by_layer"):
            data[family] = [
                {key: nan_to_none(value) if isinstance(value, float) else value for key, value in row.items()}
                for row in data[family]
            ]
        return data

    def table(self, metric: str | None = None) -> str:
        """The headline as text, or one `metric` over the layers.

        Raises:
            ComparisonError: If there is no such metric.
        """
        return text_table(*self._table(self.headline if metric is None else self.of(metric)))

    def full_table(self) -> str:
        """Every metric at every layer, as text: long."""
        return text_table(*self._table(self.by_layer))

    def __str__(self) -> str:
        """The headline table."""
        return self.table()

    def __repr__(self) -> str:
        """One line: which groups, how many traces."""
        (name, other_name), (n, other_n) = self.names, self.n_traces
        how = f"paired over {self.pairing.n_pairs} problems" if self.pairing else "independent"
        groups = f"{name!r} ({n} traces) - {other_name!r} ({other_n} traces)"
        return f"Comparison({groups}, {how}, model={self.model_name!r})"

    def _repr_html_(self) -> str:
        return html_table(*self._table(self.headline))

    def _table(self, effects: Sequence[Effect]) -> tuple[str, list[str], list[list[str]], list[str]]:
        name, other_name = self.names
        percent = f"{100 * self.resampling.confidence:g}%"
        size = "d_z" if self.pairing else "Hedges g"
        header = ["where", "metric", "n", name, other_name, "difference"]
        header += [f"{percent} low", f"{percent} high", size, "p", "corrected p"]
        rows = [
            [
                effect.band or ("" if effect.layer is None else f"layer {effect.layer}"),
                effect.metric,
                str(effect.n) if effect.n == effect.other_n else f"{effect.n}, {effect.other_n}",
                *(number(getattr(effect, field)) for field in _SHOWN),
                probability(effect.p_value),
                probability(effect.p_corrected),
            ]
            for effect in effects
        ]
        title = (
            f"{name} ({self.n_traces[0]} traces) minus {other_name} ({self.n_traces[1]} traces): "
            f"{self.model_name}, objective {self.objective}"
        )
        return title, header, rows, self._footer(effects)

    def _footer(self, effects: Sequence[Effect]) -> list[str]:
        if self.pairing:
            p = self.pairing
            how = f"paired over {p.n_pairs} problems ({p.n_dropped} without a partner left out"
            lines = [f"{how}, {p.n_averaged} averaged over several traces); p from sign flips"]
        else:
            lines = ["independent groups; p from permuted labels"]
        family = (
            "the headline numbers" if any(effect.layer is None for effect in effects) else "a metric's layers"
        )
        r = self.resampling
        lines.append(
            f"{r.n_bootstrap} bootstrap resamples (BCa), {r.n_permutations} permutations, seed {r.seed}; "
            f"p corrected over {family}: {self.correction}"
        )
        steps = ", ".join(
            f"{name} {mean:.2f}" for name, mean in zip(self.names, self.thinking_steps, strict=True)
        )
        lines.append(f"thinking steps per trace: {steps}; shares depend on the number of steps")
        if any(math.isnan(effect.p_value) for effect in effects):
            lines.append("-  fewer than 2 traces with a value in a group")
        return lines


def compare(
    group: Iterable[StepSaliency | Diagnosis],
    other_group: Iterable[StepSaliency | Diagnosis],
    *,
    names: tuple[str, str] = ("correct", "wrong"),
    pair_by: tuple[Sequence[Hashable], Sequence[Hashable]] | None = None,
    window: int = 0,
    recent: int = 1,
    pooling: Pooling = "mean",
    confidence: float = 0.95,
    n_bootstrap: int = 4000,
    n_permutations: int = 9999,
    correction: Correction = "holm",
    seed: int = 0,
) -> Comparison:
    """Compare two groups of traces (docs/method.md section 5).

    Args:
        group: Maps or diagnoses of the first group; an iterator is read once, one map at a time.
        other_group: The same for the other group.
        names: What to call them.
        pair_by: A problem id for every trace, for each group. Traces of one problem are averaged within their
            group, then problems in both groups are compared pair by pair. Without it the groups are
            independent.
        window: As in `diagnose`, for maps.
        recent: As in `diagnose`, for maps.
        pooling: As in `diagnose`, for maps.
        confidence: Coverage of the intervals.
        n_bootstrap: Bootstrap resamples.
        n_permutations: Permutations; visited exhaustively where no more than these exist.
        correction: "holm" (family-wise error), "fdr_bh" (false discovery rate) or "none".
        seed: The same seed and traces give the same result, in whatever order the traces come.

    Raises:
        ComparisonError: If a group has fewer than two traces, traces differ in model, objective, layers or
            metric settings, or pairing by `pair_by` leaves fewer than two problems.
        ValueError: If a level, a count or the correction is out of range.

    Cost: about two seconds for 199 + 199 diagnoses of 30 layers on one core.
    """
    _check_arguments(confidence, n_bootstrap, n_permutations, correction)
    groups = [
        diagnoses(maps, name, window=window, recent=recent, pooling=pooling)
        for maps, name in zip((group, other_group), names, strict=True)
    ]
    check_comparable(groups, names)
    for traces, name in zip(groups, names, strict=True):
        if len(traces) < 2:
            raise ComparisonError(
                f"group {name!r} has 1 trace: a spread, and so a comparison, needs at least 2"
            )
    x, y = matrix(groups[0]), matrix(groups[1])
    pairing = None
    if pair_by is not None:
        x, y, pairing = pair((x, y), pair_by, names)
        if pairing.n_pairs < 2:
            raise ComparisonError(
                f"pair_by leaves 1 problem that both groups hold ({pairing.n_dropped} have no partner): "
                "a paired comparison needs at least 2"
            )
    resampling = Resampling(confidence, n_bootstrap, n_permutations, seed)
    first = groups[0][0]
    headline, by_layer = _families(
        column_effects(x, y, paired=pairing is not None, resampling=resampling), first.layers, correction
    )
    return Comparison(
        names=names,
        n_traces=(len(groups[0]), len(groups[1])),
        headline=headline,
        by_layer=by_layer,
        pairing=pairing,
        thinking_steps=(_mean_thinking_steps(groups[0]), _mean_thinking_steps(groups[1])),
        resampling=resampling,
        correction=correction,
        model_name=first.model_name,
        objective=first.objective,
    )


def compare_groups(
    outcomes: Sequence[LabelledTrace], group_by: str, pair_by: str | None, **options: Any
) -> tuple[Comparison, list[str]]:
    """The comparison of true against false, and what was left out, in words.

    Args:
        outcomes: All traces of the run.
        group_by: Name of the grouping field: "is_correct" gives the groups "correct" and "not correct".
        pair_by: Name of the pairing field whose values the outcomes hold, or None for independent groups.
        **options: Of `compare`: confidence, numbers of resamples, seed.

    Raises:
        ComparisonError: If a group is too small, or pairing leaves too little.
    """
    found = [outcome for outcome in outcomes if outcome.diagnosis is not None]
    grouped = [outcome for outcome in found if outcome.group is not None]
    notes = left_out(len(found) - len(grouped), group_by)
    if pair_by is not None:
        paired = [outcome for outcome in grouped if outcome.pair is not None]
        notes += left_out(len(grouped) - len(paired), pair_by)
        grouped = paired
    sides = [[outcome for outcome in grouped if outcome.group is value] for value in (True, False)]
    if min(map(len, sides)) < 2:
        raise ComparisonError(
            f"{group_by} is true in {len(sides[0])} and false in {len(sides[1])} traces with a result"
            f"{'' if pair_by is None else f' and a {pair_by}'}: a comparison needs at least 2 of each"
        )
    name = group_by.removeprefix("is_")
    groups = [[outcome.diagnosis for outcome in side if outcome.diagnosis is not None] for side in sides]
    pairs = None
    if pair_by is not None:
        pairs = ([outcome.pair for outcome in sides[0]], [outcome.pair for outcome in sides[1]])
    return compare(*groups, names=(name, f"not {name}"), pair_by=pairs, **options), notes


def _families(
    statistics: dict[str, np.ndarray], layers: tuple[int, ...], correction: Correction
) -> tuple[tuple[Effect, ...], tuple[Effect, ...]]:
    """Correct each metric over its layers and the headline over itself; return (headline, by layer)."""
    p = statistics["p_value"]
    n_layer_columns = len(LAYER_METRICS) * len(layers)
    by_metric = [
        corrected(block, correction) for block in p[:n_layer_columns].reshape(len(LAYER_METRICS), -1)
    ]
    p_corrected = np.concatenate([*by_metric, corrected(p[n_layer_columns:], correction)])
    effects = []
    for column, (metric, layer, band) in enumerate(column_names(layers)):
        found = {name: statistic[column].item() for name, statistic in statistics.items()}
        found["n"], found["other_n"] = int(found["n"]), int(found["other_n"])
        effects.append(Effect(metric, layer, band, **found, p_corrected=p_corrected[column].item()))
    return tuple(effects[-len(HEADLINE) :]), tuple(effects[: -len(HEADLINE)])


def _mean_thinking_steps(traces: Sequence[Diagnosis]) -> float:
    return float(np.mean([diagnosis.n_thinking for diagnosis in traces]))


def _check_arguments(confidence: float, n_bootstrap: int, n_permutations: int, correction: str) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}: expected a level between 0 and 1, such as 0.95")
    if n_bootstrap < 1 or n_permutations < 1:
        raise ValueError(
            f"n_bootstrap is {n_bootstrap}, n_permutations {n_permutations}: expected at least 1 of each"
        )
    if correction not in get_args(Correction):
        raise ValueError(
            f"unknown correction {correction!r}: expected one of {', '.join(get_args(Correction))}"
        )
