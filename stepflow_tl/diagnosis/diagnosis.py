"""`diagnose`: from one step map to its `Diagnosis`, the layer metrics as a frozen result.

1. Compute every entry of `layer_metrics` on the map's mean over heads, in float64.
2. Where a definition does not apply to this trace (no summary, one thinking step ...) the value is NaN and
   `reasons` says why. That is a fact about the trace, not an error.
3. Refuse only what leaves nothing to state: no thinking and no summary, or a map without any mass.

Numbers, never verdicts: whether a lock-in of 0.6 is high can only be told from a second group of traces,
which is what `compare` does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stepflow_tl.diagnosis.layer_metrics import HEADLINE, LAYER_METRICS, Band, decay_slope, headline_name
from stepflow_tl.diagnosis.shares import MapShares
from stepflow_tl.errors import GradientError, ResultFileError, TraceError
from stepflow_tl.models.bands import deep_band, shallow_band
from stepflow_tl.results.plain_data import DAMAGE, count, from_plain, none_to_nan, plain_fields
from stepflow_tl.results.tables import dataframe, html_table, number, text_table
from stepflow_tl.saliency.pooling import Pooling
from stepflow_tl.saliency.result import StepSaliency
from stepflow_tl.trace import Segment

_SCHEMA = "stepflow_tl.Diagnosis"
_VERSION = 1
_NEWER = "the stored diagnosis was written before this metric existed"


@dataclass(frozen=True, eq=False, init=False)
class Diagnosis:
    """Layer metrics of one step map; NaN where a definition does not apply.

    Every metric is an attribute too: `diagnosis.lock_in` is `diagnosis.metrics["lock_in"]`.

    Attributes:
        layers: Model layer of each entry.
        n_layers: Layers of the whole model; the bands are its quarters.
        metrics: One value per layer for each of `LAYER_METRICS`, float64; its definitions say what they are.
        rows_without_mass: Rows left out of the means because they had no mass.
        decay_slope: Slope of thinking_share over the deep half, in share per layer.
        window: Window of lock_in.
        recent: Number of last thinking steps in recency.
        pooling: Pooling behind the shares.
        model_name: Model that was analysed.
        objective: Objective that was differentiated.
        n_question: Question steps.
        n_thinking: Thinking steps.
        n_summary: Summary steps.
        n_tokens: Tokens of the whole trace; None in a diagnosis stored before it said so.
        reasons: Why a metric is NaN, by metric.
    """

    layers: tuple[int, ...]
    n_layers: int
    metrics: Mapping[str, Float[Tensor, " layer"]]
    rows_without_mass: Int[Tensor, " layer"]
    decay_slope: float
    window: int
    recent: int
    pooling: str
    model_name: str
    objective: str
    n_question: int
    n_thinking: int
    n_summary: int
    n_tokens: int | None
    reasons: Mapping[str, str]

    def __init__(
        self,
        *,
        layers: tuple[int, ...],
        n_layers: int,
        metrics: Mapping[str, Float[Tensor, " layer"]] | None = None,
        rows_without_mass: Int[Tensor, " layer"],
        decay_slope: float,
        window: int,
        recent: int,
        pooling: str,
        model_name: str,
        objective: str,
        n_question: int,
        n_thinking: int,
        n_summary: int,
        n_tokens: int | None = None,
        reasons: Mapping[str, str],
        **columns: Float[Tensor, " layer"],
    ) -> None:
        """The attributes by name; a metric goes into `metrics` or is given by its own name, which wins.

        A metric that is not given is NaN in every layer.

        Raises:
            ValueError: If a metric is unknown or does not have one value per layer, or a layer is outside
                the model.
        """
        given = {**(metrics or {}), **columns}
        unknown = sorted(set(given) - set(LAYER_METRICS))
        if unknown:
            raise ValueError(f"there is no metric {unknown}: expected some of {', '.join(LAYER_METRICS)}")
        absent = torch.full((len(layers),), torch.nan, dtype=torch.float64)
        metrics = {name: given.get(name, absent) for name in LAYER_METRICS}
        own = locals()
        for field in fields(self):  # frozen: written here and never again
            object.__setattr__(self, field.name, own[field.name])
        for name, column in {**metrics, "rows_without_mass": rows_without_mass}.items():
            if column.shape != (len(layers),):
                raise ValueError(f"{name} has shape {tuple(column.shape)} for {len(layers)} layers")
        if any(not 0 <= layer < n_layers for layer in layers):
            raise ValueError(f"layers {layers} lie outside the model's 0..{n_layers - 1}")

    def __getattr__(self, name: str) -> Float[Tensor, " layer"]:
        """A metric by its name."""
        # An object that is being copied or unpickled has no `metrics` yet.
        if name in self.__dict__.get("metrics", ()):
            return self.metrics[name]
        known = ", ".join(LAYER_METRICS)
        raise AttributeError(f"a Diagnosis has no attribute {name!r}; its metrics are {known}")

    def band(self, band: Band) -> dict[str, float]:
        """Mean of every metric over the stored layers of a band; layers without a value are left out.

        Raises:
            ValueError: If `band` is neither "shallow" nor "deep".
        """
        values = torch.stack(list(self.metrics.values()))[:, self._inside(band)]
        return dict(zip(self.metrics, values.nanmean(dim=1).tolist(), strict=True))

    @property
    def headline(self) -> dict[str, float]:
        """What the paper's two failures are about: `HEADLINE`, keyed "lock_in shallow" and so on."""
        bands = {band: self.band(band) for band in get_args(Band)}
        return {
            headline_name(metric, band): self.decay_slope if band is None else bands[band][metric]
            for metric, band in HEADLINE
        }

    def to_dataframe(self) -> Any:
        """One row per layer: `layer` and the columns of `LAYER_METRICS`, as a pandas data frame."""
        columns = {name: column.tolist() for name, column in self.metrics.items()}
        return dataframe({"layer": list(self.layers), **columns})

    def to_json(self) -> dict[str, Any]:
        """Plain data; NaN is written as None, so that any JSON reader takes it."""
        own = plain_fields(self)
        layers = {name: own.pop(name) for name in ("layers", "n_layers")}
        return {"schema": _SCHEMA, "version": _VERSION, **layers, **own.pop("metrics"), **own}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Diagnosis:
        """Read `data` that `to_json` made; a metric that did not exist then is NaN.

        Raises:
            ResultFileError: If the data is not a diagnosis, or is inconsistent.
        """
        if not isinstance(data, Mapping):
            raise ResultFileError(f"not a diagnosis but a {type(data).__name__}: expected what to_json makes")
        if data.get("schema") != _SCHEMA or data.get("version") != _VERSION:
            found = f"schema {data.get('schema')!r}, version {data.get('version')!r}"
            raise ResultFileError(
                f"not a diagnosis this stepflow_tl reads: {found}, expected {_SCHEMA!r}, {_VERSION}"
            )
        try:
            return from_plain(
                cls,
                dict(data),
                metrics={
                    name: torch.tensor(list(map(none_to_nan, data[name])), dtype=torch.float64)
                    for name in LAYER_METRICS
                    if name in data
                },
                rows_without_mass=torch.tensor(list(map(int, data["rows_without_mass"])), dtype=torch.int64),
                decay_slope=none_to_nan(data["decay_slope"]),
                n_tokens=None if data.get("n_tokens") is None else count(data, "n_tokens"),
                reasons={**dict.fromkeys(set(LAYER_METRICS) - set(data), _NEWER), **data["reasons"]},
            )
        except (*DAMAGE, RuntimeError) as error:
            raise ResultFileError(f"an inconsistent diagnosis ({error!r}): diagnose again") from error

    def __str__(self) -> str:
        """The table, one row per layer, shallow and deep quarter marked."""
        return text_table(*self._table())

    def _repr_html_(self) -> str:
        return html_table(*self._table())

    def __repr__(self) -> str:
        """One line: what, of which model."""
        return (
            f"Diagnosis({len(self.layers)} of {self.n_layers} layers, {self.n_thinking} thinking and "
            f"{self.n_summary} summary steps, objective={self.objective!r}, model={self.model_name!r})"
        )

    def _inside(self, band: Band) -> list[int]:
        if band not in get_args(Band):
            raise ValueError(f"unknown band {band!r}: expected {' or '.join(map(repr, get_args(Band)))}")
        layers = shallow_band(self.n_layers) if band == "shallow" else deep_band(self.n_layers)
        return [i for i, layer in enumerate(self.layers) if layer in layers]

    def _table(self) -> tuple[str, list[str], list[list[str]], list[str]]:
        bands = {band: self._inside(band) for band in get_args(Band)}
        rows = []
        for i, layer in enumerate(self.layers):
            band = " ".join(name for name, inside in bands.items() if i in inside)
            rows.append([band, str(layer), *(number(float(column[i])) for column in self.metrics.values())])
        title = (
            f"{self.model_name}, objective {self.objective}: {self.n_question} question, "
            f"{self.n_thinking} thinking, {self.n_summary} summary steps"
        )
        slope = f"decay_slope {number(self.decay_slope)} (thinking_share per layer, deep half)"
        footer = [f"{slope}; window {self.window}, recent {self.recent}, pooling {self.pooling}"]
        pairs = zip(self.layers, self.rows_without_mass.tolist(), strict=True)
        if empty := ", ".join(f"layer {layer}: {count}" for layer, count in pairs if count):
            footer.append(f"rows without mass, left out of the means: {empty}")
        # Metrics that lack a value for the same reason share a line.
        for reason in dict.fromkeys(self.reasons.values()):
            names = ", ".join(name for name, why in self.reasons.items() if why == reason)
            footer.append(f"-  {names}: {reason}")
        return title, ["band", "layer", *(name.replace("_", " ") for name in self.metrics)], rows, footer


