"""Placebos: the same intervention, aimed at nothing in particular, for patching and for knockout.

An effect that the placebo has too does not come from what the intervention claims to remove.

* Random step: another step in its place (`random_step_pairs`, `random_sources`).
* Position-matched: what stands in a like place, so that recency and depth in the trace are not the cause
  (`position_matched_pairs`: an edge of the same lag; `position_matched_sources`: the step next to it).
* Norm-matched: the activations moved just as far, in a random direction (`norm_matched_activations`).

A pair is `(query step's label, key step's label)`. All draws come from `seed` and the thing drawn for, so the
placebo of one pair does not depend on which others were asked for, apart from the pairs it must avoid. A pair
that can have no placebo (T1 has no earlier step but Q) is left out of the result: compare the effects of the
pairs that are in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from jaxtyping import Float
from torch import Tensor

from stepflow_tl.causal.cut import causal_pair
from stepflow_tl.stepflow.placebo import mixed_seed, random_direction_like
from stepflow_tl.trace import ReasoningTrace, Step

StepPair = tuple[str, str]

_RANDOM, _POSITION = 1, 2


def random_step_pairs(
    trace: ReasoningTrace, pairs: Iterable[StepPair], *, seed: int
) -> dict[StepPair, StepPair]:
    """For each edge (i <- j) another edge (i <- j') into the same step, j' an earlier step drawn at random.

    Args:
        trace: The trace the pairs are from.
        pairs: The edges under test; none of them is drawn as a placebo.
        seed: The control's seed.

    Returns:
        The placebo of each pair that has one.

    Raises:
        TraceError: If a label is not in the trace.
        AlignmentError: If a key step comes after its query step.
    """
    return _draw_pairs(
        trace, pairs, lambda query, key: ((query, step) for step in trace.steps[: query.index]), seed, _RANDOM
    )


def position_matched_pairs(
    trace: ReasoningTrace, pairs: Iterable[StepPair], *, seed: int
) -> dict[StepPair, StepPair]:
    """For each edge (i <- j) another edge (i' <- j') of the same lag, i' - j' = i - j steps.

    Candidates have a query step in the same segment as i.

    Arguments, result and errors as in `random_step_pairs`.
    """

    def same_lag(query: Step, key: Step) -> Iterable[tuple[Step, Step]]:
        lag = query.index - key.index
        readers = (step for step in trace.steps_in(query.segment) if step.index >= lag)
        return ((step, trace.steps[step.index - lag]) for step in readers)

    return _draw_pairs(trace, pairs, same_lag, seed, _POSITION)


def random_sources(trace: ReasoningTrace, steps: Sequence[str], *, seed: int) -> dict[str, str]:
    """For each step another one of its segment, drawn at random: `sources` of `step_patching`.

    Args:
        trace: The clean trace.
        steps: Labels of the steps to patch; those alone in their segment are left out.
        seed: The control's seed.

    Raises:
        TraceError: If a label is not in the trace.
    """
    return _draw_sources(trace, steps, lambda distance: distance > 0, seed, _RANDOM)


def position_matched_sources(trace: ReasoningTrace, steps: Sequence[str], *, seed: int) -> dict[str, str]:
    """For each step a neighbour in its segment, before or after it: `sources` of `step_patching`.

    Arguments, result and errors as in `random_sources`; the seed chooses where both neighbours exist.
    """
    return _draw_sources(trace, steps, lambda distance: distance == 1, seed, _POSITION)


def norm_matched_activations(
    base: Float[Tensor, " pos *feature"],
    moved: Float[Tensor, " pos *feature"],
    *,
    seed: int,
    layer: int = 0,
    position: int = 0,
) -> Float[Tensor, " pos *feature"]:
    """`base`, each vector displaced as far as in `moved`, in a random direction.

    Vectors are those of the last axis: one per token in the residual stream, one per token and head at z.
    For patching `moved` holds the patched activations, for knockout z after the knockout.

    Args:
        base: Activations without the intervention.
        moved: Activations with it.
        seed: The control's seed.
        layer: Mixed into the seed, as is `position`.
        position: Index of the first token.
    """
    displacement = (moved - base).reshape(-1, base.shape[-1])
    return base + random_direction_like(displacement, seed, layer, 0, position).reshape(base.shape)


def _draw_pairs(
    trace: ReasoningTrace,
    pairs: Iterable[StepPair],
    candidates: Callable[[Step, Step], Iterable[tuple[Step, Step]]],
    seed: int,
    kind: int,
) -> dict[StepPair, StepPair]:
    tested = {pair: causal_pair(trace, pair) for pair in pairs}
    placebos = {}
    for query, key in tested.values():
        labels = ((reader.label, source.label) for reader, source in candidates(query, key))
        untested = [pair for pair in labels if pair not in tested]
        if untested:
            drawn = mixed_seed(seed, kind, query.index, key.index) % len(untested)
            placebos[query.label, key.label] = untested[drawn]
    return placebos


def _draw_sources(
    trace: ReasoningTrace, steps: Sequence[str], fits: Callable[[int], bool], seed: int, kind: int
) -> dict[str, str]:
    sources = {}
    for step in map(trace.step, steps):
        others = [other for other in trace.steps_in(step.segment) if fits(abs(other.index - step.index))]
        if others:
            sources[step.label] = others[mixed_seed(seed, kind, step.index) % len(others)].label
    return sources
