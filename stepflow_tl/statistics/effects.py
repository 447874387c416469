"""Effects: per column, two means, their difference, its size, its interval and its p-value.

1. A column uses the traces (or pairs) on which it exists; NaN rows are dropped column by column and `n` says
   how many are left. Columns that lack the same rows are computed together.
2. Rows are sorted by their values first, so the order in which traces were given cannot change a resample.
3. Effect size: Hedges' g for two groups (difference over the pooled standard deviation, with the exact
   small-sample factor), d_z for pairs (mean over standard deviation of the paired differences). 0 if the
   difference is 0; NaN if there is a difference but no spread to compare it with.
4. p-values are corrected within a family by `corrected`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float

from stepflow_tl.statistics.resampling import bca_interval, label_permutation_p, sign_flip_p

Correction = Literal["holm", "fdr_bh", "none"]


@dataclass(frozen=True)
class Effect:
    """One metric at one layer, or a band's mean, in two groups.

    Attributes:
        metric: Name of the metric.
        layer: Model layer, or None for a band's mean and for decay_slope.
        band: "shallow" or "deep" for a band's mean, else None.
        n: Traces of the first group with a value; with pairs, the number of pairs.
        other_n: The same for the other group.
        mean: Mean of the first group.
        other_mean: Mean of the other group.
        difference: mean - other_mean.
        low: Lower end of the difference's interval.
        high: Upper end.
        effect_size: Hedges' g, or d_z for pairs.
        p_value: Two-sided permutation p-value.
        p_corrected: p_value corrected over its family.
    """

    metric: str
    layer: int | None
    band: str | None
    n: int
    other_n: int
    mean: float
    other_mean: float
    difference: float
    low: float
    high: float
    effect_size: float
    p_value: float
    p_corrected: float


@dataclass(frozen=True)
class Resampling:
    """How much to resample, and from which seed."""

    confidence: float
    n_bootstrap: int
    n_permutations: int
    seed: int


_STATISTICS = ("n", "other_n", "mean", "other_mean", "difference", "low", "high", "effect_size", "p_value")


def column_effects(
    x: Float[np.ndarray, "trace column"],
    y: Float[np.ndarray, "other_trace column"],
    *,
    paired: bool,
    resampling: Resampling,
) -> dict[str, Float[np.ndarray, " column"]]:
    """Every statistic of `Effect` but the correction, per column.

    With `paired`, row i of x and row i of y belong together. A column with fewer than two values in a group
    gets its n and means, and NaN for the rest.
    """
    present_x, present_y = ~np.isnan(x), ~np.isnan(y)
    if paired:
        present_x = present_y = present_x & present_y
    out = {name: np.full(x.shape[1], np.nan) for name in _STATISTICS}
    patterns = np.concatenate([present_x, present_y]).T
    for pattern in np.unique(patterns, axis=0):
        columns = np.flatnonzero((patterns == pattern).all(axis=1))
        rows_x, rows_y = pattern[: len(x)], pattern[len(x) :]
        found = _complete_effects(x[rows_x][:, columns], y[rows_y][:, columns], paired, resampling)
        for name, values in found.items():
            out[name][columns] = values
    return out


def corrected(p_values: Float[np.ndarray, " test"], method: Correction) -> Float[np.ndarray, " test"]:
    """p-values corrected for their number.

    Holm bounds the family-wise error, Benjamini-Hochberg ("fdr_bh") the false discovery rate. NaN stays NaN
    and does not count as a test.

    Raises:
        ValueError: If `method` is unknown.
    """
    if method not in get_args(Correction):
        raise ValueError(f"unknown correction {method!r}: expected one of {', '.join(get_args(Correction))}")
    out = p_values.copy()
    present = ~np.isnan(p_values)
    p = p_values[present]
    if method == "holm" and p.size:
        order = p.argsort(kind="stable")
        stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
        p = p.copy()
        p[order] = np.minimum(stepped, 1)
    elif method == "fdr_bh" and p.size:
        from scipy.stats import false_discovery_control

        p = false_discovery_control(p, method="bh")
    out[present] = p
    return out


def _complete_effects(
    x: np.ndarray, y: np.ndarray, paired: bool, resampling: Resampling
) -> dict[str, np.ndarray]:
    nan = np.full(x.shape[1], np.nan)
    n, other_n = np.full(x.shape[1], float(len(x))), np.full(x.shape[1], float(len(y)))
    if paired:
        order = np.lexsort(np.concatenate([x, y], axis=1).T[::-1])
        x, y = x[order], y[order]
    else:
        x, y = x[np.lexsort(x.T[::-1])], y[np.lexsort(y.T[::-1])]
    mean = x.mean(axis=0) if len(x) else nan
    other_mean = y.mean(axis=0) if len(y) else nan
    if min(len(x), len(y)) < 2:
        return dict(zip(_STATISTICS, (n, other_n, mean, other_mean, mean - other_mean), strict=False))
    # Bootstrap and permutation draw from streams of their own, so asking for more of one leaves the other as
    # it was.
    bootstrap_rng, permutation_rng = (
        np.random.default_rng(child) for child in np.random.SeedSequence(resampling.seed).spawn(2)
    )
    if paired:
        differences = x - y
        samples = [(1, differences)]
        difference = differences.mean(axis=0)
        spread, factor = differences.std(axis=0, ddof=1), 1.0
        p = sign_flip_p(differences, n_permutations=resampling.n_permutations, rng=permutation_rng)
    else:
        samples = [(1, x), (-1, y)]
        difference = mean - other_mean
        freedom = len(x) + len(y) - 2
        squares = ((x - mean) ** 2).sum(axis=0) + ((y - other_mean) ** 2).sum(axis=0)
        spread, factor = np.sqrt(squares / freedom), _hedges_factor(freedom)
        p = label_permutation_p(x, y, n_permutations=resampling.n_permutations, rng=permutation_rng)
    low, high = bca_interval(
        samples, confidence=resampling.confidence, n_bootstrap=resampling.n_bootstrap, rng=bootstrap_rng
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        size = np.where(difference == 0, 0.0, np.where(spread > 0, factor * difference / spread, np.nan))
    found = (n, other_n, mean, other_mean, difference, low, high, size, p)
    return dict(zip(_STATISTICS, found, strict=True))


def _hedges_factor(freedom: int) -> float:
    """Exact correction of the standardised difference's upward bias in small samples (Hedges 1981)."""
    if freedom < 2:
        return math.nan
    return math.exp(math.lgamma(freedom / 2) - math.lgamma((freedom - 1) / 2) - math.log(freedom / 2) / 2)
