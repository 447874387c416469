"""Do saliency, attention and knockout point at the same steps? Rank agreement per trace, and over traces.

1. `score_maps` brings the maps of one trace to one form, `[query_step, key_step]`: Step-Saliency and raw
   attention as means over heads and over the chosen layers, pooled alike; knockout pooled the same way, by
   its size (a saliency says how much, not for better or worse) or with its sign. `nearness`, minus the
   distance in steps, is the control: two scores may agree only because both prefer what is near.
2. `trace_agreement` compares each two of them on the pairs that knockout measured:
   - `spearman`: rank correlation over all pairs of the trace at once;
   - `row_spearman`: the same among the candidates of one query step, averaged over the steps with three
     candidates or more: which earlier step matters to this one;
   - `top_k`: of the k highest candidates of a query step, the part that both name, averaged over the steps
     with more than k candidates. Two random orders give `top_k_chance`, the mean of k over the number of
     candidates.
3. `summarise_agreement` averages over traces, with BCa intervals (`statistics.resampling`); traces are what
   was sampled, so pairs of one trace are never counted as independent.

Of a screened knockout the pairs that were cut alone are compared, which are those that Step-Saliency ranks
first: do not hold such figures against those of all pairs. How many pairs were left to groups is counted.

A value that does not exist (constant ranks, too few candidates) is NaN and is left out of the means, counted.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from stepflow_tl.causal.knockout_result import StepKnockout
from stepflow_tl.errors import ComparisonError, ResultFileError
from stepflow_tl.results.plain_data import DAMAGE, from_plain, none_to_nan, to_plain
from stepflow_tl.results.tables import number, text_table
from stepflow_tl.saliency.baselines import baseline_maps
from stepflow_tl.saliency.pooling import Pooling, normalise
from stepflow_tl.saliency.result import StepSaliency
from stepflow_tl.statistics.resampling import bca_interval

MEASURES = ("spearman", "row_spearman", "top_k")
_FEWEST_RANKED = 3

StepMap = Float[np.ndarray, "query_step key_step"]


@dataclass(frozen=True)
class TraceAgreement:
    """Agreement of each two scores on one trace.

    Attributes:
        values: By pair of scores, in the order of the maps: each measure of `MEASURES`, NaN where it does not
            exist.
        k: Length of the lists compared by `top_k`.
        top_k_chance: What `top_k` is for random orders; NaN if no step has more than k candidates.
        n_pairs: Pairs of steps compared.
        n_grouped: Pairs not compared, because screening cut them in groups only.
    """

    values: Mapping[tuple[str, str], Mapping[str, float]]
    k: int
    top_k_chance: float
    n_pairs: int
    n_grouped: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain data; NaN is written as None."""
        values = [{"scores": pair, **values} for pair, values in self.values.items()]
        own = {name: getattr(self, name) for name in ("k", "top_k_chance", "n_pairs")}
        if self.n_grouped:
            own["n_grouped"] = self.n_grouped
        return to_plain({**own, "values": values})

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TraceAgreement:
        """Read `to_json`'s data; a ResultFileError if it is inconsistent."""
        try:
            values = {
                (row["scores"][0], row["scores"][1]): {
                    name: none_to_nan(value) for name, value in row.items() if name != "scores"
                }
                for row in data["values"]
            }
            return from_plain(cls, data, values=values, top_k_chance=none_to_nan(data["top_k_chance"]))
        except (*DAMAGE, IndexError) as error:
            raise ResultFileError(f"an inconsistent agreement ({error!r})") from error


