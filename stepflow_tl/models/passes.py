"""Running a model without leaving a trace on it.

`frozen` and `replaced_forward` restore what they change, also after an exception; `whole_pass` is one plain
forward pass over a finished sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from stepflow_tl.models.facts import is_bridge

_MISSING = object()


def model_device(model: Any) -> torch.device:
    """Device where token ids enter the model."""
    parameter = next(iter(model.parameters()), None)
    return torch.device(model.cfg.device or "cpu") if parameter is None else parameter.device


@contextmanager
def frozen(model: Any) -> Iterator[None]:
    """Evaluation mode and no parameter gradients inside; all as before on exit, also by an exception."""
    live = [parameter for parameter in model.parameters() if parameter.requires_grad]
    training = [module for module in model.modules() if module.training]
    try:
        for parameter in live:
            parameter.requires_grad_(False)
        model.eval()
        yield
    finally:
        for parameter in live:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let calls of `module` run `forward` inside the block."""
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
