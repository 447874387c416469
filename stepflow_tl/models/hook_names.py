"""Every TransformerLens hook name this package uses, resolved once per model.

Nothing here imports a model class: a model is anything with `hook_dict`, `hooks(fwd_hooks=...)`, `cfg` and
`blocks`, which TransformerBridge (4.x) and HookedTransformer (3.9) both have.

Five facts of TransformerLens are dealt with here and nowhere else:

1. A name may be an alias (`blocks.0.attn.hook_z` is `blocks.0.attn.o.hook_in` on a bridge). In compatibility
   mode a hook attached by its alias is called once per name, so a hook that adds something would add it
   twice. Names are therefore resolved to the hook point's own name.
2. `hook_rot_q` / `hook_rot_k` exist but never fire behind a joint QKV projection (Phi-3), nor where a module
   computes attention inside (the TL-native source). There the unrotated query and key serve: rotation cancels
   in the product of a token's query with its own key, and that product is all the diagonal needs.
3. Where attention is delegated, `hook_attn_scores` fires after the fact and an edit there changes nothing.
4. Latent attention (DeepSeek, GLM-4.7-Flash) rotates only a part of each head: `hook_rot_k` is that part, and
   `hook_k` the whole key as it meets the queries. HunYuan normalises after it rotates: `hook_k_normed` is the
   whole key there.
5. Queries, keys (rotated or not) and values reach a hook as `[batch, pos, head, d_head]` in both generations,
   but those of point 4 as `[batch, head, pos, d_head]`, which the hook point says itself (`pos_dim`). z is
   `[batch, pos, head, d_head]`, but latent attention splits it by the width of the rotated part, which is no
   head. `by_heads` gives a hook one layout everywhere.

A hybrid model has layers without attention (state-space, convolution, linear attention). Its other layers can
still be mapped and edited: only the layers that are asked for need a pattern.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any

from stepflow_tl.errors import ModelError
from stepflow_tl.models.facts import (
    class_names,
    computes_pattern_inside,
    delegates_attention,
    original_attention,
)

#: Activations of one layer that two forward passes can exchange, by TransformerLens' own short names.
COMPONENTS = {
    "resid_pre": "blocks.{layer}.hook_resid_pre",
    "resid_post": "blocks.{layer}.hook_resid_post",
    "attn_out": "blocks.{layer}.hook_attn_out",
    "mlp_out": "blocks.{layer}.hook_mlp_out",
    "k": "blocks.{layer}.attn.hook_k",
    "v": "blocks.{layer}.attn.hook_v",
    "z": "blocks.{layer}.attn.hook_z",
}

_BLOCK = re.compile(r"^blocks\.(\d+)\.")
_HEADS_FIRST = 2  # position axis of `[batch, head, pos, d_head]`
# Parts of a block that mix no positions, by the beginnings of their names.
_LOCAL_PARTS = ("hook_", "_", "ln", "mlp", "norm", "moe", "shared_mlp", "pre_ln", "channel_mix")


@dataclass(frozen=True)
class LayerHooks:
    """Names of one layer's hook points; each is the hook point's own name, never an alias.

    Attributes:
        layer: Layer index.
        query: Query that meets the keys (rotated where there is rotation), or None if there is no such hook.
        key: Key that meets the queries, or None.
        value: Value, `[batch, pos, kv_head, d_head]`.
        scores: Pre-softmax scores, `[batch, head, query, key]`, or None where they cannot be edited.
        pattern: Post-softmax pattern, `[batch, head, query, key]`.
        z: Weighted values, `[batch, pos, head, d_head]`.
    """

    layer: int
    query: str | None
    key: str | None
    value: str | None
    scores: str | None
    pattern: str
    z: str | None


@dataclass(frozen=True)
class ModelHooks:
    """All hook points of a model that this package touches.

    Attributes:
        embed: Token embedding output, where the residual stream begins.
        layers: One entry per layer, in order.
    """

    embed: str
    layers: tuple[LayerHooks, ...]


def resolve_hooks(model: Any, layers: Sequence[int] | None = None) -> ModelHooks:
    """Find the hook points of `model`.

    Args:
        model: A TransformerLens model.
        layers: Layers whose hook points are needed; all by default.

    Raises:
        ModelError: If `model` is not a TransformerLens model, or one of these layers has no
            `attn.hook_pattern` (a state-space or convolution layer, or an attention that does not expose its
            pattern); the message names the layer, what it mixes positions with, and the layers that have one.
    """
    for attribute in ("hook_dict", "hooks", "cfg", "blocks"):
        if not hasattr(model, attribute):
            raise ModelError(
                f"{type(model).__name__} has no `{attribute}`: expected a TransformerLens model. Wrap it "
                "with TransformerBridge.boot_transformers(name, hf_model=..., tokenizer=...)."
            )
    names = {name: point.name or name for name, point in model.hook_dict.items()}
    embed = names.get("hook_embed") or names.get("embed.hook_out")
    if embed is None:
        raise ModelError(
            "the model has no `hook_embed`: saliency needs the point where the residual stream begins."
        )
    wanted = range(int(model.cfg.n_layers)) if layers is None else layers
    return ModelHooks(embed=embed, layers=tuple(_resolve_layer(model, names, layer) for layer in wanted))


def by_heads(model: Any, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` as a hook on queries, keys, values or z, always given `[batch, pos, head, d_head]`."""
    if getattr(model.hook_dict[name], "pos_dim", None) == _HEADS_FIRST:

        @wraps(function)
        def transposed(tensor: Any, hook: Any) -> Any:
            found = function(tensor.transpose(1, 2), hook)
            return None if found is None else found.transpose(1, 2)

        return transposed
    layer = layer_of(name)
    own_z = getattr(model.hook_dict.get(f"blocks.{layer}.attn.hook_z"), "name", None)
    if name != own_z or "MLAAttentionBridge" not in class_names(model.blocks[layer].attn):
        return function

    @wraps(function)
    def regrouped(tensor: Any, hook: Any) -> Any:
        found = function(tensor.reshape(*tensor.shape[:2], int(model.cfg.n_heads), -1), hook)
        return None if found is None else found.reshape(tensor.shape)

    return regrouped


