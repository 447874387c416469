"""Which step of one trace goes into which step of another, how their tokens meet, and what is written.

Two traces of the same problem (correct / wrong) are matched by step label: Q with Q, T1 with T1. A label that
only one of them has is an error, never dropped in silence: name the steps to patch, for instance with
`shared_labels`.

Tokens meet in one of two ways:

* `"tokens"`: one by one, which needs steps of equal length. The step's activations become the clean ones.
* `"mean"`: the step's mean becomes the clean step's mean: every token of the step is moved by the difference
  of the two means. Differences within the step stay; writing one vector over all of its tokens would erase
  them, which is an effect of its own even between a trace and itself.

`step_patch_setter` speaks TransformerLens' own patching idiom, so the same edit serves `step_patching` and
`transformer_lens.patching.generic_activation_patch`:

    cells = make_df_from_ranges([model.cfg.n_layers, len(matches)], ["layer", "step"])
    setter = step_patch_setter(matches)
    generic_activation_patch(model, tokens, clean_cache, metric, setter, "resid_pre", index_df=cells)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, get_args

from jaxtyping import Float
from torch import Tensor

from stepflow_tl.causal.controls import norm_matched_activations
from stepflow_tl.errors import AlignmentError, ObjectiveError
from stepflow_tl.saliency.objectives import LogitDifference, Objective, resolve_objective
from stepflow_tl.trace import ReasoningTrace, Step

Alignment = Literal["tokens", "mean"]


@dataclass(frozen=True)
class StepMatch:
    """A step of the clean trace and the step of the corrupted trace that receives its activations."""

    clean: Step
    corrupted: Step


def shared_labels(first: ReasoningTrace, second: ReasoningTrace) -> tuple[str, ...]:
    """Labels of the steps that both traces have, in the order of the second."""
    known = {step.label for step in first.steps}
    return tuple(step.label for step in second.steps if step.label in known)


def checked_alignment(alignment: Alignment | str) -> Alignment:
    """The alignment of this name; a ValueError if there is none."""
    if alignment not in get_args(Alignment):
        raise ValueError(f"unknown alignment {alignment!r}: expected one of {', '.join(get_args(Alignment))}")
    return alignment  # pyright: ignore[reportReturnType]


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
        TraceError: If a label is missing in either trace.
        AlignmentError: If the traces differ in their labels and `steps` does not choose, or lengths differ
            under `"tokens"`.
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
        StepMatch(clean_trace.step(sources.get(label, label)), corrupted_trace.step(label)) for label in steps
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
        TraceError: If a trace lacks the step.
        AlignmentError: If the two versions do not part.
    """
    clean, corrupted = clean_trace.step(step), corrupted_trace.step(step)
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


def metric_on_clean_trace(
    metric: Any, clean_metric: Any, clean_trace: ReasoningTrace, corrupted_trace: ReasoningTrace
) -> Objective | None:
    """The metric on the clean trace: as given, by its name, or the same one where all spans coincide.

    None where it does not carry over: it names positions and the traces differ, or a segment that only the
    corrupted trace has.
    """
    if clean_metric is not None:
        return resolve_objective(clean_metric, clean_trace)
    if isinstance(metric, Step):
        metric = metric.label
    if not isinstance(metric, str):
        spans = [[(s.label, s.token_span) for s in trace.steps] for trace in (clean_trace, corrupted_trace)]
        if len(clean_trace) != len(corrupted_trace) or spans[0] != spans[1]:
            return None
    with suppress(ObjectiveError):
        return resolve_objective(metric, clean_trace)
    return None


def patched_step(
    activation: Float[Tensor, " pos *feature"],
    clean: Float[Tensor, " clean_pos *feature"],
    match: StepMatch,
    alignment: Alignment,
    *,
    placebo_seed: int | None = None,
    layer: int = 0,
) -> Float[Tensor, " step_pos *feature"]:
    """The new activations of the corrupted step, from those of both runs at one hook point.

    With a `placebo_seed` each vector moves just as far in a random direction, another one in each layer.
    """
    here, there = activation[slice(*match.corrupted.token_span)], clean[slice(*match.clean.token_span)]
    if alignment == "tokens" and placebo_seed is None:
        return there  # as it is: adding a difference would round
    moved = here + (there - here if alignment == "tokens" else there.mean(0) - here.mean(0))
    if placebo_seed is None:
        return moved
    position = match.corrupted.token_start
    return norm_matched_activations(here, moved, seed=placebo_seed, layer=layer, position=position)


def step_patch_setter(
    matches: Sequence[StepMatch], alignment: Alignment = "tokens", *, placebo_seed: int | None = None
) -> Callable[[Tensor, Sequence[Any], Tensor], Tensor]:
    """A `patch_setter` for TransformerLens' `generic_activation_patch`, over `[layer, step]` indices.

    Args:
        matches: The steps; the second index counts them.
        alignment: How tokens meet, see the module.
        placebo_seed: If given, random directions of the same length instead.

    Returns:
        `setter(corrupted_activation, [layer, step], clean_activation)`, activations `[batch, pos, ...]`; the
        tensor it was given is not written to.
    """

    def setter(corrupted_activation: Tensor, index: Sequence[Any], clean_activation: Tensor) -> Tensor:
        layer, match = int(index[0]), matches[int(index[1])]
        patched = corrupted_activation.clone()
        for row in range(patched.shape[0]):
            patched[row, slice(*match.corrupted.token_span)] = patched_step(
                corrupted_activation[row],
                clean_activation[row].to(patched.device),
                match,
                alignment,
                placebo_seed=placebo_seed,
                layer=layer,
            )
        return patched

    return setter


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
