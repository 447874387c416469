"""Two groups of traces, made comparable: one matrix per group, rows that belong together if they pair.

1. Diagnose each map as it comes, so a generator that loads files one by one never holds two of them.
2. Refuse to mix what must not be mixed: models, objectives, layers, or settings of the metrics.
3. With ids, average the traces of one problem within each group, then keep the problems that both groups
   hold. Traces of a data set pair by the field asked for, else by `problem_id` where any of them has it
   (`pairing_field`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from stepflow_tl.diagnosis.diagnosis import Diagnosis, diagnose
from stepflow_tl.diagnosis.layer_metrics import HEADLINE, LAYER_METRICS, Band
from stepflow_tl.errors import ComparisonError
from stepflow_tl.saliency.pooling import Pooling
from stepflow_tl.saliency.result import StepSaliency

_MUST_AGREE = ("model_name", "objective", "n_layers", "layers", "window", "recent", "pooling")
DEFAULT_PAIR_FIELD = "problem_id"


@runtime_checkable
class LabelledTrace(Protocol):
    """A trace's diagnosis, if it has one, its group and its problem."""

    @property
    def diagnosis(self) -> Diagnosis | None:
        """Its measures, or None where there is no result."""
        ...

    @property
    def group(self) -> bool | None:
        """Value of the grouping field."""
        ...

    @property
    def pair(self) -> str | None:
        """Value of the pairing field."""
        ...


@dataclass(frozen=True)
class Pairing:
    """What pairing by problem left.

    Attributes:
        n_pairs: Problems found in both groups.
        n_dropped: Problems found in one group only, left out.
        n_averaged: Problems with several traces in a group, averaged before pairing.
    """

    n_pairs: int
    n_dropped: int
    n_averaged: int


def diagnoses(
    group: Iterable[StepSaliency | Diagnosis], name: str, *, window: int, recent: int, pooling: Pooling
) -> tuple[Diagnosis, ...]:
    """Diagnose the maps of a group; finished diagnoses pass as they are.

    Raises:
        ComparisonError: If the group is empty, or holds something else.
    """
    found: list[Diagnosis] = []
    for index, item in enumerate(group):
        if isinstance(item, StepSaliency):
            item = diagnose(item, window=window, recent=recent, pooling=pooling)
        if not isinstance(item, Diagnosis):
            raise ComparisonError(
                f"item {index} of group {name!r} is a {type(item).__name__}: "
                "expected StepSaliency or Diagnosis"
            )
        found.append(item)
    if not found:
        raise ComparisonError(f"group {name!r} is empty: a comparison needs at least 2 traces in each group")
    return tuple(found)


def check_comparable(groups: Sequence[Sequence[Diagnosis]], names: Sequence[str]) -> None:
    """Refuse groups whose numbers do not mean the same.

    Raises:
        ComparisonError: On the first trace that differs from the first one; names trace, setting and both
            values.
    """
    first = groups[0][0]
    for group, name in zip(groups, names, strict=True):
        for index, diagnosis in enumerate(group):
            for setting in _MUST_AGREE:
                value, expected = getattr(diagnosis, setting), getattr(first, setting)
                if value != expected:
                    raise ComparisonError(
                        f"trace {index} of group {name!r} has {setting} {value!r}, but trace 0 of group "
                        f"{names[0]!r} has {expected!r}: compare maps of one model, objective, set of layers "
                        "and metric settings"
                    )


def column_names(layers: Sequence[int]) -> tuple[tuple[str, int | None, Band | None], ...]:
    """(metric, layer, band) of each column of `matrix`: every metric by layer, then the headline numbers."""
    by_layer = [(metric, layer, None) for metric in LAYER_METRICS for layer in layers]
    return (*by_layer, *((metric, None, band) for metric, band in HEADLINE))


def matrix(group: Sequence[Diagnosis]) -> Float[np.ndarray, "trace column"]:
    """One row per trace, columns as in `column_names`."""
    return np.array(
        [
            np.concatenate(
                [
                    *(column.numpy() for column in diagnosis.metrics.values()),
                    np.array(list(diagnosis.headline.values())),
                ]
            )
            for diagnosis in group
        ],
        dtype=np.float64,
    )


def pair(
    values: tuple[Float[np.ndarray, "trace column"], Float[np.ndarray, "other_trace column"]],
    ids: tuple[Sequence[Hashable], Sequence[Hashable]],
    names: tuple[str, str],
) -> tuple[Float[np.ndarray, "pair column"], Float[np.ndarray, "pair column"], Pairing]:
    """Average within problems, then line up the problems that both groups hold, in the first group's order.

    A metric's mean over a problem's traces leaves out the traces where it is NaN.

    Raises:
        ComparisonError: If ids and traces differ in number, an id is None, or no problem is in both groups.
    """
    by_problem = []
    for group_values, group_ids, name in zip(values, ids, names, strict=True):
        if len(group_ids) != len(group_values):
            raise ComparisonError(
                f"pair_by gives {len(group_ids)} ids for the {len(group_values)} traces of group {name!r}: "
                "expected one problem id per trace"
            )
        if any(problem is None for problem in group_ids):
            raise ComparisonError(
                f"pair_by has None among the ids of group {name!r}: every trace needs a problem id"
            )
        rows: dict[Hashable, list[int]] = {}
        for row, problem in enumerate(group_ids):
            rows.setdefault(problem, []).append(row)
        by_problem.append({problem: _nan_mean(group_values[chosen]) for problem, chosen in rows.items()})
    first, other = by_problem
    shared = [problem for problem in first if problem in other]
    if not shared:
        raise ComparisonError(
            f"no problem id is in both groups ({names[0]!r}: {next(iter(first))!r}, ...; {names[1]!r}: "
            f"{next(iter(other))!r}, ...): pass ids of problems, not of traces, or leave pair_by out"
        )
    counts = [Counter(group_ids) for group_ids in ids]
    averaged = sum(any(count[problem] > 1 for count in counts) for problem in shared)
    left = len(first.keys() | other.keys()) - len(shared)
    x, y = (np.stack([group[problem] for problem in shared]) for group in (first, other))
    return x, y, Pairing(n_pairs=len(shared), n_dropped=left, n_averaged=averaged)


def pairing_field(outcomes: Sequence[LabelledTrace], asked: str | None, *, unpaired: bool) -> str | None:
    """The field to pair by: the one asked for, or `problem_id` where a trace with a result has it.

    Args:
        outcomes: All traces of the run.
        asked: The field asked for, or None.
        unpaired: Do not pair, whatever the traces have.
    """
    if unpaired:
        return None
    if asked is not None:
        return asked
    has_problem = any(outcome.pair is not None for outcome in outcomes if outcome.diagnosis is not None)
    return DEFAULT_PAIR_FIELD if has_problem else None


def left_out(count: int, field: str) -> list[str]:
    """How many traces have no such field, in words.

    Args:
        count: Traces without the field; 0 gives no line.
        field: The field's name.
    """
    if not count:
        return []
    return [f"{count} {'trace has' if count == 1 else 'traces have'} no {field}: left out of the comparison"]


def _nan_mean(rows: Float[np.ndarray, "trace column"]) -> Float[np.ndarray, " column"]:
    count = (~np.isnan(rows)).sum(axis=0)
    # Sorted, so that the order of the traces cannot change a sum's rounding.
    return np.where(count > 0, np.nansum(np.sort(rows, axis=0), axis=0) / np.maximum(count, 1), np.nan)
