"""Bands chosen by where wrong traces differ from correct ones, instead of the quarters.

The paper tunes the split between shallow and deep layers by hand. Here it is read off two groups of traces:

1. Candidates for the shallow band are the bottom 1, 2, ... layers, up to half of the model; for the deep band
   the top ones.
2. A shallow candidate's effect is how much higher `lock_in`, averaged over its layers, is in wrong traces
   than in correct ones, in pooled standard deviations: Shallow Lock-in. A deep candidate's is how much lower
   `thinking_share` is: Deep Decay.
3. The largest effect wins; of equals, the smaller band.

A choice made on some traces says nothing about those traces: report it on others. Where no candidate has an
effect in the expected direction, the choice still names the largest one, and the effect says that it is none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from stepflow_tl.diagnosis.diagnosis import Diagnosis
from stepflow_tl.diagnosis.groups import check_comparable, diagnoses
from stepflow_tl.diagnosis.layer_metrics import LAYER_METRICS
from stepflow_tl.errors import ComparisonError
from stepflow_tl.saliency.result import StepSaliency

Layers = tuple[int, ...]


@dataclass(frozen=True)
class BandChoice:
    """Bands read off two groups of traces.

    Attributes:
        shallow: The shallow band.
        deep: The deep band.
        shallow_effects: Effect of every shallow candidate, in pooled standard deviations; positive where
            wrong traces lock in more.
        deep_effects: Effect of every deep candidate; positive where wrong traces lose more of the thinking.
        n_traces: Correct and wrong traces behind it.
    """

    shallow: Layers
    deep: Layers
    shallow_effects: Mapping[Layers, float]
    deep_effects: Mapping[Layers, float]
    n_traces: tuple[int, int]


def choose_bands(
    correct: Iterable[StepSaliency | Diagnosis], wrong: Iterable[StepSaliency | Diagnosis]
) -> BandChoice:
    """Choose the bands in which the two groups differ most.

    Args:
        correct: Maps or diagnoses of traces with the right answer.
        wrong: The same for wrong ones.

    Raises:
        ComparisonError: If a group has fewer than two traces, traces were not made alike, or layers are
            missing.
    """
    names = ("correct", "wrong")
    pairs = zip((correct, wrong), names, strict=True)
    groups = [diagnoses(maps, name, window=0, recent=1, pooling="mean") for maps, name in pairs]
    check_comparable(groups, names)
    n_layers = groups[0][0].n_layers
    if min(map(len, groups)) < 2:
        raise ComparisonError("choosing bands needs at least 2 traces in each group")
    if groups[0][0].layers != tuple(range(n_layers)):
        raise ComparisonError(
            f"choosing bands needs all {n_layers} layers; these maps hold {groups[0][0].layers}"
        )
    sizes = range(1, max(1, n_layers // 2) + 1)
    shallow = _effects(groups, "lock_in", [tuple(range(size)) for size in sizes])
    deep = _effects(groups, "thinking_share", [tuple(range(n_layers - size, n_layers)) for size in sizes])
    return BandChoice(_largest(shallow), _largest(deep), shallow, deep, (len(groups[0]), len(groups[1])))


def _effects(
    groups: Sequence[Sequence[Diagnosis]], metric: str, candidates: Sequence[Layers]
) -> dict[Layers, float]:
    """Effect of each candidate band; positive where the difference is the one that the failure predicts."""
    sign = LAYER_METRICS[metric].direction
    profiles = [np.array([diagnosis.metrics[metric].numpy() for diagnosis in group]) for group in groups]
    found = {}
    for layers in candidates:
        correct, wrong = (values[:, list(layers)].mean(1) for values in profiles)
        correct, wrong = correct[~np.isnan(correct)], wrong[~np.isnan(wrong)]
        spread = (
            np.sqrt((correct.var(ddof=1) + wrong.var(ddof=1)) / 2) if min(len(correct), len(wrong)) > 1 else 0
        )
        found[layers] = float(sign * (wrong.mean() - correct.mean()) / spread) if spread else 0.0
    return found


def _largest(effects: Mapping[Layers, float]) -> Layers:
    return max(effects, key=lambda layers: (effects[layers], -len(layers)))
