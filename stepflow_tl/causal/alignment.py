"""Which step of one trace goes into which step of another, and how their tokens meet.

Two traces of the same problem (correct / wrong) are matched by step label: Q with Q, T1 with T1. A label that
only one of them has is an error, never dropped in silence: name the steps to patch, for instance with
`shared_labels`.

Tokens meet in one of two ways:

* `"tokens"`: one by one, which needs steps of equal length. The step's activations become the clean ones.
* `"mean"`: the step's mean becomes the clean step's mean: every token of the step is moved by the difference
  of the two means. Differences within the step stay; writing one vector over all of its tokens would erase
  them, which is an effect of its own even between a trace and itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from stepflow_tl.errors import AlignmentError
from stepflow_tl.saliency.objectives import LogitDifference
from stepflow_tl.trace import ReasoningTrace, Step

Alignment = Literal["tokens", "mean"]
StepPair = tuple[str, str]


@dataclass(frozen=True)
class StepMatch:
    """A step of the clean trace and the step of the corrupted trace that receives its activations."""

    clean: Step
    corrupted: Step


def shared_labels(first: ReasoningTrace, second: ReasoningTrace) -> tuple[str, ...]:
    """Labels of the steps that both traces have, in the order of the second."""
    known = {step.label for step in first.steps}
    return tuple(step.label for step in second.steps if step.label in known)


def step_of(trace: ReasoningTrace, label: str) -> Step:
    """The step with this label.

    Raises:
        AlignmentError: If the trace has none.
    """
    for step in trace.steps:
        if step.label == label:
            return step
    labels = ", ".join(step.label for step in trace.steps)
    raise AlignmentError(f"the trace has no step {label!r}: its steps are {labels}")


def checked_alignment(alignment: Alignment | str) -> Alignment:
    """The alignment of this name.

    Raises:
        ValueError: If there is none.
    """
    if alignment not in get_args(Alignment):
        raise ValueError(f"unknown alignment {alignment!r}: expected one of {', '.join(get_args(Alignment))}")
    return alignment  # pyright: ignore[reportReturnType]


def causal_pair(trace: ReasoningTrace, pair: StepPair) -> tuple[Step, Step]:
    """Query step and key step of an edge (i <- j), given by their labels.

    Raises:
        AlignmentError: If a label is not in the trace, or the key step comes after the query step.
    """
    query, key = step_of(trace, pair[0]), step_of(trace, pair[1])
    if key.index > query.index:
        raise AlignmentError(
            f"pair {pair}: {key.label} comes after {query.label}, so no attention leads there. A pair is "
            "(query step, key step)"
        )
    return query, key


def match_steps(
    clean_trace: ReasoningTrace,
    corrupted_trace: ReasoningTrace,
    *,
    alignment: Alignment | str,
    steps: Sequence[str] | None = None,
    sources: Mapping[str, str] | None = None,
) -> tuple[StepMatch, ...]:
    """Match steps of two traces by label.

    Args:
        clean_trace: Where activations come from.
        corrupted_trace: Where they go.
        alignment: How tokens meet, see the module.
        steps: Labels of the corrupted trace's steps to patch, in the order wanted; all by default.
        sources: Label of the clean step for some of them, where it is not the same label (a control).

    Raises:
        AlignmentError: If a label is missing in either trace, the traces differ in their labels and `steps`
            does not choose, or lengths differ under `"tokens"`.
        ValueError: If `alignment` is unknown.
    """
    alignment = checked_alignment(alignment)
    sources = dict(sources or {})
    if steps is None:
        steps = _all_labels(clean_trace, corrupted_trace, sources)
    if not steps or len(set(steps)) != len(steps):
        raise AlignmentError(f"steps={list(steps)}: expected at least one step label, each of them once")
    unused = sorted(set(sources) - set(steps))
    if unused:
        raise AlignmentError(f"sources names {unused}, which are not among the steps {list(steps)}")
    matches = tuple(
        StepMatch(step_of(clean_trace, sources.get(label, label)), step_of(corrupted_trace, label))
        for label in steps
    )
    for match in matches:
        here, there = match.corrupted.n_tokens, match.clean.n_tokens
        if alignment == "tokens" and here != there:
            raise AlignmentError(
                f"step {match.corrupted.label} has {here} tokens in the corrupted trace, but its source "
                f"{match.clean.label} has {there} in the clean one: they cannot meet token by token. Use "
                "alignment='mean', or leave the step out with steps=[...]"
            )
    return matches


def answer_logit_difference(
    clean_trace: ReasoningTrace, corrupted_trace: ReasoningTrace, step: str = "S1"
) -> tuple[LogitDifference, LogitDifference]:
    """Clean answer token minus corrupted answer token, where the two versions of a step first part.

    Both traces predict that token from the same beginning of the step, so each has a position to read it at.

    Args:
        clean_trace: Its token counts positive.
        corrupted_trace: Its token counts negative.
        step: Label of the step that holds the answer.

    Returns:
        The measure on the corrupted trace and the same on the clean trace: `metric` and `clean_metric` of
        `step_patching`.

    Raises:
        AlignmentError: If a trace lacks the step, or the two versions do not part.
    """
    clean, corrupted = step_of(clean_trace, step), step_of(corrupted_trace, step)
    for offset in range(min(clean.n_tokens, corrupted.n_tokens)):
        token = int(clean_trace.tokens[clean.token_start + offset])
        other = int(corrupted_trace.tokens[corrupted.token_start + offset])
        if token != other:
            places = (corrupted.token_start + offset - 1, clean.token_start + offset - 1)
            if min(places) < 0:
                raise AlignmentError(f"step {step} parts at its trace's first token, which nothing predicts")
            return LogitDifference(places[0], token, other), LogitDifference(places[1], token, other)
    raise AlignmentError(
        f"step {step} reads the same in both traces as far as the shorter one goes: choose the step in which "
        "their answers differ"
    )


def _all_labels(
    clean_trace: ReasoningTrace, corrupted_trace: ReasoningTrace, sources: Mapping[str, str]
) -> tuple[str, ...]:
    clean = [step.label for step in clean_trace.steps]
    corrupted = [step.label for step in corrupted_trace.steps]
    if clean != corrupted and not set(corrupted) <= set(sources):
        only = [
            f"only the {name} trace has {', '.join(label for label in own if label not in other)}"
            for name, own, other in (("clean", clean, corrupted), ("corrupted", corrupted, clean))
            if set(own) - set(other)
        ]
        raise AlignmentError(
            f"the two traces do not have the same steps ({'; '.join(only)}): choose with "
            f"steps={list(shared_labels(clean_trace, corrupted_trace))}, the labels that both have"
        )
    return tuple(corrupted)
