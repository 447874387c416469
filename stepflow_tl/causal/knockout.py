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
5. `full`: one plain forward pass of the whole trace for each pair, with the same cut. The slow obvious
   version, for models without such a cache and for hooks that know the positions of a whole pass.

Cost: `cached` two passes over the trace, and for each pair one over the tokens of its query step: with n
steps of equal length about n / 2 passes for n^2 / 2 pairs; `full` one pass per pair. Memory: keys and values
of the trace, and those of a batch in one layer; logits of the trace, and of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Int
from torch import Tensor

from stepflow_tl.causal.cut import EdgeCut, Effect, Measure, Pairs, cut_mask, resolve_pairs
from stepflow_tl.causal.knockout_result import StepKnockout
from stepflow_tl.errors import KnockoutError
from stepflow_tl.models.bands import named_layers
from stepflow_tl.models.facts import ModelFacts, check_fit, check_heads, check_layers, model_facts
from stepflow_tl.models.hook_names import hook_counts, resolve_hooks
from stepflow_tl.models.passes import NamedHook, attached, frozen, model_device, whole_pass
from stepflow_tl.models.prefix_cache import PrefixCacheRefusal, fill_prefix
from stepflow_tl.saliency.objectives import ObjectiveLike, resolve_objective, token_nll
from stepflow_tl.stepflow.flow import StepFlow
from stepflow_tl.stepflow.standing import FwdHooks, standing_hooks, standing_notes
from stepflow_tl.trace import ReasoningTrace, Step

Method = Literal["auto", "cached", "full"]
Effects = dict[tuple[int, int], float]

# Mean difference of NLL, in nats, between an uncut row and a plain pass. A cache that is not exact is off by
# tenths.
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4}
_HALF_TOLERANCE = 0.1


def step_knockout(
    model: Any,
    trace: ReasoningTrace,
    *,
    layers: str | Sequence[int] = "all",
    heads: Sequence[int] | None = None,
    measure: Measure = "nll",
    pairs: Pairs = "all",
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
        pairs: `"all"`: every step with every earlier one. Or (query, key) pairs of indices, labels or steps,
            as [("S1", "Q")]. A pair (i, i) keeps the tokens of step i from one another but not from
            themselves.
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
        KnockoutError: If pairs, measure or method are unknown, or no prediction is left to measure.
        TraceError: If a step does not exist.
        AlignmentError: If the key step of a pair comes after its query step.
        ModelError: If the trace does not fit the model, a layer or head does not exist, a layer cannot be
            cut, or `"cached"` was asked for and is not exact.
        ObjectiveError: If `onto` is unknown or touches no token.
        ValueError: If a band is unknown.
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
    readings, onto_name = _readings(trace, pairs, onto)
    cut = EdgeCut(model, chosen, chosen_heads)
    standing = standing_hooks(model, trace, stepflow=stepflow, fwd_hooks=fwd_hooks)
    run = _Run(model, trace, facts, cut, standing, effect, batch_tokens)
    with frozen(model), torch.no_grad():
        effects, used, notes = run.effects(readings, method)
    n_steps = len(trace.steps)
    values = torch.zeros(n_steps, n_steps, dtype=torch.float64)
    measured = torch.zeros(n_steps, n_steps, dtype=torch.bool)
    for pair, value in effects.items():
        values[pair], measured[pair] = value, True
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
            used,
            notes | standing_notes(stepflow, fwd_hooks),
        ),
    )


@dataclass(frozen=True)
class _Reading:
    """What is run and read for one query step: a pair per key step, all read on the same rows of logits."""

    query: Step
    keys: list[int]
    rows: Int[Tensor, " row"]  # positions in the trace; the first is not before the step

    @property
    def end(self) -> int:
        """One past the last token that must run."""
        return max(int(self.rows[-1]) + 1, self.query.token_end)


def _readings(
    trace: ReasoningTrace, pairs: Pairs, onto: ObjectiveLike | None
) -> tuple[list[_Reading], str | None]:
    """The rows of each query step, and the name of `onto`."""
    name, onto_rows = None, None
    if onto is not None:
        objective = resolve_objective(onto, trace)
        if objective.targets is None:
            raise KnockoutError(f"onto={onto!r} names no tokens: expected 'summary', a step or a token span")
        name, onto_rows = objective.name, objective.targets - 1
    readings = []
    for query, keys in resolve_pairs(pairs, trace).items():
        step = trace.steps[query]
        if onto_rows is None:
            rows = torch.arange(step.token_start, min(step.token_end, len(trace) - 1))
        else:
            rows = onto_rows[onto_rows >= step.token_start]
        if len(rows):
            readings.append(_Reading(step, keys, rows))
        elif not isinstance(pairs, str):
            what = "no token follows it" if onto is None else f"all of {name} comes before it"
            raise KnockoutError(f"a cut at step {step.label} has no prediction to change: {what}")
    if not readings:
        raise KnockoutError("no step of the trace has both an earlier step and a prediction to measure")
    return readings, name


