"""`compare`: do two groups of traces differ in where they look?

1. Every trace gets its `Diagnosis`; the traces are the unit of resampling.
2. Per metric and layer: means, difference, effect size, BCa bootstrap interval, permutation p
   (`statistics.effects`).
3. p-values are corrected over the layers, within each metric.
4. The headline says it in six numbers: band means where the paper predicts a difference, and the decay slope.
   Its p-values are corrected over the six. context_reach is 1 - lock_in, so for Holm the family is one test
   larger than it need be: the correction errs on the safe side.

5. With `match_on`, traces of the two groups that are alike in their number of thinking steps, of tokens, or
   both are paired too (`statistics.matching`) and compared as pairs. A difference that is one of length alone
   is gone there, but for what one step, or a tenth of the tokens, makes: that can point one way, most where
   traces have few steps, and the imbalance after matching says how far. Match on both. With `pair_by` as
   well, only traces of one problem are matched, and then averaged within it. The comparison of all traces
   stays the main one; the matched pairs are its `matched`.

The difference is first group minus other group. Without `pair_by`, traces count as independent: if several
traces answer the same problem, pair by problem, or the intervals are too narrow. A share on one step falls as
a trace gets more steps, whatever the model does, so the table states both groups' mean number of thinking
steps.

`compare_groups` does the same for traces of a data set, which a field of theirs tells apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from stepflow_tl.diagnosis.comparison_result import Comparison, PairMatching
from stepflow_tl.diagnosis.diagnosis import Diagnosis
from stepflow_tl.diagnosis.groups import (
    LabelledTrace,
    check_comparable,
    column_names,
    diagnoses,
    left_out,
    matrix,
    pair,
)
from stepflow_tl.diagnosis.layer_metrics import HEADLINE, LAYER_METRICS
from stepflow_tl.errors import ComparisonError
from stepflow_tl.saliency.pooling import Pooling
from stepflow_tl.saliency.result import StepSaliency
from stepflow_tl.statistics.effects import Correction, Effect, Resampling, column_effects, corrected
from stepflow_tl.statistics.matching import match_groups

Covariate = Literal["steps", "tokens"]
PairIds = tuple[Sequence[Hashable], Sequence[Hashable]]


class _Measure(NamedTuple):
    """What matched traces are alike in: its name, the caliper in words and in its own unit, and its value."""

    name: str
    words: str
    caliper: float
    value: Callable[[Diagnosis], float]


_MEASURES: Mapping[str, _Measure] = MappingProxyType(
    {
        "steps": _Measure("thinking steps", "within 1", 1.0, lambda found: found.n_thinking),
        "tokens": _Measure(
            "tokens", "within 10 %", math.log(1.1), lambda found: math.log(found.n_tokens or 0)
        ),
    }
)


def compare(
    group: Iterable[StepSaliency | Diagnosis],
    other_group: Iterable[StepSaliency | Diagnosis],
    *,
    names: tuple[str, str] = ("correct", "wrong"),
    pair_by: PairIds | None = None,
    match_on: Sequence[Covariate | str] | None = None,
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
        match_on: "steps" (thinking steps, within 1), "tokens" (of the whole trace, within 10 %), or both: the
            traces that have a partner alike in these are compared as pairs too, in the result's `matched`.
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
            metric settings, pairing by `pair_by` leaves fewer than two problems, or matching fewer than two
            pairs; or a diagnosis to match on tokens does not say how many it has.
        ValueError: If a level, a count, the correction or `match_on` is out of range.

    Cost: about two seconds for 199 + 199 diagnoses of 30 layers on one core.
    """
    _check_arguments(confidence, n_bootstrap, n_permutations, correction, match_on)
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
    design = _Design(names, Resampling(confidence, n_bootstrap, n_permutations, seed), correction)
    found = _compared(groups, pair_by, design)
    return found if match_on is None else replace(found, matched=_matched(groups, pair_by, match_on, design))


class _Design(NamedTuple):
    """What two groups are called, and how they are tested."""

    names: tuple[str, str]
    resampling: Resampling
    correction: Correction


