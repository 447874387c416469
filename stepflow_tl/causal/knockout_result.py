"""`StepKnockout`: what cutting each step from each earlier one does, with what is needed to read and redo it.

Stored once: the effect of every pair that was measured, summed over the predictions it was measured on, which
pairs those are, the groups of key steps that were cut together, the trace and the provenance. Rows and
columns are the trace's steps in order, as in `StepSaliency`; means per token pair, bounds and redundancy are
derived.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from stepflow_tl.results.files import Schema
from stepflow_tl.results.provenance import Provenance
from stepflow_tl.results.result import TracedResult
from stepflow_tl.results.tables import number
from stepflow_tl.saliency.pooling import Pooling, normalise
from stepflow_tl.trace import ReasoningTrace

_MOST_NAMES = 6  # of a group's steps in a line of text

#: In nats. Half of what counts as a large effect (0.5 nats, a probability that falls by two fifths), so that
#: a large one still shows when another member of its group takes some of it back.
TOLERANCE = 0.25


Role = Literal["bound", "split", "joint"]


@dataclass(frozen=True)
class CutGroup:
    """Key steps that a query step was cut from all at once.

    Attributes:
        query: The query step, as an index into `trace.steps`.
        keys: The key steps, likewise, in ascending order; two or more.
        effect: Effect of the joint cut.
        role: "bound": stands for members that were not cut alone; "split": each member was then cut alone
            or is in a smaller group; "joint": asked for.
        size: At least the size of `effect`: under "nll" the sum of the sizes of its terms, one per
            prediction, so that none cancel. What a "bound" says of its members; see `causal.screening`.
    """

    query: int
    keys: tuple[int, ...]
    effect: float
    role: Role
    size: float = math.nan

    def __post_init__(self) -> None:
        """Refuse what is not a group of earlier steps; a file without sizes has those of the effects."""
        if math.isnan(self.size):
            object.__setattr__(self, "size", abs(self.effect))
        ascending = list(self.keys) == sorted(set(self.keys))
        if len(self.keys) < 2 or not ascending or not 0 <= self.keys[0] <= self.keys[-1] <= self.query:
            raise ValueError(
                f"a group of keys {self.keys} for query {self.query}: expected two or more steps, ascending, "
                "none after the query"
            )


@dataclass(frozen=True)
class StepKnockout(TracedResult):
    """Effect of cutting each query step from each key step (docs/method.md section 8).

    Attributes:
        effects: Effect of a pair, summed over the predictions measured, in nats for "nll" and "kl"; positive
            where the cut hurts. 0 where nothing was measured.
        measured: Which pairs were measured.
        trace: The trace whose steps label both axes.
        layers: Model layers in which attention was cut.
        n_layers: Number of layers of the whole model.
        heads: Heads that were cut, the same in each layer; None for all.
        measure: "nll", "kl", or a callable's name.
        onto: None where the query step's own predictions were measured, else whose: "summary", a step's
            label.
        provenance: Model, measure, method ("cached" or "full"), versions.
        groups: Key steps that were cut together, see `CutGroup`.
        tolerance: Effect that screening takes for none, in the unit of the effects.
        tokens_run: Tokens that all forward passes were fed, rows times length; None in older files.
    """

    schema: ClassVar[Schema] = Schema("stepflow_tl.StepKnockout", 1, "a step-knockout result", minor=2)

    effects: Float[Tensor, "query_step key_step"]
    measured: Bool[Tensor, "query_step key_step"]
    trace: ReasoningTrace
    layers: tuple[int, ...]
    n_layers: int
    heads: tuple[int, ...] | None
    measure: str
    onto: str | None
    provenance: Provenance
    groups: tuple[CutGroup, ...] = ()
    tolerance: float = TOLERANCE
    tokens_run: int | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be a knockout map."""
        super().__post_init__()
        if self.measured.triu(1).any():
            raise ValueError("measured names a pair whose key step comes after its query step")
        if self.effects[~self.measured].any():
            raise ValueError("effects must be 0 where nothing was measured")
        if not self.layers:
            raise ValueError("layers () must be distinct and at least one")
        taken = self.measured.clone()
        for group in self.groups:
            if group.query >= len(self.trace.steps):
                raise ValueError(f"{group} names a step that the trace does not have")
            if not abs(group.effect) <= group.size + 1e-9 < math.inf:
                raise ValueError(f"{group}: effect and size must be finite, the size not below the effect's")
            if group.role == "bound":
                keys = list(group.keys)
                if taken[group.query, keys].any():
                    raise ValueError(f"{group} bounds a pair that was measured, or that another group bounds")
                taken[group.query, keys] = True

    @property
    def bounds(self) -> Float[Tensor, "query_step key_step"]:
        """The size of the group that stands for a pair; NaN where none does."""
        values = torch.full_like(self.effects, math.nan)
        for group in self.groups:
            if group.role == "bound":
                values[group.query, list(group.keys)] = group.size
        return values

    def excess(self, group: CutGroup) -> float:
        """A group's effect minus the sum of what it is made of; NaN where that was not measured.

        It is made of those of its members that were cut alone and of the bounding groups inside it.

        Args:
            group: One of `groups`.
        """
        left, total = set(group.keys), 0.0
        for key in group.keys:
            if self.measured[group.query, key]:
                left.remove(key)
                total += float(self.effects[group.query, key])
        for other in self.groups:
            if other.role == "bound" and other != group and other.query == group.query:
                if left.issuperset(other.keys):
                    left.difference_update(other.keys)
                    total += other.effect
        return math.nan if left else group.effect - total

    @property
    def redundant(self) -> tuple[CutGroup, ...]:
        """The smallest groups whose joint effect exceeds the sum of their parts by more than the tolerance.

        Under "nll" that says that members stand in for one another: each can be done without, all cannot.
        The KL of small changes grows with their square, so under "kl" some excess is to be expected. A group
        whose members may hide each other only in part, or with steps outside it, does not show. No group that
        holds another one of the list is in it.
        """
        found: list[CutGroup] = []
        for group in sorted(self.groups, key=lambda group: len(group.keys)):
            holds = any(one.query == group.query and set(one.keys) < set(group.keys) for one in found)
            if not holds and self.excess(group) > self.tolerance:
                found.append(group)
        return tuple(found)

    def in_words(self) -> list[str]:
        """What was cut together, a sentence or two for a table's footer; nothing where nothing was."""
        lines = []
        if bounding := [group for group in self.groups if group.role == "bound"]:
            n_pairs, largest = (
                sum(len(group.keys) for group in bounding),
                max(g.size for g in bounding),
            )
            lines.append(
                f"{n_pairs} more pairs in {len(bounding)} groups that were cut together: at most "
                f"{number(largest)} each group"
            )
        redundant = self.redundant
        shown = [group for group in self.groups if group.role == "joint" and group not in redundant]
        for group in (*redundant, *shown):
            excess, keys = self.excess(group), [self.labels[key] for key in group.keys]
            names = ", ".join(
                keys if len(keys) <= _MOST_NAMES else [*keys[: _MOST_NAMES - 1], f"... {keys[-1]}"]
            )
            more = "" if math.isnan(excess) else f", {number(group.effect - excess)} as a sum of its parts"
            found = "redundant: " if group in redundant else ""
            lines.append(
                f"{found}{self.labels[group.query]} from {len(keys)} together ({names}): "
                f"{number(group.effect)}{more}"
            )
        return lines

    def pooled(self, pooling: Pooling = "sum") -> Float[Tensor, "query_step key_step"]:
        """The effects as sums, or divided by token pairs as a saliency map is.

        Args:
            pooling: `"sum"`: `effects`; `"mean"`: per pair of a query and a key token; `"causal_mean"`: per
                pair with key <= query.

        Raises:
            ValueError: If `pooling` is unknown.
        """
        return normalise(self.effects, self.step_lengths, pooling)

    def _table(self, n: int) -> tuple[str, list[str], list[list[str]], list[str]]:
        """Measured pairs by the size of the effect."""
        rows = self._pair_rows(self.effects, self.measured, n)
        where = "its own predictions" if self.onto is None else self.onto
        footer = [f"{len(rows)} of {int(self.measured.sum())} pairs; positive: the cut hurts; on {where}"]
        footer += self.in_words()
        header = ["step", "cut from", f"effect ({self.measure})", "step's text", "other's text"]
        return f"Step knockout: {self.provenance.model_name}", header, rows, footer

    def __repr__(self) -> str:
        """One line: what, how large, from which model."""
        p = self.provenance
        onto = "" if self.onto is None else f", onto={self.onto!r}"
        groups = f" and {len(self.groups)} groups" if self.groups else ""
        return (
            f"StepKnockout({int(self.measured.sum())} pairs{groups} of {len(self.trace.steps)} steps, "
            f"{len(self.layers)} of {self.n_layers} layers, measure={self.measure!r}{onto}, "
            f"method={p.backend!r}, model={p.model_name!r})"
        )
