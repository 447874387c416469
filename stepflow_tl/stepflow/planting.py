"""Planted failures: the paper's two, put into a model that does not have them, at a known strength.

A detector and a repair need a case in which the failure is known to be there.

1. `plant_lock_in(dose)`: in the shallow band, the scores of thinking and summary queries on their bridge keys
   (the question while thinking, the thinking while summarising) are lowered by `dose` nats.
2. `plant_decay(dose)`: the same in the deep band, of summary queries on thinking keys alone.
3. A softmax follows, so of a row whose bridge has the mass p(B),

       p'(B) = p(B) e^-dose / (1 - p(B) (1 - e^-dose)),

   every other key gains in proportion, and the odds within the bridge stay as they were.
4. The result is a `StepFlow` that does nothing else, or the `flow` given with the failure put under it: its
   hooks come after the plant's. So `plant_lock_in(8.0).hooks(model, trace) + flow.hooks(model, trace)` over a
   trace, and `plant_lock_in(8.0, flow=flow)` while generating and in `evaluate`. Two failures:
   `plant_lock_in(8.0, flow=plant_decay(8.0))`.
5. In attention calls that form no scores (`generating`), a planted layer computes scores for a block of
   queries at a time and lowers them there (`Call.shift`). z and the logsumexp of the plain call would do,
   with those of the bridge alone: but the rest of a row whose bridge held nearly everything is lost in their
   difference, in bfloat16 long before the failure is strong. A bridge in the same layer reads the lowered
   scores by the same `Call.shift`, and needs no more.
6. Step-Saliency of a planted model has the hooks backends alone: fused's backward pass does not know plants.

A dose of 0 attaches nothing. Memory: over a trace a copy of the scores; while generating one block of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from stepflow_tl.errors import FusedRefusal, TraceError
from stepflow_tl.models.attention import ScoreShift
from stepflow_tl.models.bands import named_layers
from stepflow_tl.models.facts import check_layers, model_facts
from stepflow_tl.models.hook_names import LayerHooks, refuse_delegated
from stepflow_tl.models.passes import NamedHook
from stepflow_tl.stepflow.calls import FlowCalls
from stepflow_tl.stepflow.flow import StepFlow
from stepflow_tl.stepflow.report import FlowHooks, FlowReport
from stepflow_tl.stepflow.state import FlowState, QuerySpan
from stepflow_tl.trace import ReasoningTrace
from stepflow_tl.trace.steps import Segment

Failure = Literal["lock_in", "decay"]


@dataclass(frozen=True)
class Plant:
    """One planted failure.

    Attributes:
        failure: Which.
        dose: By how many nats scores are lowered.
        layers: Where; None for the failure's band.
    """

    failure: Failure
    dose: float
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Refuse a dose without a meaning."""
        if not 0 <= self.dose < float("inf"):
            raise ValueError(
                f"dose is {self.dose}: expected nats by which scores are lowered, 0 or more and finite"
            )

    def layers_in(self, model: Any) -> tuple[int, ...]:
        """Its layers of this `model`, none at dose 0; a ModelError if one does not exist."""
        facts = model_facts(model)
        band = named_layers("shallow" if self.failure == "lock_in" else "deep", facts.n_layers)
        layers = check_layers(facts, band if self.layers is None else self.layers)
        return layers if self.dose else ()

    def check_trace(self, trace: ReasoningTrace) -> None:
        """Refuse a trace that has no query to plant it in.

        Raises:
            TraceError: If there is no thinking; for decay, if there is no summary either.
        """
        needed = (Segment.THINKING,) if self.failure == "lock_in" else (Segment.THINKING, Segment.SUMMARY)
        missing = [s.name.lower() for s in needed if all(step.segment != s for step in trace.steps)]
        if missing and self.dose:
            raise TraceError(
                f"the trace has no {' and no '.join(missing)}: {self.failure} cannot be planted in it. Use a "
                "trace with both, or check its format (ReasoningTrace.format)."
            )


def plant_lock_in(
    dose: float, *, layers: Sequence[int] | None = None, flow: StepFlow | None = None
) -> PlantedFlow:
    """Shallow Lock-in: thinking loses sight of the question, and the summary of the thinking.

    Args:
        dose: By how many nats scores are lowered; 0 leaves the model as it is, bit for bit.
        layers: Where; the bottom quarter by default.
        flow: What acts on the planted model; nothing by default. May be planted itself.

    Returns:
        A StepFlow, with all that one can do; `fwd_hooks=plant.hooks(model, trace)` in `step_saliency`.

    Raises:
        ValueError: If the dose is negative or not finite.
    """
    return _planted("lock_in", dose, layers, flow)


def plant_decay(
    dose: float, *, layers: Sequence[int] | None = None, flow: StepFlow | None = None
) -> PlantedFlow:
    """Deep Decay: the summary loses sight of the thinking.

    Arguments, result and errors as in `plant_lock_in`; the top quarter of the layers by default.
    """
    return _planted("decay", dose, layers, flow)


def _planted(
    failure: Failure, dose: float, layers: Sequence[int] | None, flow: StepFlow | None
) -> PlantedFlow:
    plant = Plant(failure, float(dose), None if layers is None else tuple(layers))
    flow = StepFlow(tau_max=0.0, alpha=0.0) if flow is None else flow
    if isinstance(flow, PlantedFlow):
        return replace(flow, plants=(*flow.plants, plant))
    return PlantedFlow(**vars(flow), plants=(plant,))