def _compared(
    groups: Sequence[Sequence[Diagnosis]],
    pair_by: PairIds | None,
    design: _Design,
    matching: PairMatching | None = None,
) -> Comparison:
    """The comparison of two groups; with a `matching`, their traces belong together one by one."""
    x, y = matrix(groups[0]), matrix(groups[1])
    pairing = None
    if pair_by is not None:
        x, y, pairing = pair((x, y), pair_by, design.names)
        if pairing.n_pairs < 2:
            raise ComparisonError(
                f"pair_by leaves 1 problem that both groups hold ({pairing.n_dropped} have no partner): "
                "a paired comparison needs at least 2"
            )
    first = groups[0][0]
    is_paired = pairing is not None or matching is not None
    statistics = column_effects(x, y, paired=is_paired, resampling=design.resampling)
    headline, by_layer = _families(statistics, first.layers, design.correction)
    return Comparison(
        names=design.names,
        n_traces=(len(groups[0]), len(groups[1])),
        headline=headline,
        by_layer=by_layer,
        pairing=pairing,
        thinking_steps=(_mean_thinking_steps(groups[0]), _mean_thinking_steps(groups[1])),
        resampling=design.resampling,
        correction=design.correction,
        model_name=first.model_name,
        objective=first.objective,
        matching=matching,
    )


def _matched(
    groups: Sequence[Sequence[Diagnosis]], pair_by: PairIds | None, match_on: Sequence[str], design: _Design
) -> Comparison:
    """The comparison of the traces that have a partner alike in length, pair by pair.

    Raises:
        ComparisonError: If a diagnosis lacks what is matched on, or less than two pairs or problems are left.
    """
    measures = [_MEASURES[name] for name in match_on]
    for traces, name in zip(groups, design.names, strict=True):
        lacking = sum(found.n_tokens is None for found in traces) if "tokens" in match_on else 0
        if lacking:
            raise ComparisonError(
                f"{lacking} of the {len(traces)} traces of group {name!r} do not say how many tokens they "
                "have (an older version stored them): diagnose their maps again, or match on steps alone"
            )
    problems = pair_by or ([None] * len(groups[0]), [None] * len(groups[1]))
    sides = [_by_value(traces, own) for traces, own in zip(groups, problems, strict=True)]
    first, other = (
        np.array([[each.value(trace) for each in measures] for trace, _ in side], dtype=np.float64)
        for side in sides
    )
    found = match_groups(
        first,
        other,
        [each.caliper for each in measures],
        strata=([problem for _, problem in sides[0]], [problem for _, problem in sides[1]]),
    )
    alike = [f"{each.name} ({each.words})" for each in measures]
    if len(found.pairs) < 2:
        raise ComparisonError(
            f"matching on {' and '.join(alike)} leaves {len(found.pairs)} pairs of {len(groups[0])} "
            f"{design.names[0]} and {len(groups[1])} {design.names[1]} traces: a comparison needs at least 2"
        )
    chosen = [[side[pair[place]] for pair in found.pairs] for place, side in enumerate(sides)]
    return _compared(
        [[trace for trace, _ in side] for side in chosen],
        pair_by and ([problem for _, problem in chosen[0]], [problem for _, problem in chosen[1]]),
        design,
        PairMatching(
            covariates=tuple(each.name for each in measures),
            calipers=tuple(each.words for each in measures),
            n_pairs=len(found.pairs),
            n_dropped=found.n_dropped,
            imbalance_before=found.imbalance_before,
            imbalance=found.imbalance,
        ),
    )


def _by_value(traces: Sequence[Diagnosis], problems: Sequence[Hashable]) -> list[tuple[Diagnosis, Hashable]]:
    """Traces with their problems, sorted by their numbers: no order must choose between equal pairs."""
    counts = np.array([[found.n_thinking, found.n_tokens or 0] for found in traces], dtype=np.float64)
    order = np.lexsort(np.concatenate([counts, matrix(traces)], axis=1).T[::-1])
    return [(traces[i], problems[i]) for i in order]


def compare_groups(
    outcomes: Sequence[LabelledTrace],
    group_by: str,
    pair_by: str | None,
    *,
    match_on: Sequence[Covariate | str] | None = None,
    **options: Any,
) -> tuple[Comparison, list[str]]:
    """The comparison of true against false, and what was left out, in words.

    Args:
        outcomes: All traces of the run.
        group_by: Name of the grouping field: "is_correct" gives the groups "correct" and "not correct".
        pair_by: Name of the pairing field whose values the outcomes hold, or None for independent groups.
        match_on: As in `compare`; where no matched pairs can be compared, what was left out says why.
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
    ask = partial(compare, *groups, names=(name, f"not {name}"), pair_by=pairs, **options)
    if match_on is None:
        return ask(), notes
    try:
        return ask(match_on=match_on), notes
    except ComparisonError as error:
        return ask(), [*notes, f"no matched comparison: {error}"]


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


def _check_arguments(
    confidence: float,
    n_bootstrap: int,
    n_permutations: int,
    correction: str,
    match_on: Sequence[str] | None,
) -> None:
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
    known = get_args(Covariate)
    if match_on is not None and (isinstance(match_on, str) or not match_on or {*match_on} - {*known}):
        raise ValueError(f"match_on is {match_on!r}: expected some of {', '.join(map(repr, known))}")