def score_maps(
    model: Any,
    saliency: StepSaliency,
    knockout: StepKnockout,
    *,
    pooling: Pooling = "mean",
    signed: bool = False,
) -> dict[str, StepMap]:
    """The maps to compare: Step-Saliency (or the map's own title), attention, knockout and nearness.

    Args:
        model: The model behind the two results, for its attention.
        saliency: Step map of the trace; its layers are averaged, and the same layers' attention.
        knockout: Effects on the same trace.
        pooling: One for all, see `StepSaliency.pooled`.
        signed: Rank knockout effects, and a map whose score is signed, with their sign instead of by size.

    Raises:
        ComparisonError: If the two results are of different traces.
    """
    own, cut = saliency_and_effects(saliency, knockout, pooling)
    attention = baseline_maps(model, saliency.trace)["attention"][list(saliency.layers)]
    n_steps = len(saliency.labels)
    steps = np.arange(n_steps)
    return {
        saliency.title: own if signed else np.abs(own),
        "attention": _array(normalise(attention, saliency.step_lengths, pooling).mean((0, 1))),
        "knockout": cut if signed else np.abs(cut),
        "nearness": -np.abs(steps[:, None] - steps[None, :]).astype(np.float64),
    }


def saliency_and_effects(
    saliency: StepSaliency, knockout: StepKnockout, pooling: Pooling = "mean"
) -> tuple[StepMap, StepMap]:
    """Step-Saliency, averaged over heads and its layers, and knockout effects with their sign, pooled alike.

    Raises:
        ComparisonError: If the two results are of different traces.
    """
    if saliency.trace != knockout.trace:
        raise ComparisonError("saliency and knockout are of different traces: compare results of one trace")
    return _array(saliency.head_mean(pooling).mean(0)), _array(knockout.pooled(pooling))


def trace_agreement(
    maps: Mapping[str, StepMap],
    measured: Bool[np.ndarray, "query_step key_step"],
    *,
    k: int = 3,
    n_grouped: int = 0,
) -> TraceAgreement:
    """Compare each two maps, larger for what matters more, on the measured pairs with key before query.

    Raises:
        ComparisonError: If there are fewer than two maps, k is below 1, or no pair is left.
    """
    pairs = np.tril(measured, -1)
    if len(maps) < 2 or k < 1 or not pairs.any():
        raise ComparisonError(
            f"agreement needs two maps or more, k of at least 1 and a measured pair: got {len(maps)} maps, "
            f"k={k}, {int(pairs.sum())} pairs"
        )
    rows = [np.flatnonzero(row) for row in pairs]
    crowded = [(query, keys) for query, keys in enumerate(rows) if len(keys) > k]
    ranked = [(query, keys) for query, keys in enumerate(rows) if len(keys) >= _FEWEST_RANKED]
    values = {
        (name, other): {
            "spearman": spearman(a[pairs], b[pairs]),
            "row_spearman": _mean([spearman(a[query, keys], b[query, keys]) for query, keys in ranked]),
            "top_k": _mean([_overlap(a[query, keys], b[query, keys], k) for query, keys in crowded]),
        }
        for (name, a), (other, b) in itertools.combinations(maps.items(), 2)
    }
    chance = _mean([k / len(keys) for _, keys in crowded])
    return TraceAgreement(values, k, chance, int(pairs.sum()), n_grouped)