@dataclass(frozen=True)
class _Run:
    """One call of `step_knockout`, its inputs checked."""

    model: Any
    trace: ReasoningTrace
    facts: ModelFacts
    cut: EdgeCut
    standing: Sequence[NamedHook]
    effect: Effect
    batch_tokens: int

    @property
    def tokens(self) -> Int[Tensor, " token"]:
        """The trace's tokens on the model's device."""
        return self.trace.tokens.to(model_device(self.model))

    def effects(self, readings: list[_Reading], method: str) -> tuple[Effects, str, dict[str, str]]:
        """Effects by pair, the method that ran, and notes for the provenance."""
        notes = {}
        if method == "auto" and hook_counts(self.model):
            notes["not_cached"] = "hooks are attached, which may know the positions of a whole pass"
        elif method != "full":
            try:
                effects, deviation = self._cached(readings)
                return effects, "cached", {"self_check": f"mean NLL off by at most {deviation:.1e} nats"}
            except PrefixCacheRefusal as refusal:
                if method == "cached":
                    raise
                notes["not_cached"] = refusal.reason
        return self._full(readings), "full", notes

    def _cached(self, readings: list[_Reading]) -> tuple[Effects, float]:
        if self.standing:
            raise PrefixCacheRefusal("hooks stay on, which may know the positions of a whole pass")
        tokens = self.tokens
        plain = token_nll(whole_pass(self.model, tokens)[:-1], tokens[1:])
        prefix, _ = fill_prefix(self.model, tokens)
        effects: Effects = {}
        worst = 0.0
        with attached(self.model, last=self.cut.hooks):
            for reading, keys in self._batches(readings):
                start, end = reading.query.token_start, reading.end
                spans = [None, *(self.trace.steps[key].token_span for key in keys)]
                mask = cut_mask((0, reading.query.n_tokens), spans, end - start, end)
                self.cut.mask = mask.to(tokens.device)
                logits = prefix.run(start, end, len(spans))
                self.cut.check_fired()
                rows, following = reading.rows.to(tokens.device), tokens[reading.rows + 1]
                logits = logits[:, rows - start]
                deviation = float((token_nll(logits[0], following) - plain[rows]).abs().mean())
                if not deviation <= _TOLERANCE.get(self.facts.dtype, _HALF_TOLERANCE):
                    raise PrefixCacheRefusal(
                        f"from the cache, the predictions of step {reading.query.label} are off by "
                        f"{deviation:.1e} nats on average"
                    )
                worst = max(worst, deviation)
                for key, cut in zip(keys, logits[1:], strict=True):
                    effects[reading.query.index, key] = self.effect(cut, logits[0], following)
        return effects, worst

    def _batches(self, readings: list[_Reading]) -> Iterator[tuple[_Reading, list[int]]]:
        for reading in readings:
            size = max(1, self.batch_tokens // reading.end - 1)  # one row is not cut
            for first in range(0, len(reading.keys), size):
                yield reading, reading.keys[first : first + size]

    def _full(self, readings: list[_Reading]) -> Effects:
        tokens, n_tokens = self.tokens, len(self.trace)
        effects: Effects = {}
        with attached(self.model, last=[*self.standing, *self.cut.hooks]):
            self.cut.mask = None
            clean = whole_pass(self.model, tokens)
            self.cut.check_fired()
            for reading in readings:
                rows, following = reading.rows.to(tokens.device), tokens[reading.rows + 1]
                for key in reading.keys:
                    span = self.trace.steps[key].token_span
                    mask = cut_mask(reading.query.token_span, [span], n_tokens, n_tokens)
                    self.cut.mask = mask.to(tokens.device)
                    logits = whole_pass(self.model, tokens)
                    self.cut.check_fired()
                    pair = (reading.query.index, key)
                    effects[pair] = self.effect(logits[rows], clean[rows], following)
        return effects
