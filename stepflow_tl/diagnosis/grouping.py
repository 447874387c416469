"""Two groups of traces, told apart by a field that is true or false, compared, and paired by problem.

1. Traces with a result whose field is true against those whose field is false; the others are left out
   and counted.
2. Pairing: by the field asked for, else by `problem_id` where any record has it. A trace without that
   field has no problem to share and is left out and counted.
3. The rest is `compare`.
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from stepflow_tl.diagnosis.comparison import Comparison, compare
from stepflow_tl.diagnosis.diagnosis import Diagnosis
from stepflow_tl.errors import ComparisonError

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


def pairing_field(outcomes: Sequence[LabelledTrace], asked: str | None, *, unpaired: bool) -> str | None:
    """The field to pair by: the one asked for, or `problem_id` where a trace with a result has it."""
    if unpaired:
        return None
    if asked is not None:
        return asked
    has_problem = any(outcome.pair is not None for outcome in outcomes if outcome.diagnosis is not None)
    return DEFAULT_PAIR_FIELD if has_problem else None


def left_out(count: int, field: str) -> list[str]:
    """How many traces have no such field, in words; no line where all have."""
    if not count:
        return []
    return [f"{count} {'trace has' if count == 1 else 'traces have'} no {field}: left out of the comparison"]
