"""Make a model's attention run through a `FusedSession`, and put everything back.

A plain transformers model needs one switch: `config._attn_implementation` names the attention function of
every layer.

A TransformerBridge wraps the same modules in components that fire hooks, and most of its attention
components compute attention themselves, scores and all. While installed:

1. such a component fires `hook_in`, calls the transformers attention module that it wraps, and fires
   `hook_out`. The projections inside that module are hooked `LinearBridge`s already, so hook_q, hook_k,
   hook_v and hook_z fire;
2. where transformers has one joint QKV projection, which the bridge has split into three, the module's
   projection is replaced by one that calls the bridge's three and puts their outputs into the joint order.
   That order is read off the bridge's own splitting function: it is given weights that are numbered by row;
3. every other hook point of the component does not exist on this path. A hook on one of them is a reason to
   refuse.

Forwards are replaced in an instance's `__dict__`, because a bridge component forwards attribute assignment
to the module it wraps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stepflow_tl.errors import FusedRefusal
from stepflow_tl.models.facts import class_names, computes_pattern_inside, is_bridge, wrapped_model
from stepflow_tl.models.passes import replaced_forward
from stepflow_tl.saliency.fused.session import IMPLEMENTATION, FusedSession, activate, deactivate

# Components that hand over to the wrapped attention module: by name, since TransformerLens is not imported
# here.
_REIMPLEMENTING = "PositionEmbeddingsAttentionBridge"
_LATENT = (
    "MLAAttentionBridge"  # without its subclasses: a sparse one chooses keys, which no mask here can say
)
_JOINT = ("JointQKVPositionEmbeddingsAttentionBridge", "JointQKVAttentionBridge")
_DELEGATING = "AttentionBridge"
_LIVE_PROJECTIONS = ("q", "k", "v", "o")


def transformers_model(model: Any) -> Any:
    """The transformers model: `model` itself, or the one that a TransformerBridge wraps.

    Raises:
        FusedRefusal: If there is none, or it does not look its attention functions up in
            `AttentionInterface`.
    """
    inner = wrapped_model(model)
    config = getattr(inner, "config", None)
    if not isinstance(inner, nn.Module) or not hasattr(config, "_attn_implementation"):
        raise FusedRefusal(f"{type(model).__name__} is not, and does not wrap, a transformers model")
    supports = getattr(inner, "_can_set_attn_implementation", None)
    if supports is not None and not supports():
        raise FusedRefusal(f"{type(inner).__name__} does not use transformers' attention interface")
    return inner


def refusal_reason(model: Any) -> str | None:
    """Why the fused backend cannot serve `model` as it is now, hooks included; None where it can.

    Masks and per-call options are only known in the forward pass and may still raise `FusedRefusal` there.
    """
    try:
        transformers_model(model)
        for component in _attention_components(model):
            _check_component(component)
    except FusedRefusal as refusal:
        return refusal.reason
    return None


@contextmanager
def installed(model: Any, session: FusedSession) -> Iterator[None]:
    """Run the attention of every layer of `model` through `session` inside the block.

    Raises:
        FusedRefusal: If the model's attention cannot be served; the message says why.
    """
    inner = transformers_model(model)
    components = _attention_components(model)
    orders: dict[tuple, Tensor | None] = {}
    with ExitStack() as stack:
        for component in components:
            kind = _check_component(component)
            if kind == _DELEGATING:
                continue
            if kind in _JOINT:
                stack.enter_context(_joint_projection(component, orders))
            stack.enter_context(replaced_forward(component, _handing_over(component)))
        configs = _attention_configs(inner)
        activate(session, configs)
        stack.callback(deactivate, configs)
        for config in configs:
            stack.enter_context(_switched(config))
        yield


@contextmanager
def _switched(config: Any) -> Iterator[None]:
    # The public setter also rewrites nested configurations, which could then not be restored one by one.
    before = config._attn_implementation_internal
    config._attn_implementation_internal = IMPLEMENTATION
    try:
        yield
    finally:
        config._attn_implementation_internal = before


def _attention_configs(inner: nn.Module) -> list[Any]:
    """Every transformers configuration object that some module of the model reads."""
    found = {}
    for module in inner.modules():
        config = module.__dict__.get("config")
        if hasattr(config, "_attn_implementation_internal"):
            found[id(config)] = config
    return list(found.values())


def _attention_components(model: Any) -> list[Any]:
    """A bridge's attention components; none for a plain transformers model."""
    if not is_bridge(model):
        return []
    blocks = getattr(model, "blocks", None)
    if blocks is None:
        raise FusedRefusal("the bridge has no `blocks`")
    found = []
    for layer, block in enumerate(blocks):
        component = getattr(block, "_modules", {}).get("attn")
        if component is None:
            raise FusedRefusal(f"layer {layer} has no attention component (`blocks.{layer}.attn`)")
        found.append(component)
    return found