@dataclass(frozen=True)
class AgreementSummary:
    """Agreement over a set of traces.

    Attributes:
        rows: By pair of scores and measure: mean, lower and upper end of the interval, and the number of
            traces that have the value. The ends are NaN below two traces.
        n_traces: Traces.
        n_pairs: Pairs of steps, over all traces.
        n_grouped: Pairs left to groups by screening, likewise.
        k: Length of the lists compared by `top_k`.
        top_k_chance: Mean over traces of what `top_k` is for random orders.
        confidence: Of the intervals.
    """

    rows: Mapping[tuple[str, str], Mapping[str, tuple[float, float, float, int]]]
    n_traces: int
    n_pairs: int
    k: int
    top_k_chance: float
    confidence: float
    n_grouped: int = 0

    def __str__(self) -> str:
        """The table."""
        top_k = f"top-{self.k} overlap"
        titles = {"spearman": "Spearman", "row_spearman": "Spearman in rows", "top_k": top_k}
        header = ["scores", *(title for name in MEASURES for title in (titles[name], "traces"))]
        body = []
        for (name, other), cells in self.rows.items():
            body.append([f"{name} ~ {other}"])
            for mean, low, high, n in (cells[measure] for measure in MEASURES):
                ends = f" [{number(low)}, {number(high)}]" if not np.isnan(low) else ""
                body[-1] += [f"{number(mean)}{ends}", str(n)]
        footer = (
            f"Means over traces [{self.confidence:.0%} BCa interval]; {self.n_pairs} pairs of steps. A "
            f"random order has top-{self.k} overlap {number(self.top_k_chance)}."
        )
        footers = [footer]
        if self.n_grouped:
            footers.append(
                f"Screened: only pairs that were cut alone, which Step-Saliency chose; {self.n_grouped} more "
                "were cut in groups. Not to be held against figures of all pairs."
            )
        title = f"Agreement over {self.n_traces} {'trace' if self.n_traces == 1 else 'traces'}"
        return text_table(title, header, body, footers)

    def to_json(self) -> dict[str, Any]:
        """Plain data; a value that does not exist is null."""
        columns = ("mean", "low", "high", "n_traces")
        rows = [
            {"scores": pair, "measure": measure, **dict(zip(columns, cell, strict=True))}
            for pair, cells in self.rows.items()
            for measure, cell in cells.items()
        ]
        own = {
            name: getattr(self, name)
            for name in ("n_traces", "n_pairs", "n_grouped", "k", "top_k_chance", "confidence")
        }
        return to_plain({**own, "rows": rows})


def summarise_agreement(
    traces: Sequence[TraceAgreement], *, confidence: float = 0.95, n_bootstrap: int = 10_000, seed: int = 0
) -> AgreementSummary:
    """Means over traces with bootstrap intervals.

    Raises:
        ComparisonError: If there is no trace, or maps or k differ.
    """
    if not traces or any((t.k, list(t.values)) != (traces[0].k, list(traces[0].values)) for t in traces):
        raise ComparisonError(
            f"{len(traces)} traces cannot be summarised: expected one or more with the same maps and k"
        )
    interval = partial(
        bca_interval, confidence=confidence, n_bootstrap=n_bootstrap, rng=np.random.default_rng(seed)
    )
    rows = {pair: {} for pair in traces[0].values}
    for pair, measure in itertools.product(rows, MEASURES):
        column = np.array([trace.values[pair][measure] for trace in traces])
        column = column[~np.isnan(column)][:, None]
        ends = interval([(1, column)]) if len(column) > 1 else ([np.nan], [np.nan])
        mean = float(column.mean()) if len(column) else float("nan")
        rows[pair][measure] = (mean, float(ends[0][0]), float(ends[1][0]), len(column))
    chance = _mean([trace.top_k_chance for trace in traces])
    n_pairs = sum(trace.n_pairs for trace in traces)
    n_grouped = sum(trace.n_grouped for trace in traces)
    return AgreementSummary(rows, len(traces), n_pairs, traces[0].k, chance, confidence, n_grouped)


def _array(values: Any) -> StepMap:
    return values.detach().cpu().double().numpy()


def spearman(a: Float[np.ndarray, " pair"], b: Float[np.ndarray, " pair"]) -> float:
    """Rank correlation of two scores of the same pairs, ties at their mean rank; NaN if one is constant."""
    from scipy.stats import rankdata

    ranks = [rankdata(values) for values in (a, b)]
    centred = [rank - rank.mean() for rank in ranks]
    size = np.sqrt((centred[0] ** 2).sum() * (centred[1] ** 2).sum())
    return float((centred[0] * centred[1]).sum() / size) if size > 0 else float("nan")


def _overlap(a: np.ndarray, b: np.ndarray, k: int) -> float:
    """Part of the k highest that both name; among ties the earlier step counts as higher."""
    highest = [set(np.argsort(-values, kind="stable")[:k].tolist()) for values in (a, b)]
    return len(highest[0] & highest[1]) / k


def _mean(values: Sequence[float]) -> float:
    present = [value for value in values if not np.isnan(value)]
    return float(np.mean(present)) if present else float("nan")
