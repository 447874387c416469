"""Run a model and leave it as it was.

`attached`, `frozen` and `replaced_forward` restore what they change, also after an exception; `whole_pass` is
one plain forward pass over a finished sequence.

The order of hooks matters, and `model.hooks(fwd_hooks=...)` always appends. What restores the path of a score
must run *before* a user's hook edits that score (autograd then carries the edit), what reads a finished
pattern must run *after*. So `attached` prepends the hooks in `first` and appends those in `last`; on exit it
removes each handle that it added and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from stepflow_tl.models.facts import is_bridge, wrapped_model

NamedHook = tuple[str, Callable[..., Any]]
"""Name of a hook point and a hook `(tensor, hook) -> tensor or None`, as `fwd_hooks` of TransformerLens."""

_MISSING = object()


def model_device(model: Any) -> torch.device:
    """Device where token ids enter the model."""
    parameter = next(iter(model.parameters()), None)
    return torch.device(model.cfg.device or "cpu") if parameter is None else parameter.device


@contextmanager
def attached(
    model: Any, *, first: Sequence[NamedHook] = (), last: Sequence[NamedHook] = ()
) -> Iterator[None]:
    """Attach forward hooks for the time of the context, before (`first`) or after those now at their points.

    Raises:
        KeyError: If a name is not in `model.hook_dict`.
    """
    added: list[tuple[Any, Any]] = []
    try:
        for named_hooks, prepend in ((first, True), (last, False)):
            for name, function in named_hooks:
                point = model.hook_dict[name]
                point.add_hook(function, dir="fwd", prepend=prepend)
                added.append((point, point.fwd_hooks[0 if prepend else -1]))
        yield
    finally:
        for point, handle in added:
            handle.hook.remove()
            point.fwd_hooks[:] = [other for other in point.fwd_hooks if other is not handle]


@contextmanager
def frozen(model: Any) -> Iterator[None]:
    """Evaluation mode and no parameter gradients inside; all as before on exit, also by an exception."""
    live = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Not model.eval(), which sets every module of a bridge, several times over. What a bridge wraps is not
    # among its own modules.
    parts = dict.fromkeys([*model.modules(), *wrapped_model(model).modules()])
    training = [module for module in parts if module.training]
    try:
        for parameter in live:
            parameter.requires_grad_(False)
        for module in training:
            module.training = False
        yield
    finally:
        for parameter in live:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let calls of `module` run `forward` inside the block.

    The replacement goes into the instance's own dictionary, since a bridge component hands attributes on to
    the module that it wraps.
    """
    before = module.__dict__.get("forward", _MISSING)
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if before is _MISSING:
            module.__dict__.pop("forward", None)
        else:
            module.__dict__["forward"] = before


def whole_pass(model: Any, tokens: Int[Tensor, " token"]) -> Float[Tensor, "token vocabulary"]:
    """Logits of a plain forward pass."""
    options = {}
    if not is_bridge(model):
        # Every token of a trace counts; with left padding, TransformerLens would look for padding by itself.
        options["attention_mask"] = torch.ones_like(tokens[None])
    return model(tokens[None], return_type="logits", **options)[0]
