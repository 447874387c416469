"""Run a model's attention through a function of ours, and put everything back.

A plain transformers model needs one switch: `config._attn_implementation` names the attention function of
every layer, which transformers looks up in `AttentionInterface` and hands the attention module. The function
registered here finds what is installed through the module's configuration object, so several models can be
in use at once, and a backward pass on another thread (checkpointing on a GPU) finds it as well.

A TransformerBridge wraps the same modules in components that fire hooks, and most of its attention
components compute attention themselves. While installed:

1. such a component fires `hook_in`, calls the transformers attention module that it wraps, and fires
   `hook_out`. The projections inside that module are hooked `LinearBridge`s already, so hook_q, hook_k,
   hook_v and hook_z fire;
2. where transformers has one joint QKV projection, which the bridge has split into three, the module's
   projection is replaced by one that calls the bridge's three and puts their outputs into the joint order.
   That order is read off the bridge's own splitting function: it is given weights that are numbered by row;
3. every other hook point of the component does not exist on this path. A hook on one of them is a reason to
   refuse; or, if there is an `eager` way, that layer takes it for as long as somebody listens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from stepflow_tl.errors import FusedRefusal
from stepflow_tl.models.attention_calls import AttentionCalls, PlainAttention
from stepflow_tl.models.facts import class_names, computes_pattern_inside, is_bridge, wrapped_model
from stepflow_tl.models.passes import replaced_forward

# Components that hand over to the wrapped attention module: by name, since TransformerLens is not imported
# here.
_REIMPLEMENTING = "PositionEmbeddingsAttentionBridge"
# Without its subclasses: a sparse one chooses keys, which no mask here can say.
_LATENT = "MLAAttentionBridge"
_JOINT = ("JointQKVPositionEmbeddingsAttentionBridge", "JointQKVAttentionBridge")
_DELEGATING = "AttentionBridge"
_LIVE_PROJECTIONS = ("q", "k", "v", "o")

_ACTIVE: dict[int, AttentionCalls] = {}


Eager = Callable[[int], AbstractContextManager[Any]]
"""What is put on while a layer computes attention itself, by layer."""


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


def refusal_reason(model: Any, *, may_listen: bool = False) -> str | None:
    """Why nothing can be installed in `model` as it is now; None where it can.

    Masks and per-call options are only known in the forward pass and may still raise `FusedRefusal` there.
    `may_listen` says that hooks on scores and the like are no reason.
    """
    try:
        transformers_model(model)
        for component in _attention_components(model):
            _check_component(component, may_listen)
    except FusedRefusal as refusal:
        return refusal.reason
    return None


@contextmanager
def installed(model: Any, calls: AttentionCalls, eager: Eager | None = None) -> Iterator[None]:
    """Run the attention of every layer of `model` through `calls` inside the block.

    Args:
        model: A transformers causal LM, or a TransformerBridge.
        calls: What computes attention.
        eager: What to put on a layer that computes attention itself because a hook listens where `calls` has
            no hook point; without it such a hook is refused.

    Raises:
        FusedRefusal: If the model's attention cannot be served; the message says why.
    """
    inner = transformers_model(model)
    orders: dict[tuple, Tensor | None] = {}
    with ExitStack() as stack:
        for layer, component in enumerate(_attention_components(model)):
            kind = _check_component(component, eager is not None)
            if kind == _DELEGATING:
                continue
            if kind in _JOINT:
                stack.enter_context(replaced_forward(*_split_projection(component, orders)))
            own_way = None if eager is None else (component.forward, eager, layer)
            stack.enter_context(replaced_forward(component, _handing_over(component, own_way)))
        # Every transformers configuration object that some module of the model reads.
        configs = (module.__dict__.get("config") for module in inner.modules())
        found = {id(c): c for c in configs if hasattr(c, "_attn_implementation_internal")}
        stack.enter_context(_switched(calls, list(found.values())))
        yield


@contextmanager
def without_scores(model: Any) -> Iterator[None]:
    """Plain attention that forms no scores inside the block, for layers where nobody listens at them.

    A model that cannot be switched stays as it is.
    """
    if refusal_reason(model, may_listen=True) is None:
        with installed(model, PlainAttention(), lambda layer: nullcontext()):
            yield
    else:
        yield


@contextmanager
def _switched(calls: AttentionCalls, configs: list[Any]) -> Iterator[None]:
    """Let these configuration objects name `calls` as their attention.

    Raises:
        FusedRefusal: If one of them is in use already: the model is being run elsewhere.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(calls.name, _attention)
    AttentionMaskInterface.register(calls.name, type(calls).mask)
    if any(id(config) in _ACTIVE for config in configs):
        raise FusedRefusal("another run of the same model is under way")
    before = [config._attn_implementation_internal for config in configs]
    try:
        for config in configs:
            _ACTIVE[id(config)] = calls
            # The public setter also rewrites nested configurations, which could not be restored one by one.
            config._attn_implementation_internal = calls.name
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            _ACTIVE.pop(id(config), None)
            config._attn_implementation_internal = implementation


