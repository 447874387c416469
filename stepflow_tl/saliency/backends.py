"""Which backend computes a map, and what it says about that.

1. `"fused"`: exact in O(T) memory, wherever attention goes through transformers' attention interface.
2. `"hooks"`: the reference, wherever there is a pattern hook; holds the T x T patterns of all layers.
3. `"layerwise"`: the same with the patterns of one layer at a time, for one more forward pass; hooks inside
   blocks fire twice.
4. `"auto"`: fused where it can be exact, else hooks; the reason for falling back goes into the provenance.

Hooks on scores or patterns need those tensors to exist, so they alone make `"auto"` choose `"hooks"`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from jaxtyping import Float, Int
from torch import Tensor

from stepflow_tl.models.facts import is_transformerlens
from stepflow_tl.models.hook_names import resolve_hooks
from stepflow_tl.models.hooking import NamedHook, attached
from stepflow_tl.saliency.fused.refusal import FusedRefusal
from stepflow_tl.saliency.hooks_backend import hooks_backend
from stepflow_tl.saliency.objectives import Objective

Backend = Literal["auto", "hooks", "fused", "layerwise"]


@dataclass(frozen=True)
class BackendRun:
    """The sums and the story of how they came about.

    Attributes:
        sums: Step sums on the CPU; the last key bin is TEMPLATE.
        backend: The backend that ran.
        notes: Facts for the provenance.
    """

    sums: Float[Tensor, "layer head query_step key_bin"]
    backend: str
    notes: dict[str, str]


def run_backend(
    backend: Backend,
    model: Any,
    tokens: Int[Tensor, " token"],
    step_ids: Int[Tensor, " token"],
    objective: Objective,
    layers: tuple[int, ...],
    *,
    checkpoint: bool = False,
    block_divisor: int = 1,
    hooks: Sequence[NamedHook] = (),
) -> BackendRun:
    """Run `backend`, or the best one that holds where it is `"auto"`.

    `hooks` are on the model while the map is computed and while it is asked whether fused can serve it, but
    not during the self-check: they know the trace's positions, and the check runs on a few tokens.

    Raises:
        ModelError: If the backend asked for cannot serve the model, with the reason.
        ValueError: If `backend` is unknown, or `checkpoint` or `block_divisor` goes with the hooks backend.
    """
    from stepflow_tl.saliency.self_check import check_per_token

    if backend not in get_args(Backend):
        raise ValueError(f"unknown backend {backend!r}: expected one of {', '.join(get_args(Backend))}")
    if backend in ("hooks", "layerwise") and checkpoint:
        raise ValueError(f"checkpoint=True needs backend='fused': {backend!r} holds T x T patterns anyway")
    if block_divisor < 1 or (backend in ("hooks", "layerwise") and block_divisor > 1):
        raise ValueError(f"block_divisor is {block_divisor}: expected 1, or more with backend='fused'")
    notes: dict[str, str] = {}
    if backend in ("auto", "fused"):
        try:
            with attached(model, last=hooks):
                refuse_early(model)
            if objective.per_token:
                notes["self_check"] = check_per_token(model, tokens, "fused")
            fused = backend_function("fused")
            with attached(model, last=hooks):
                sums = fused(
                    model,
                    tokens,
                    step_ids,
                    objective,
                    layers,
                    checkpoint=checkpoint,
                    block_divisor=block_divisor,
                )
            if checkpoint or block_divisor > 1:
                notes["memory"] = f"checkpoint={checkpoint}, block_divisor={block_divisor}"
            return BackendRun(sums, "fused", notes)
        except FusedRefusal as refusal:
            if backend == "fused" or checkpoint or block_divisor > 1 or not is_transformerlens(model):
                raise
            notes = {"not_fused": refusal.reason}
    resolve_hooks(model, None if objective.per_token else layers)
    name = "layerwise" if backend == "layerwise" else "hooks"
    if objective.per_token:
        notes["self_check"] = check_per_token(model, tokens, name)
    with attached(model, last=hooks):
        sums = backend_function(name)(model, tokens, step_ids, objective, layers)
    return BackendRun(sums, name, notes)


def refuse_early(model: Any) -> None:
    """Refuse what can be told from model and hooks alone, before any forward pass.

    Raises:
        FusedRefusal: With the reason.
    """
    from stepflow_tl.saliency.fused.install import refusal_reason

    reason = refusal_reason(model)
    if reason is not None:
        raise FusedRefusal(reason)


def backend_function(name: str) -> Callable[..., Tensor]:
    """The function behind a backend's name; fused imports transformers, so each is imported when needed.

    All take `(model, tokens, step_ids, objective, layers)` and return `[layer head query_step key_bin]`.
    """
    if name == "fused":
        from stepflow_tl.saliency.fused.run import fused_backend

        return fused_backend
    if name == "layerwise":
        from stepflow_tl.saliency.layerwise import layerwise_backend

        return layerwise_backend
    return hooks_backend
