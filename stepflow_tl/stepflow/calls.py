"""StepFlow inside attention calls: for passes in which nobody forms scores, on any transformers model.

1. A layer of the bridge: the call computes plain attention with its logsumexp, and `bridged` turns its output
   into that under the bridge (`bridged_attention`).
2. A layer of momentum, on a model without hook points: the call's values are kept and z is moved, by the same
   functions that serve as hooks (`momentum`). On a model with hook points they stay hooks, which go with the
   calls as `hooks`: the points of values and z live on this path too.

Which tokens queries and keys are says the `FlowState`, as everywhere; a call gives the number of its keys.

Memory: values of the momentum layers as in `momentum`; where the call hands over a whole KV cache, a copy of
what the pass added, since a view would keep the cache alive.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from stepflow_tl.errors import ModelError
from stepflow_tl.models.attention import Call, ScoreShift
from stepflow_tl.models.attention_calls import UNSERVED, PlainAttention
from stepflow_tl.models.passes import NamedHook
from stepflow_tl.stepflow.bridged_attention import Bridge, BridgedRows, bridged_attention
from stepflow_tl.stepflow.report import FlowReport
from stepflow_tl.stepflow.state import FlowState, Granularity, QuerySpan


class Momentum(NamedTuple):
    """What momentum does in one layer: the two hooks of `stepflow.momentum`, their options filled in."""

    capture: Callable[[Tensor, Any], None]
    inject: Callable[[Tensor, Any], Tensor]


@dataclass(frozen=True)
class FlowCalls:
    """What StepFlow does in the attention calls of a run.

    Attributes:
        state: Which tokens the queries and keys of the current pass are.
        report: Where it is counted.
        bridges: The bridge of each layer that has one; its heads lie on the CPU.
        granularity: What the groups of keys are, see `stepflow.state`.
        placebo_seed: If given, the bridge is its control.
        momenta: Momentum of each layer that gets it inside the call.
        hooks: What is to be attached to the model's hook points beside it.
        shifts: What changes a layer's scores before its bridge, made for a number of keys and a device.
    """

    state: FlowState
    report: FlowReport
    bridges: Mapping[int, Bridge] = field(default_factory=dict)
    granularity: Granularity = "segment"
    placebo_seed: int | None = None
    momenta: Mapping[int, Momentum] = field(default_factory=dict)
    hooks: Sequence[NamedHook] = ()
    shifts: Mapping[int, Callable[[int, Any], ScoreShift | None]] = field(default_factory=dict)

    def bridge_of(self, layer: int, device: torch.device | str = "cpu") -> Bridge | None:
        """The bridge of a layer, on the device of its call; None where it has none."""
        bridge = self.bridges.get(layer)
        if bridge is None or bridge.heads is None or bridge.heads.device == torch.device(device):
            return bridge
        return Bridge(bridge.tau_max, bridge.max_bridge_share, bridge.heads.to(device))

    def spans(self, n_keys: int, device: torch.device | str = "cpu") -> tuple[QuerySpan, ...]:
        """Queries of this pass and their groups of keys, in a layer with so many keys."""
        return self.state.spans(
            n_keys, self.granularity, placebo_seed=self.placebo_seed, device=torch.device(device)
        )

    def bridged(
        self, layer: int, call: Call, kept: BridgedRows | None = None
    ) -> Float[Tensor, "batch head query d_value"]:
        """The output of the layer's call under its bridge; the same tensor where nothing changes.

        Raises:
            ModelError: If the pass is not the one that `state` describes.
        """
        bridge = self.bridge_of(layer, call.z.device)
        if bridge is None:
            return call.z
        n_rows, _, n_queries, _ = call.query.shape
        self.state.check_shape(n_rows, n_queries, _Place.of(layer, "z").name)
        spans = self.spans(call.key.shape[2], call.z.device)
        return bridged_attention(call, spans, bridge, counts=self.report.of(layer), kept=kept)

    def injected(
        self,
        layer: int,
        value: Float[Tensor, "batch kv_head key d_value"],
        z: Float[Tensor, "batch query head d_value"],
    ) -> Float[Tensor, "batch query head d_value"]:
        """The output of the layer's call, which has these values, with momentum; the same tensor without any.

        Raises:
            ModelError: If the pass is not the one that `state` describes, or values are missing.
        """
        momentum = self.momenta.get(layer)
        if momentum is None:
            return z
        own = value[:, :, value.shape[2] - z.shape[1] :]
        if own.shape != value.shape:
            own = own.clone()
        momentum.capture(own.transpose(1, 2), _Place.of(layer, "v"))
        return momentum.inject(z, _Place.of(layer, "z"))


class FlowAttention(PlainAttention):
    """Attention under StepFlow while a model generates: "sdpa", and the bridge in its layers."""

    name: ClassVar[str] = "stepflow_tl_flow"

    def __init__(self, calls: FlowCalls) -> None:
        """Attention that does what `calls` say."""
        self._calls = calls

    def needs_logsumexp(
        self, layer: int | None, query: Tensor, key: Tensor, arguments: Mapping[str, Any]
    ) -> bool:
        """Whether a bridge acts on queries of this call.

        Raises:
            ModelError: If the call wants what cannot be told apart by groups of keys.
        """
        if layer not in self._calls.bridges or not self._calls.spans(key.shape[2], query.device):
            return False
        _refuse_unserved(arguments, f"layer {layer}'s", "its bridge", "shallow")
        return True

    def shift(
        self, layer: int | None, query: Tensor, key: Tensor, arguments: Mapping[str, Any]
    ) -> ScoreShift | None:
        """What is planted in the layer.

        Raises:
            ModelError: As `needs_logsumexp`, or if the pass is not the one that the state describes.
        """
        if layer is None or layer not in self._calls.shifts:
            return None
        self._calls.state.check_shape(query.shape[0], query.shape[2], _Place.of(layer, "attn_scores").name)
        shift = self._calls.shifts[layer](key.shape[2], query.device)
        if shift is not None:
            _refuse_unserved(arguments, f"layer {layer}'s", "what is planted there", "layers")
        return shift

    def output(self, layer: int | None, call: Call) -> Tensor:
        """The call under its layer's bridge."""
        return call.z if layer is None else self._calls.bridged(layer, call)

    def finished(self, layer: int | None, value: Tensor, z: Tensor) -> Tensor:
        """The output with its layer's momentum."""
        return z if layer is None else self._calls.injected(layer, value, z)


def _refuse_unserved(arguments: Mapping[str, Any], whose: str, what: str, option: str) -> None:
    for name in UNSERVED:
        if arguments.get(name) is not None:
            raise ModelError(
                f"{whose} attention takes `{name}`, with which {what} cannot be "
                f"computed here: leave the layer out with {option}=[...]"
            )


class _Place(NamedTuple):
    """What hooks ask of a hook point."""

    name: str

    @classmethod
    def of(cls, layer: int, what: str) -> _Place:
        return cls(f"blocks.{layer}.attn.hook_{what}")
