"""Means over traces of the band metrics, with intervals.

1. A trace's band metric is its mean over the stored layers of the band (`Diagnosis.band`).
2. The mean over the traces that have a value, every trace counted once.
3. Its BCa bootstrap interval, traces resampled; `diagnostics.effects` computes it, as that of a paired
   difference from 0.

Several traces of one problem are not independent, and the intervals do not know: they are then too narrow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
from jaxtyping import Float

from stepflow_tl.diagnosis.diagnosis import LAYER_METRICS, Band, Diagnosis
from stepflow_tl.statistics.effects import Resampling, column_effects

COLUMNS: tuple[tuple[str, Band | None], ...] = (
    *((metric, band) for band in get_args(Band) for metric in LAYER_METRICS),
    ("decay_slope", None),
)


@dataclass(frozen=True)
class BandMean:
    """Mean over traces of one metric in one band.

    Attributes:
        metric: One of `LAYER_METRICS`, or "decay_slope".
        band: "shallow" or "deep"; None for the slope.
        n: Traces with a value.
        mean: Their mean; NaN without any.
        low: Lower end of its interval; NaN with fewer than two traces.
        high: Upper end.
    """

    metric: str
    band: Band | None
    n: int
    mean: float
    low: float
    high: float


def band_row(diagnosis: Diagnosis) -> Float[np.ndarray, " column"]:
    """What one trace contributes; columns as in `COLUMNS`."""
    values = [value for band in get_args(Band) for value in diagnosis.band(band).values()]
    return np.array([*values, diagnosis.decay_slope])


def band_means(
    rows: Sequence[Float[np.ndarray, " column"]], *, confidence: float, n_bootstrap: int, seed: int
) -> tuple[BandMean, ...]:
    """Mean and interval of each of `COLUMNS`.

    Args:
        rows: One `band_row` a trace, at least one.
        confidence: Coverage of the intervals.
        n_bootstrap: Resamples.
        seed: Of the resamples.
    """
    values = np.stack(rows)
    # The permutation p of that comparison is not asked for.
    resampling = Resampling(confidence, n_bootstrap, n_permutations=1, seed=seed)
    found = column_effects(values, np.zeros_like(values), paired=True, resampling=resampling)
    return tuple(
        BandMean(
            metric,
            band,
            int(found["n"][column]),
            mean=float(found["mean"][column]),
            low=float(found["low"][column]),
            high=float(found["high"][column]),
        )
        for column, (metric, band) in enumerate(COLUMNS)
    )