def component_hook(model: Any, component: str, layer: int) -> str:
    """The own name of the hook point of one of `COMPONENTS` in one layer.

    Raises:
        ValueError: If `component` is unknown.
        ModelError: If the layer has no such hook point, or one that is not laid out by position.
    """
    if component not in COMPONENTS:
        raise ValueError(f"unknown component {component!r}: expected one of {', '.join(COMPONENTS)}")
    name = COMPONENTS[component].format(layer=layer)
    if name not in getattr(model, "hook_dict", {}):
        raise ModelError(
            f"the model has no `{name}`: choose another component than {component!r}, or leave layer {layer} "
            "out with layers=[...]"
        )
    if getattr(model.hook_dict[name], "pos_dim", None) == _HEADS_FIRST:
        raise ModelError(
            f"`{name}` comes as [batch, head, pos, d_head], after rotation (latent attention): {component!r} "
            "cannot be exchanged by position. Choose 'resid_pre', 'attn_out' or 'z'."
        )
    return model.hook_dict[name].name or name


def refuse_delegated(model: Any, hooks: LayerHooks, advice: str) -> None:
    """Refuse a layer whose scores' hook point fires after the fact, where an edit would be discarded.

    Raises:
        ModelError: With `advice` at its end: what to do instead.
    """
    if hooks.scores is not None and delegates_attention(model, hooks.layer):
        raise ModelError(
            f"layer {hooks.layer}: {type(model.blocks[hooks.layer].attn).__name__} leaves attention to the "
            f"wrapped module, so an edit of its scores would be discarded. {advice}"
        )


def hook_counts(model: Any) -> dict[str, int]:
    """Number of hooks attached at each hook point that has any: what must be equal before and after."""
    counts = {
        name: len(point._forward_hooks) + len(point._backward_hooks)
        for name, point in model.hook_dict.items()
    }
    return {name: count for name, count in counts.items() if count}


def layer_of(hook_name: str) -> int:
    """Layer index in a name such as `blocks.7.attn.hook_pattern`; a ValueError if it has none."""
    match = _BLOCK.match(hook_name)
    if match is None:
        raise ValueError(f"hook name {hook_name!r} has no layer: expected `blocks.<layer>.…`")
    return int(match.group(1))


def _resolve_layer(model: Any, names: dict[str, str], layer: int) -> LayerHooks:
    prefix = f"blocks.{layer}.attn."
    pattern = names.get(prefix + "hook_pattern")
    if pattern is None:
        raise ModelError(_no_pattern(model, names, layer))
    kinds = class_names(model.blocks[layer].attn)
    computed_inside = computes_pattern_inside(original_attention(model, layer))
    whole_unrotated = any(kind.startswith("JointQKV") or kind == "MLAAttentionBridge" for kind in kinds)
    rotated = prefix + "hook_rot_k" in names and not computed_inside and not whole_unrotated
    query, key = ("hook_rot_q", "hook_rot_k") if rotated else ("hook_q", "hook_k")
    if getattr(model.cfg, "qk_norm_after_rope", False) and prefix + "hook_k_normed" in names:
        query, key = "hook_q_normed", "hook_k_normed"
    return LayerHooks(
        layer=layer,
        query=names.get(prefix + query),
        key=names.get(prefix + key),
        value=names.get(prefix + "hook_v"),
        scores=None if computed_inside else names.get(prefix + "hook_attn_scores"),
        pattern=pattern,
        z=names.get(prefix + "hook_z"),
    )


def _no_pattern(model: Any, names: dict[str, str], layer: int) -> str:
    """Why a layer cannot be served, and which layers can."""
    parts = getattr(model.blocks[layer], "_modules", {})
    mixers = [f"`{name}`" for name in parts if not name.startswith(_LOCAL_PARTS)]
    what = f"it mixes positions with {', '.join(mixers)}" if mixers else "it is not an attention layer"
    others = [n for n in range(int(model.cfg.n_layers)) if f"blocks.{n}.attn.hook_pattern" in names]
    advice = (
        f"Layers {', '.join(map(str, others))} have one: choose among them with layers=[...] (shallow=[...] "
        "and deep=[...] of a StepFlow), and an ordinary objective such as 'response'; 'per_token' needs all."
        if others
        else "No layer of this model has one."
    )
    return (
        f"layer {layer} has no `blocks.{layer}.attn.hook_pattern`: {what}, and does not expose an attention "
        f"pattern, which Step-Saliency reads. {advice}"
    )