def diagnose(
    saliency: StepSaliency, *, window: int = 0, recent: int = 1, pooling: Pooling = "mean"
) -> Diagnosis:
    """Shallow Lock-in, Deep Decay and the authors' block metrics of one step map (docs/method.md section 5).

    Args:
        saliency: The step map; its mean over heads is read.
        window: Thinking steps before the current one that count as lock-in.
        recent: Last thinking steps whose part of the thinking mass is `recency`. Must stay below the number
            of thinking steps for recency to exist; for long traces try 3 or more.
        pooling: Map behind the shares. The block metrics always use "mean", template_share always sums.

    Raises:
        TraceError: If the trace has neither thinking nor summary steps, so that nothing applies.
        GradientError: If the map holds no mass at all.
        ScoreError: If the map's score is signed.
        ValueError: If `window` is negative, `recent` below 1 or `pooling` unknown.
    """
    if window < 0 or recent < 1:
        raise ValueError(f"window is {window} and recent is {recent}: expected window >= 0 and recent >= 1")
    rows = MapShares.of(saliency, pooling, window=window, recent=recent)
    n_question, n_thinking, n_summary = (
        rows.count(segment) for segment in (Segment.QUESTION, Segment.THINKING, Segment.SUMMARY)
    )
    if not n_thinking + n_summary:
        raise TraceError(
            f"the trace has {n_question} question steps and no thinking or summary step: "
            "nothing to diagnose. Build the trace with thinking, or check its format (ReasoningTrace.format)."
        )
    if not saliency.sums.any():
        raise GradientError("the step map is zero everywhere: no share can be stated. Check the objective.")
    metrics = {name: metric.values(rows) for name, metric in LAYER_METRICS.items()}
    slope = float(decay_slope(metrics["thinking_share"], saliency.layers, saliency.n_layers))
    return Diagnosis(
        layers=saliency.layers,
        n_layers=saliency.n_layers,
        metrics=metrics,
        rows_without_mass=rows.rows_without_mass,
        decay_slope=slope,
        window=window,
        recent=recent,
        pooling=pooling,
        model_name=saliency.provenance.model_name,
        objective=saliency.provenance.objective,
        n_question=n_question,
        n_thinking=n_thinking,
        n_summary=n_summary,
        n_tokens=len(saliency.trace),
        reasons=_reasons(metrics, slope, rows),
    )


def _reasons(metrics: Mapping[str, Tensor], slope: float, rows: MapShares) -> dict[str, str]:
    """Why each metric that has a NaN has one: the trace's make-up first, then layers without mass."""
    reasons = {}
    for name, column in metrics.items():
        pairs = zip(rows.saliency.layers, column.tolist(), strict=True)
        if empty := [layer for layer, value in pairs if math.isnan(value)]:
            missing = LAYER_METRICS[name].missing(rows)
            reasons[name] = missing or f"no mass to take a share of in layers {empty}"
    if math.isnan(slope):
        missing = LAYER_METRICS["thinking_share"].missing(rows)
        reasons["decay_slope"] = missing or "needs 2 stored layers of the deep half with a thinking_share"
    return reasons