def _check_component(component: Any) -> str:
    """The kind of a bridge's attention component, once nothing speaks against handing over."""
    names = class_names(component)
    config = component.config
    for flag in ("use_split_qkv_input", "use_attn_in", "use_attn_result"):
        if getattr(config, flag, False):
            raise FusedRefusal(f"`cfg.{flag}` is set, and those hook points do not exist on this path")
    for name, hook in _hook_points(component):
        owner = name.rpartition(".")[0]
        live = name in ("hook_in", "hook_out") or owner in _LIVE_PROJECTIONS
        if not live and (hook.fwd_hooks or hook.bwd_hooks):
            raise FusedRefusal(
                f"a hook is attached at {component.name}.{name}, which does not exist on this path: "
                "scores and pattern are never formed, and the wrapped module makes queries and keys"
            )
    if computes_pattern_inside(component.original_component):
        raise FusedRefusal("TransformerLens' native attention does not use transformers' attention interface")
    if _REIMPLEMENTING in names:
        return _REIMPLEMENTING
    if names[0] in (*_JOINT, _LATENT):
        return names[0]
    if names[0] == _DELEGATING:
        return _DELEGATING
    raise FusedRefusal(f"attention components of type {names[0]} are not known here")


def _hook_points(component: Any) -> Iterator[tuple[str, Any]]:
    for name, module in component.named_modules():
        if "_original_component" not in name and hasattr(module, "fwd_hooks"):
            yield name, module


def _handing_over(component: Any) -> Callable[..., tuple[Tensor, None]]:
    """A forward that lets the wrapped attention module do the work, between hook_in and hook_out."""

    def forward(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        if "hidden_states" in kwargs:
            hidden = kwargs.pop("hidden_states")
        else:
            hidden, args = args[0], args[1:]
        output = component.original_component(component.hook_in(hidden), *args, **kwargs)
        output = output[0] if isinstance(output, tuple) else output
        return component.hook_out(output), None

    return forward


@contextmanager
def _joint_projection(component: Any, orders: dict[tuple, Tensor | None]) -> Iterator[None]:
    """Let the wrapped module's joint QKV projection call the bridge's q, k and v."""
    attention = component.original_component
    name = component.submodules["qkv"].name
    key = (type(attention), attention._modules[name].weight.shape)
    if key not in orders:
        orders[key] = _joint_order(component, attention, name)
    order = orders[key]

    class SplitProjection(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            joint = torch.cat([component.q(hidden), component.k(hidden), component.v(hidden)], dim=-1)
            return joint if order is None else joint[..., order.to(joint.device)]

    before = attention._modules[name]
    attention._modules[name] = SplitProjection()
    try:
        yield
    finally:
        attention._modules[name] = before


def _joint_order(component: Any, attention: Any, name: str) -> Tensor | None:
    """Where each joint output channel is found in `[q, k, v]`; None if it is that order already."""
    joint = attention._modules[name]
    joint = getattr(joint, "original_component", None) or joint
    numbered = copy.copy(joint)
    numbered._parameters = dict(joint._parameters)
    weight = joint._parameters["weight"]
    channel_axis = 0 if isinstance(joint, nn.Linear) else 1  # GPT-2's Conv1D stores [in, out]
    n_channels = weight.shape[channel_axis]
    numbers = torch.arange(n_channels, dtype=torch.float32)
    shape = [-1, 1] if channel_axis == 0 else [1, -1]
    numbered._parameters["weight"] = nn.Parameter(
        numbers.view(shape).expand(weight.shape).contiguous(), False
    )
    if joint._parameters.get("bias") is not None:
        numbered._parameters["bias"] = nn.Parameter(numbers.clone(), False)
    probe = copy.copy(attention)
    probe._modules = {**attention._modules, name: numbered}
    parts = [part.weight.detach()[:, 0] for part in component.split_qkv_matrix(probe)]
    found = torch.cat(parts).round().long()
    if len(found) != n_channels or not torch.equal(found.sort().values, torch.arange(n_channels)):
        raise FusedRefusal(f"{component.name}: the joint projection is not a rearrangement of q, k and v")
    order = found.argsort()
    return None if torch.equal(order, torch.arange(n_channels)) else order
