"""Which pairs of steps are measured: (query step i, key step j), i reads j.

`"all"` is every pair with j before i. A pair asked for by name may also be (i, i): then the tokens of the
step no longer see one another, but each still sees itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from stepflow_tl.errors import KnockoutError
from stepflow_tl.trace import ReasoningTrace

Pairs = Literal["all"] | str | Iterable[Sequence[Any]]


def resolve_pairs(pairs: Pairs, trace: ReasoningTrace) -> dict[int, list[int]]:
    """Key steps by query step, both as indices into `trace.steps`, in ascending order.

    Args:
        pairs: "all", or (query, key) pairs of step indices, labels such as "T3", or steps.
        trace: The trace.

    Raises:
        KnockoutError: If a step does not exist, a key step comes after its query step, or nothing is left.
    """
    n_steps = len(trace.steps)
    if isinstance(pairs, str):
        if pairs != "all":
            raise KnockoutError(
                f"pairs is {pairs!r}: expected 'all' or a list of (query, key) pairs such as [('S1', 'Q')]"
            )
        found = {(query, key) for query in range(n_steps) for key in range(query)}
    else:
        found = {_pair(pair, trace) for pair in pairs}
    if not found:
        raise KnockoutError(
            f"there is no pair to cut: the trace has {n_steps} step(s) and pairs is {pairs!r}. A pair needs "
            "a step and an earlier one."
        )
    by_query: dict[int, list[int]] = {}
    for query, key in sorted(found):
        by_query.setdefault(query, []).append(key)
    return by_query


def _pair(pair: Sequence[Any], trace: ReasoningTrace) -> tuple[int, int]:
    if isinstance(pair, str) or len(pair) != 2:
        raise KnockoutError(f"pair {pair!r}: expected two steps, (query, key)")
    query, key = (_step_index(step, trace) for step in pair)
    if key > query:
        raise KnockoutError(
            f"pair ({trace.steps[query].label}, {trace.steps[key].label}): the key step comes after the "
            "query step, which cannot read it. The order is (query, key): the reader first."
        )
    return query, key


def _step_index(step: Any, trace: ReasoningTrace) -> int:
    if isinstance(step, int) and 0 <= step < len(trace.steps):
        return step
    for own in trace.steps:
        if own == step or own.label == step:
            return own.index
    labels = ", ".join(own.label for own in trace.steps)
    raise KnockoutError(
        f"there is no step {step if isinstance(step, int) else getattr(step, 'label', step)!r}: the trace "
        f"has 0..{len(trace.steps) - 1} ({labels})"
    )
