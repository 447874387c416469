"""`Comparison`: two groups of traces, metric by metric, as numbers, tables and plain data.

A comparison of all traces may carry another one of the same groups, `matched`: of pairs of traces that are
alike in length. Its own `matching` says how the pairs were found and what was left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from stepflow_tl.diagnosis.groups import Pairing
from stepflow_tl.diagnosis.layer_metrics import LAYER_METRICS
from stepflow_tl.errors import ComparisonError
from stepflow_tl.results.plain_data import plain_fields
from stepflow_tl.results.tables import dataframe, html_table, number, probability, text_table
from stepflow_tl.statistics.effects import Correction, Effect, Resampling

_SHOWN = ("mean", "other_mean", "difference", "low", "high", "effect_size")


@dataclass(frozen=True)
class PairMatching:
    """How the traces of two groups were matched, and what was left out.

    Attributes:
        covariates: What the two traces of a pair must be alike in, in words.
        calipers: By how much they may differ, in words.
        n_pairs: Pairs of traces.
        n_dropped: Traces of each group without a partner, left out.
        imbalance_before: Standardised mean difference of each covariate over all traces, first group minus
            second; NaN or infinite where there is no spread.
        imbalance: The same over the pairs.
    """

    covariates: tuple[str, ...]
    calipers: tuple[str, ...]
    n_pairs: int
    n_dropped: tuple[int, int]
    imbalance_before: tuple[float, ...]
    imbalance: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data; what is not a finite number is written as None."""
        return plain_fields(self)

    def lines(self, names: tuple[str, str]) -> list[str]:
        """In words, for the foot of a table.

        Args:
            names: Of the two groups.
        """
        alike = " and ".join(
            f"{name} ({caliper})" for name, caliper in zip(self.covariates, self.calipers, strict=True)
        )
        dropped = ", ".join(f"{n} {name}" for n, name in zip(self.n_dropped, names, strict=True))
        shifts = zip(self.covariates, self.imbalance_before, self.imbalance, strict=True)
        change = ", ".join(f"{name} {before:.2f} to {after:.2f}" for name, before, after in shifts)
        return [
            f"matched on {alike}: {self.n_pairs} pairs; without a partner and left out: {dropped}",
            f"standardised difference before and after matching: {change}",
        ]


@dataclass(frozen=True)
class Comparison:
    """Two groups of traces, metric by metric.

    Attributes:
        names: Names of the two groups; differences are first minus second.
        n_traces: Traces of each group that are compared.
        headline: Effects on the band means and the decay slope, p-values corrected over these.
        by_layer: Effects of every metric at every layer, p-values corrected over the layers of a metric.
        pairing: What pairing by problem left, or None for independent groups.
        thinking_steps: Mean number of thinking steps per trace, in each group.
        resampling: Confidence level, numbers of resamples, seed.
        correction: Method behind `p_corrected`.
        model_name: Model that was analysed.
        objective: Objective that was differentiated.
        matching: How the traces were matched, where these are matched pairs; else None.
        matched: The same groups, as pairs of traces alike in length, where that was asked for.
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
    matching: PairMatching | None = None
    matched: Comparison | None = None

    @property
    def is_paired(self) -> bool:
        """Whether differences are taken pair by pair: of problems, or of matched traces."""
        return self.pairing is not None or self.matching is not None

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
        return plain_fields(self)

    def table(self, metric: str | None = None) -> str:
        """The headline as text, or one `metric` over the layers.

        Raises:
            ComparisonError: If there is no such metric.
        """
        return text_table(*self._table(self.headline if metric is None else self.of(metric)))

    def full_table(self) -> str:
        """Every metric at every layer, as text: long. The matched pairs follow, where there are any."""
        own = text_table(*self._table(self.by_layer))
        return own if self.matched is None else f"{own}\n\n{self.matched.full_table()}"

    def __str__(self) -> str:
        """The headline table; that of the matched pairs follows, where there are any."""
        return self.table() if self.matched is None else f"{self.table()}\n\n{self.matched}"

    def __repr__(self) -> str:
        """One line: which groups, how many traces."""
        (name, other_name), (n, other_n) = self.names, self.n_traces
        how = f"paired over {self.pairing.n_pairs} problems" if self.pairing else "independent"
        if self.matching is not None:
            how = f"{self.matching.n_pairs} matched pairs"
        groups = f"{name!r} ({n} traces) - {other_name!r} ({other_n} traces)"
        return f"Comparison({groups}, {how}, model={self.model_name!r})"

    def _repr_html_(self) -> str:
        own = html_table(*self._table(self.headline))
        return own if self.matched is None else own + self.matched._repr_html_()

    def _table(self, effects: Sequence[Effect]) -> tuple[str, list[str], list[list[str]], list[str]]:
        name, other_name = self.names
        percent = f"{100 * self.resampling.confidence:g}%"
        size = "d_z" if self.is_paired else "Hedges g"
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
        if self.matching is not None:
            title += ", matched pairs"
        return title, header, rows, self._footer(effects)

    def _footer(self, effects: Sequence[Effect]) -> list[str]:
        if self.matching is not None:
            lines = self.matching.lines(self.names)
            within = "" if self.pairing is None else f"averaged within {self.pairing.n_pairs} problems; "
            lines.append(f"{within}p from sign flips")
        elif self.pairing:
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
