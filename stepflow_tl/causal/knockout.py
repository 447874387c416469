"""`step_knockout`: cut a step from an earlier one and measure what that does (docs/method.md section 8).

1. To cut (i <- j) is to set the attention scores from the queries of step i to the keys of step j to -inf, in
   the chosen layers and heads, so that the softmax gives their mass to the other keys (`cut`).
2. Row t of the logits predicts token t + 1, as in `saliency.objectives`. Step i's own predictions are those
   of its rows: its tokens but the first, and the first token after it. They are what the cut can change, and
   what row i of a per-token saliency map is about. With `onto`, the predictions of that objective's tokens.
3. The effect is a change against the same model uncut, summed over those predictions (`cut.Effect`).
   Sign: positive, the cut hurts.
4. `cached`: a cut at step i leaves everything before i as it was, and what comes after the predictions does
   not matter. So the keys and values of the whole trace are computed once, and the candidates j of one step
   run as a batch over the tokens of step i alone (with `onto`, over the trace from step i on). One row of
   each batch is not cut: the effects are differences to that row, so rounding that depends on the shape of a
   pass cancels. These uncut rows must also predict what a plain pass over the trace predicts, or the cache is
   not exact and is refused.
5. `full`: one plain forward pass of the whole trace for each cut, with the same mask. The slow obvious
   version, for models without such a cache and for hooks that know the positions of a whole pass.
6. `pairs="screened"`: of each query step the most promising candidates one by one, for as long as they have
   effects, and all others together (`screening`). Where rounding allows it, effects are then differences to
   the pass that filled the cache, and rows are left uncut only to check it. `joint`: sets that are cut
   together, beside the pairs.

Cost: `cached` two passes over the trace, and for each pair one over the tokens of its query step: with n
steps of equal length about n / 2 passes for n^2 / 2 pairs, and screened about one per large effect of a step,
plus at most `top` that find none and two for the groups; `full` one pass per cut. Memory: keys and values of
the trace, and those of a batch in one layer; logits of the trace, and of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, get_args

import torch

from stepflow_tl.causal.cut import EdgeCut, Effect, Joint, Measure, Pairs, resolve_joint, resolve_pairs
from stepflow_tl.causal.knockout_passes import CachedPasses, CutPasses, FullPasses, Reading
from stepflow_tl.causal.knockout_result import TOLERANCE, StepKnockout
from stepflow_tl.causal.screening import (
    TOP,
    QueryCuts,
    check_screening,
    promise,
    promise_order,
    screen,
    screening_note,
)
from stepflow_tl.errors import KnockoutError
from stepflow_tl.models.bands import named_layers
from stepflow_tl.models.facts import check_fit, check_heads, check_layers, model_facts
from stepflow_tl.models.hook_names import hook_counts, resolve_hooks
from stepflow_tl.models.passes import attached, frozen
from stepflow_tl.models.prefix_cache import PrefixCacheRefusal
from stepflow_tl.saliency import StepSaliency, step_saliency
from stepflow_tl.saliency.objectives import ObjectiveLike, resolve_objective
from stepflow_tl.stepflow.flow import StepFlow
from stepflow_tl.stepflow.standing import FwdHooks, standing_hooks, standing_notes
from stepflow_tl.trace import ReasoningTrace

Method = Literal["auto", "cached", "full"]


def step_knockout(
    model: Any,
    trace: ReasoningTrace,
    *,
    layers: str | Sequence[int] = "all",
    heads: Sequence[int] | None = None,
    measure: Measure = "nll",
    pairs: Pairs = "all",
    joint: Joint = (),
    top: int = TOP,
    tolerance: float = TOLERANCE,
    ranking: StepSaliency | None = None,
    onto: ObjectiveLike | None = None,
    method: Method | str = "auto",
    batch_tokens: int = 32_768,
    stepflow: StepFlow | None = None,
    fwd_hooks: FwdHooks = (),
) -> StepKnockout:
    """Cut each pair of steps and measure the effect.

    Row i, column j of the result: what becomes of step i's predictions (its own tokens but the first, and the
    first token after it) when its tokens cannot attend to those of step j. TEMPLATE tokens are never cut.

    Args:
        model: A TransformerLens model: TransformerBridge or HookedTransformer. Hooks that are attached stay
            in force and run before the cut; `"auto"` then takes `"full"`.
        trace: The trace, in this model's token ids.
        layers: Layers in which attention is cut: "all", a band ("shallow", "deep"), or the layers given.
        heads: Query heads that are cut, the same in every layer; all by default.
        measure: `"nll"`, the change of the NLL of the tokens that follow; `"kl"`, the KL of the next-token
            distributions from the uncut ones; or a callable `(logits, clean, tokens) -> number` on the
            logits `[row, vocabulary]` with and without the cut and the tokens `[row]` that follow.
        pairs: `"all"`: every step with every earlier one. `"screened"`: of these, for each query step, the
            most promising alone, `top` at a time until a round finds no effect, and the others together, see
            `causal.screening`; `groups` of the result says which and how much. Or (query, key) pairs of
            indices, labels or steps, as [("S1", "Q")]. A pair (i, i) keeps the tokens of step i from one
            another but not from themselves.
        joint: Sets of steps that a query step is cut from all at once, such as [("S1", ["Q", "T3"])]: a
            second source may stand in for the first, so that each cut alone reads nothing. They become
            `groups` of the result, beside the pairs; with `pairs=[]` they are all that is cut.
        top: How many candidates of a query step screening cuts alone in a round.
        tolerance: Size of an effect, in the measure's unit, that screening takes for none: a group within it
            is not looked into, a round within it is the last. Also what a group must exceed its parts by to
            count as redundant. The size of a group is measured; that each member by itself stays within it
            does not follow, since one cut can make up for another one.
        ranking: A step map of the trace whose rows order the candidates, heads and layers as it has them. By
            default `score="cut"` in the layers that are cut: of each token, or of `onto`.
        onto: Measure the effect carried on to these tokens instead: `"summary"`, a step or its label, a token
            span, any objective over tokens. Cut stays at the queries of step i; the rest of the trace runs
            on. Each pair costs a pass from step i on, so choose pairs.
        method: `"cached"`, `"full"`, or `"auto"`: cached where it is exact. `provenance` says which ran, and
            why.
        batch_tokens: Bound of `cached` on rows times tokens seen (prefix included) in one batch. At least one
            pair runs at a time, whatever this is.
        stepflow: Measure under this repair, in the passes with and without a cut. Its hooks know the
            positions of a whole pass: `"auto"` then takes `"full"`, and `"cached"` refuses.
        fwd_hooks: Hooks that stay on in every pass, before StepFlow's: (name, hook) pairs, or a function from
            the trace to them. The method is as with `stepflow`.

    Returns:
        Effects on the CPU in float64.

    Raises:
        KnockoutError: If pairs, joint sets, measure or method are unknown, `top`, `tolerance` or `ranking`
            cannot be meant, or no prediction is left to measure.
        TraceError: If a step does not exist.
        AlignmentError: If the key step of a pair comes after its query step.
        ModelError: If the trace does not fit the model, a layer or head does not exist, a layer cannot be
            cut, or `"cached"` was asked for and is not exact.
        ObjectiveError: If `onto` is unknown or touches no token.
        GradientError: If a ranking is wanted and its gradient is missing or not finite.
        ValueError: If a band is unknown.

    Cost: see the module; below some 25 steps all pairs cost less than screened ones. `tokens_run` of the
    result counts what was run, rows times tokens; a ranking that is computed here adds one forward and one
    backward pass to it, counted as three.
    """
    facts = model_facts(model)
    check_fit(facts, trace)
    chosen = check_layers(
        facts, named_layers(layers, facts.n_layers) if isinstance(layers, str) else tuple(layers)
    )
    resolve_hooks(model, chosen)
    chosen_heads = check_heads(model, heads)
    if method not in get_args(Method):
        raise KnockoutError(f"method is {method!r}: expected one of {', '.join(get_args(Method))}")
    if batch_tokens < 1:
        raise KnockoutError(f"batch_tokens is {batch_tokens}: expected at least 1")
    effect = Effect(measure)
    is_screened = isinstance(pairs, str) and pairs == "screened"
    check_screening(trace, top, tolerance, ranking, is_screened=is_screened)
    readings, onto_name = _readings(trace, pairs, joint, onto)
    cut = EdgeCut(model, chosen, chosen_heads)
    standing = standing_hooks(model, trace, stepflow=stepflow, fwd_hooks=fwd_hooks)
    notes, n_ranking = standing_notes(stepflow, fwd_hooks), 0
    if is_screened:
        if ranking is None:
            objective = "per_token" if onto is None else onto
            ranking = step_saliency(
                model,
                trace,
                objective=objective,
                score="cut",
                layers=chosen,
                stepflow=stepflow,
                fwd_hooks=fwd_hooks,
            )
            n_ranking = 3 * len(trace)
        order = partial(promise_order, promise(ranking))
        readings = [replace(each, keys=order(each.query.index, each.keys)) for each in readings]
        notes["screening"] = screening_note(top, tolerance)
        notes["ranking"] = f"{ranking.title}, {ranking.provenance.objective}, {ranking.provenance.backend}"
    search = partial(_search, readings, top=top if is_screened else None, tolerance=tolerance)
    with frozen(model), torch.no_grad():
        passes, cuts = None, []
        if method == "auto" and hook_counts(model):
            notes["not_cached"] = "hooks are attached, which may know the positions of a whole pass"
        elif method != "full":
            try:
                if standing:
                    raise PrefixCacheRefusal("hooks stay on, which may know the positions of a whole pass")
                passes = CachedPasses(model, trace, cut, effect, batch_tokens, sparing=is_screened)
                cuts = search(passes)
            except PrefixCacheRefusal as refusal:
                if method == "cached":
                    raise
                passes, notes["not_cached"] = None, refusal.reason
        if passes is None:
            passes = FullPasses(model, trace, cut, effect, standing)
            cuts = search(passes)
    n_steps = len(trace.steps)
    values = torch.zeros(n_steps, n_steps, dtype=torch.float64)
    measured = torch.zeros(n_steps, n_steps, dtype=torch.bool)
    for each, found in zip(readings, cuts, strict=True):
        for key, value in found.alone.items():
            values[each.query.index, key], measured[each.query.index, key] = value, True
    return StepKnockout(
        effects=values,
        measured=measured,
        trace=trace,
        layers=chosen,
        n_layers=facts.n_layers,
        heads=chosen_heads,
        measure=effect.name,
        onto=onto_name,
        provenance=facts.provenance(
            effect.name if onto_name is None else f"{effect.name} onto {onto_name}",
            passes.name,
            notes | passes.notes(),
        ),
        groups=tuple(group for found in cuts for group in found.groups),
        tolerance=float(tolerance),
        tokens_run=n_ranking + passes.tokens_run,
    )


def _search(
    readings: Sequence[Reading], passes: CutPasses, *, top: int | None, tolerance: float
) -> list[QueryCuts]:
    """The cuts of each query step: all candidates alone, or screened where `top` is given."""
    with attached(passes.model, last=passes.hooks):
        return [
            screen(
                each.query.index,
                each.keys,
                partial(passes.cuts, each),
                top=len(each.keys) if top is None else top,
                tolerance=tolerance,
                joint=each.joint,
            )
            for each in readings
        ]


def _readings(
    trace: ReasoningTrace, pairs: Pairs, joint: Joint, onto: ObjectiveLike | None
) -> tuple[list[Reading], str | None]:
    """The rows and cuts of each query step, and the name of `onto`."""
    name, onto_rows = None, None
    if onto is not None:
        objective = resolve_objective(onto, trace)
        if objective.targets is None:
            raise KnockoutError(f"onto={onto!r} names no tokens: expected 'summary', a step or a token span")
        name, onto_rows = objective.name, objective.targets - 1
    sets = resolve_joint(joint, trace)
    keys = resolve_pairs(pairs, trace, may_be_empty=bool(sets))
    readings = []
    for query in sorted({*keys, *sets}):
        step = trace.steps[query]
        if onto_rows is None:
            rows = torch.arange(step.token_start, min(step.token_end, len(trace) - 1))
        else:
            rows = onto_rows[onto_rows >= step.token_start]
        if len(rows):
            readings.append(Reading(step, tuple(keys.get(query, ())), tuple(sets.get(query, ())), rows))
        elif not isinstance(pairs, str) or query in sets:
            what = "no token follows it" if onto is None else f"all of {name} comes before it"
            raise KnockoutError(f"a cut at step {step.label} has no prediction to change: {what}")
    if not readings:
        raise KnockoutError("no step of the trace has both an earlier step and a prediction to measure")
    return readings, name
