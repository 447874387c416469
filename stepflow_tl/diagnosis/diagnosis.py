"""`Diagnosis`: the measures of one step map, layer by layer, as a frozen result.

NaN stands wherever a definition does not apply, and `reasons` says why. Numbers, never verdicts: whether a
lock-in of 0.6 is high can only be told from a second group of traces, which is what `compare` does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stepflow_tl.errors import ResultFileError
from stepflow_tl.models.bands import deep_band, shallow_band
from stepflow_tl.results.tables import dataframe, html_table, number, text_table

Band = Literal["shallow", "deep"]

LAYER_METRICS = (
    "lock_in",
    "context_reach",
    "question_share",
    "thinking_share",
    "self_share",
    "recency",
    "template_share",
    "final_block",
    "analysis_block",
    "block_ratio",
)
# What the paper's two failures predict, each in the band where it predicts it.
HEADLINE: tuple[tuple[str, Band | None], ...] = (
    ("lock_in", "shallow"),
    ("context_reach", "shallow"),
    ("thinking_share", "deep"),
    ("self_share", "deep"),
    ("recency", "deep"),
    ("decay_slope", None),
)
_SCHEMA = "stepflow_tl.Diagnosis"
_VERSION = 1
_SETTINGS = (
    "window",
    "recent",
    "pooling",
    "model_name",
    "objective",
    "n_question",
    "n_thinking",
    "n_summary",
)


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """Measures of one step map; see `measures` for each definition. NaN where one does not apply.

    Attributes:
        layers: Model layer of each entry.
        n_layers: Layers of the whole model; the bands are its quarters.
        lock_in: Share of a thinking step on itself (and `window` thinking steps before).
        context_reach: What lock_in leaves.
        question_share: The part of context_reach on the question.
        thinking_share: Share of a summary step on the thinking.
        self_share: Share of a summary step on the summary.
        recency: The part of thinking_share on the last `recent` thinking steps.
        template_share: Mass on TEMPLATE keys (the attention sink) relative to all mass.
        final_block: The authors' final-block intensity, nats per token pair.
        analysis_block: The authors' analysis-block intensity, nats per token pair.
        block_ratio: final_block / analysis_block.
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
        reasons: Why a metric is NaN, by metric.
    """

    layers: tuple[int, ...]
    n_layers: int
    lock_in: Float[Tensor, " layer"]
    context_reach: Float[Tensor, " layer"]
    question_share: Float[Tensor, " layer"]
    thinking_share: Float[Tensor, " layer"]
    self_share: Float[Tensor, " layer"]
    recency: Float[Tensor, " layer"]
    template_share: Float[Tensor, " layer"]
    final_block: Float[Tensor, " layer"]
    analysis_block: Float[Tensor, " layer"]
    block_ratio: Float[Tensor, " layer"]
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
    reasons: Mapping[str, str]

    def __post_init__(self) -> None:
        """Refuse metrics that do not have one value a layer."""
        for name in (*LAYER_METRICS, "rows_without_mass"):
            if getattr(self, name).shape != (len(self.layers),):
                raise ValueError(
                    f"{name} has shape {tuple(getattr(self, name).shape)} for {len(self.layers)} layers"
                )
        if any(not 0 <= layer < self.n_layers for layer in self.layers):
            raise ValueError(f"layers {self.layers} lie outside the model's 0..{self.n_layers - 1}")

    def band(self, band: Band) -> dict[str, float]:
        """Mean of every metric over the stored layers of a band; layers without a value are left out.

        Raises:
            ValueError: If `band` is neither "shallow" nor "deep".
        """
        inside = self._inside(band)
        values = torch.stack([getattr(self, name) for name in LAYER_METRICS])[:, inside]
        return dict(zip(LAYER_METRICS, values.nanmean(dim=1).tolist(), strict=True))

    @property
    def headline(self) -> dict[str, float]:
        """What the paper's two failures are about: `HEADLINE`, keyed "lock_in shallow" and so on."""
        bands = {band: self.band(band) for band in get_args(Band)}
        return {
            headline_name(metric, band): self.decay_slope if band is None else bands[band][metric]
            for metric, band in HEADLINE
        }

    def to_dataframe(self) -> Any:
        """One row a layer: `layer` and the columns of `LAYER_METRICS`, as a pandas data frame."""
        columns = {name: getattr(self, name).tolist() for name in LAYER_METRICS}
        return dataframe({"layer": list(self.layers), **columns})

    def to_json(self) -> dict[str, Any]:
        """Plain data; NaN is written as None, so that any JSON reader takes it."""
        return {
            "schema": _SCHEMA,
            "version": _VERSION,
            "layers": list(self.layers),
            "n_layers": self.n_layers,
            **{name: [_or_none(value) for value in getattr(self, name).tolist()] for name in LAYER_METRICS},
            "rows_without_mass": self.rows_without_mass.tolist(),
            "decay_slope": _or_none(self.decay_slope),
            **{name: getattr(self, name) for name in _SETTINGS},
            "reasons": dict(self.reasons),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Diagnosis:
        """Read `data` that `to_json` made.

        Raises:
            ResultFileError: If the data is not a diagnosis, or does not hold together.
        """
        if not isinstance(data, Mapping):
            raise ResultFileError(f"not a diagnosis but a {type(data).__name__}: expected what to_json makes")
        if data.get("schema") != _SCHEMA or data.get("version") != _VERSION:
            found = f"schema {data.get('schema')!r}, version {data.get('version')!r}"
            raise ResultFileError(
                f"not a diagnosis this stepflow_tl reads: {found}, expected {_SCHEMA!r}, {_VERSION}"
            )
        try:
            return cls(
                layers=tuple(int(layer) for layer in data["layers"]),
                n_layers=int(data["n_layers"]),
                **{name: _column(data[name]) for name in LAYER_METRICS},
                rows_without_mass=torch.tensor(
                    [int(count) for count in data["rows_without_mass"]], dtype=torch.int64
                ),
                decay_slope=_or_nan(data["decay_slope"]),
                **{name: data[name] for name in _SETTINGS},
                reasons=dict(data["reasons"]),
            )
        except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise ResultFileError(
                f"a diagnosis that does not hold together ({error!r}): diagnose again"
            ) from error

    def __str__(self) -> str:
        """The table, one row a layer, shallow and deep quarter marked."""
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
        shallow, deep = self._inside("shallow"), self._inside("deep")
        rows = [
            [
                " ".join(name for name, inside in (("shallow", shallow), ("deep", deep)) if i in inside),
                str(layer),
                *(number(float(getattr(self, name)[i])) for name in LAYER_METRICS),
            ]
            for i, layer in enumerate(self.layers)
        ]
        title = (
            f"{self.model_name}, objective {self.objective}: {self.n_question} question, "
            f"{self.n_thinking} thinking, {self.n_summary} summary steps"
        )
        slope = f"decay_slope {number(self.decay_slope)} (thinking_share per layer, deep half)"
        footer = [f"{slope}; window {self.window}, recent {self.recent}, pooling {self.pooling}"]
        if int(self.rows_without_mass.sum()):
            counts = ", ".join(
                f"layer {layer}: {int(count)}"
                for layer, count in zip(self.layers, self.rows_without_mass, strict=True)
                if count
            )
            footer.append(f"rows without mass, left out of the means: {counts}")
        # Metrics that lack a value for the same reason share a line.
        for reason in dict.fromkeys(self.reasons.values()):
            names = ", ".join(name for name, why in self.reasons.items() if why == reason)
            footer.append(f"-  {names}: {reason}")
        return title, ["band", "layer", *(name.replace("_", " ") for name in LAYER_METRICS)], rows, footer


def headline_name(metric: str, band: Band | None) -> str:
    """Name of a headline number: "lock_in shallow", "decay_slope"."""
    return metric if band is None else f"{metric} {band}"


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _column(values: list[float | None]) -> Float[Tensor, " layer"]:
    return torch.tensor([_or_nan(value) for value in values], dtype=torch.float64)