@dataclass(frozen=True)
class PlantedFlow(StepFlow):
    """A StepFlow on a model with planted failures, which act before it.

    Args:
        plants: The failures.
    """

    plants: tuple[Plant, ...] = ()

    def layers(self, model: Any) -> tuple[int, ...]:
        """Layers of `model` in which anything is done, or planted."""
        planted = (layer for plant in self.plants for layer in plant.layers_in(model))
        return tuple(sorted({*super().layers(model), *planted}))

    def hooks(
        self, model: Any, trace: ReasoningTrace | Sequence[ReasoningTrace], **options: Any
    ) -> FlowHooks:
        """As `StepFlow.hooks`; a TraceError if `trace` has nothing to plant a failure in, in this `model`."""
        for each in [trace] if isinstance(trace, ReasoningTrace) else trace:
            for plant in self.plants:
                plant.check_trace(each)
        return super().hooks(model, trace, **options)

    def calls(self, model: Any, trace: ReasoningTrace, *, detach_values: bool = False) -> FlowCalls:
        """Refused for any `model`, `trace` and `detach_values`, so that a map is computed with hooks."""
        raise FusedRefusal("a failure is planted in the scores, which the backward pass does not know")

    def _at_scores(
        self, model: Any, hooks: LayerHooks, state: FlowState, report: FlowReport
    ) -> list[NamedHook]:
        repair = super()._at_scores(model, hooks, state, report)
        plants = self._in_layer(model, hooks.layer)
        if not plants:
            return repair
        refuse_delegated(model, hooks, "Leave the layer out with layers=[...].")
        name, function = (
            (hooks.pattern, _pattern_hook) if hooks.scores is None else (hooks.scores, _scores_hook)
        )
        return [(name, partial(function, state=state, plants=plants)), *repair]

    def _calls(self, model: Any, state: FlowState, report: FlowReport, detach_values: bool) -> FlowCalls:
        calls = super()._calls(model, state, report, detach_values)
        by_layer = {layer: self._in_layer(model, layer) for layer in self.layers(model)}
        shifts = {
            layer: partial(_shift, state, plants=plants) for layer, plants in by_layer.items() if plants
        }
        return replace(calls, shifts=shifts)

    def _in_layer(self, model: Any, layer: int) -> tuple[Plant, ...]:
        return tuple(plant for plant in self.plants if layer in plant.layers_in(model))


def _shift(state: FlowState, n_keys: int, device: Any, *, plants: Sequence[Plant]) -> ScoreShift | None:
    """What lowers a layer's scores on so many keys; None if no query of this pass is planted."""
    always = sum(plant.dose for plant in plants if plant.failure == "lock_in")
    in_summary = sum(plant.dose for plant in plants if plant.failure == "decay")
    parts: list[tuple[QuerySpan, Tensor]] = []
    for span in state.spans(n_keys, "segment", device=device):
        # The queries of a span are of one segment in each of its rows.
        segment, _ = state.labels.label_at(state.current.start + span.queries.stop - 1)
        dose = always + in_summary * (segment[span.rows] == int(Segment.SUMMARY))
        if dose.any():
            parts.append((span, torch.from_numpy(-dose)))

    def shift(scores: Tensor, rows: slice, queries: slice, keys: range) -> Tensor:
        shape = (scores.shape[0], 1, *scores.shape[2:])
        # -0.0 is the one number that changes no other when added to it.
        change = torch.full(shape, -0.0, dtype=scores.dtype, device=scores.device)
        for span, dose in parts:
            row, query = _common(rows, span.rows), _common(queries, span.queries)
            # A group ends with the last key that its queries may see.
            bridge = span.groups[1][_within(row, span.rows), ..., keys.start : keys.stop]
            lowered = dose[_within(row, span.rows), None, None, None].to(scores) * bridge
            change[_within(row, rows), :, _within(query, queries), : bridge.shape[-1]] = lowered
        return scores + change

    return shift if parts else None


def _common(one: slice, other: slice) -> slice:
    start = max(one.start, other.start)
    return slice(start, max(start, min(one.stop, other.stop)))


def _within(part: slice, whole: slice) -> slice:
    return slice(part.start - whole.start, part.stop - whole.start)


def _scores_hook(
    attn_scores: Float[Tensor, "batch head query key"],
    hook: Any,
    *,
    state: FlowState,
    plants: Sequence[Plant],
) -> Float[Tensor, "batch head query key"]:
    """Lower the scores of planted rows on their bridge; for `hook_attn_scores`."""
    n_rows, _, n_queries, n_keys = attn_scores.shape
    state.check_shape(n_rows, n_queries, hook.name)
    shift = _shift(state, n_keys, attn_scores.device, plants=plants)
    whole = slice(0, n_rows), slice(0, n_queries), range(n_keys)
    return attn_scores if shift is None else shift(attn_scores, *whole)


def _pattern_hook(
    pattern: Float[Tensor, "batch head query key"],
    hook: Any,
    *,
    state: FlowState,
    plants: Sequence[Plant],
) -> Float[Tensor, "batch head query key"]:
    """The same after the softmax; for `hook_pattern` where scores cannot be edited.

    What a row lacks to 1 belongs to a sink, which gains as every other key does.
    """
    p = pattern.to(torch.promote_types(pattern.dtype, torch.float32))
    change = _scores_hook(torch.zeros_like(p[:, :1]), hook, state=state, plants=plants)
    factor = change.exp()
    planted = p * factor
    total = planted.sum(-1, keepdim=True) + (1 - p.sum(-1, keepdim=True)).clamp_min(0)
    rows = (factor < 1).any(-1, keepdim=True)
    return torch.where(rows, planted / total, p).to(pattern.dtype)
