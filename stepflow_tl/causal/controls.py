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

from collections.abc import Iterable, Sequence

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
    tested = _causal_pairs(trace, pairs)
    placebos = {}
    for query, key in tested.values():
        candidates = [step for step in trace.steps[: query.index] if (query.label, step.label) not in tested]
        if candidates:
            drawn = candidates[_draw(len(candidates), seed, _RANDOM, query.index, key.index)]
            placebos[query.label, key.label] = (query.label, drawn.label)
    return placebos


def position_matched_pairs(
    trace: ReasoningTrace, pairs: Iterable[StepPair], *, seed: int
) -> dict[StepPair, StepPair]:
    """For each edge (i <- j) another edge (i' <- j') of the same lag, i' - j' = i - j steps.

    Candidates have a query step in the same segment as i.

    Arguments, result and errors as in `random_step_pairs`.
    """
    tested = _causal_pairs(trace, pairs)
    placebos = {}
    for query, key in tested.values():
        lag = query.index - key.index
        candidates = [
            (step.label, trace.steps[step.index - lag].label)
            for step in trace.steps_in(query.segment)
            if step.index >= lag and (step.label, trace.steps[step.index - lag].label) not in tested
        ]
        if candidates:
            drawn = candidates[_draw(len(candidates), seed, _POSITION, query.index, key.index)]
            placebos[query.label, key.label] = drawn
    return placebos


def random_sources(trace: ReasoningTrace, steps: Sequence[str], *, seed: int) -> dict[str, str]:
    """For each step another one of its segment, drawn at random: `sources` of `step_patching`.

    Args:
        trace: The clean trace.
        steps: Labels of the steps to patch; those alone in their segment are left out.
        seed: The control's seed.

    Raises:
        TraceError: If a label is not in the trace.
    """
    sources = {}
    for step in map(trace.step, steps):
        candidates = [other for other in trace.steps_in(step.segment) if other != step]
        if candidates:
            sources[step.label] = candidates[_draw(len(candidates), seed, _RANDOM, step.index)].label
    return sources


def position_matched_sources(trace: ReasoningTrace, steps: Sequence[str], *, seed: int) -> dict[str, str]:
    """For each step a neighbour in its segment, before or after it: `sources` of `step_patching`.

    Arguments, result and errors as in `random_sources`; the seed chooses where both neighbours exist.
    """
    sources = {}
    for step in map(trace.step, steps):
        near = [other for other in trace.steps_in(step.segment) if abs(other.index - step.index) == 1]
        if near:
            sources[step.label] = near[_draw(len(near), seed, _POSITION, step.index)].label
    return sources


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
        layer: Mixed into the seed.
        position: Mixed into the seed; the index of the first token.
    """
    displacement = (moved - base).reshape(-1, base.shape[-1])
    return base + random_direction_like(displacement, seed, layer, 0, position).reshape(base.shape)


def _causal_pairs(trace: ReasoningTrace, pairs: Iterable[StepPair]) -> dict[StepPair, tuple[Step, Step]]:
    return {pair: causal_pair(trace, pair) for pair in pairs}


def _draw(n_candidates: int, *seed_parts: int) -> int:
    return mixed_seed(*seed_parts) % n_candidates