def _attention(module: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    calls = _ACTIVE.get(id(module.config))
    if calls is None:
        raise FusedRefusal(f"{type(module).__name__} was called outside the run that switched its attention")
    return calls.attend(module, *args, **kwargs)


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


def _check_component(component: Any, may_listen: bool) -> str:
    """The kind of a bridge's attention component, once nothing speaks against handing over."""
    names = class_names(component)
    config = component.config
    for flag in ("use_split_qkv_input", "use_attn_in", "use_attn_result"):
        if getattr(config, flag, False):
            raise FusedRefusal(f"`cfg.{flag}` is set, and those hook points do not exist on this path")
    for name, hook in _silent_points(component):
        if not may_listen and (hook.fwd_hooks or hook.bwd_hooks):
            raise FusedRefusal(
                f"a hook is attached at {component.name}.{name}, which does not exist on this path: "
                "scores and pattern are never formed, and the wrapped module makes queries and keys"
            )
    if computes_pattern_inside(component.original_component):
        raise FusedRefusal("TransformerLens' native attention does not use transformers' attention interface")
    if _REIMPLEMENTING in names:
        return _REIMPLEMENTING
    if names[0] in (*_JOINT, _LATENT, _DELEGATING):
        return names[0]
    raise FusedRefusal(f"attention components of type {names[0]} are not known here")


def _silent_points(component: Any) -> Iterator[tuple[str, Any]]:
    """The component's hook points that do not fire once it hands over.

    Its projections fire where the wrapped module calls them. It does not call all of them everywhere: GPT-2's
    has an output projection of its own.
    """
    called = {id(module) for module in component.original_component.modules()}
    split = class_names(component)[0] in _JOINT  # q, k and v are called in place of the joint projection
    for name, hook in component.named_modules():
        if "_original_component" in name or not hasattr(hook, "fwd_hooks"):
            continue
        part = name.rpartition(".")[0]
        fires = part in _LIVE_PROJECTIONS and (
            id(component._modules[part]) in called or split and part != "o"
        )
        if name not in ("hook_in", "hook_out") and not fires:
            yield name, hook


def _handing_over(
    component: Any, own_way: tuple[Callable[..., Any], Eager, int] | None
) -> Callable[..., Any]:
    """A forward that lets the wrapped attention module do the work, between hook_in and hook_out.

    With an own way, it is taken while somebody listens at a point that would not fire.
    """
    points = [] if own_way is None else [point for _, point in _silent_points(component)]

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if own_way is not None and any(point.fwd_hooks or point.bwd_hooks for point in points):
            compute, eager, layer = own_way
            with eager(layer):
                return compute(hidden_states, *args, **kwargs)
        output = component.original_component(component.hook_in(hidden_states), *args, **kwargs)
        output = output[0] if isinstance(output, tuple) else output
        return component.hook_out(output), None

    return forward


def _split_projection(
    component: Any, orders: dict[tuple, Tensor | None]
) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """The wrapped module's joint QKV projection, and a forward for it that calls the bridge's q, k and v."""
    attention = component.original_component
    name = component.submodules["qkv"].name
    projection = attention._modules[name]
    key = (type(attention), projection.weight.shape)
    if key not in orders:
        orders[key] = _joint_order(component, attention, name)
    order = orders[key]

    def forward(hidden: Tensor) -> Tensor:
        joint = torch.cat([component.q(hidden), component.k(hidden), component.v(hidden)], dim=-1)
        return joint if order is None else joint[..., order.to(joint.device)]

    return projection, forward


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
