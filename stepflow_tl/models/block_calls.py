"""Run a model block by block: record every block's call once, run one block again, run the tail alone.

1. `record_blocks` runs the model's own forward pass up to the last block and keeps, for each block, the
   arguments it was called with: the residual that enters it, and the masks and position tables that all
   blocks share. Each block begins a graph of its own, which ends with the block, so no two blocks' graphs
   live at a time, and a user's hook may still call `tensor.register_hook`.
2. `BlockCall.run` calls the same block again with the same arguments and a residual of the caller's choice.
   Hooks fire as in the forward pass, since they sit inside the block.
3. `run_tail` runs the model's own forward pass with all blocks passed over and a given residual in place of
   the last block's output: final norm, unembedding, and whatever scale or soft-cap the model puts there.

Nothing here knows an architecture: masks, ALiBi, rotary tables and shortformer's position embeddings come
back as the model itself made them. What cannot be served is refused: blocks that hand each other more than
the residual (shared keys and values), and blocks that run more than once in a forward pass.
A KV cache has no use in a pass over the whole trace and would grow in the second pass; it is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from stepflow_tl.errors import ModelError
from stepflow_tl.models.passes import replaced_forward


@dataclass(frozen=True)
class BlockCall:
    """One block and the arguments of its call in the forward pass.

    Attributes:
        block: The block module.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        where: Position or name of the residual among them.
    """

    block: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    where: int | str

    @property
    def residual(self) -> Float[Tensor, "batch token d_model"]:
        """The residual that enters the block."""
        return self.args[self.where] if isinstance(self.where, int) else self.kwargs[self.where]

    def with_residual(self, residual: Float[Tensor, "batch token d_model"]) -> BlockCall:
        """The same call on another residual."""
        if isinstance(self.where, int):
            args = (*self.args[: self.where], residual, *self.args[self.where + 1 :])
            return replace(self, args=args)
        return replace(self, kwargs={**self.kwargs, self.where: residual})

    def run(self, residual: Float[Tensor, "batch token d_model"]) -> Float[Tensor, "batch token d_model"]:
        """The residual that leaves the block, given the one that enters it."""
        # A copy, because a hook may write into it, which autograd forbids on a leaf.
        call = self.with_residual(residual.clone())
        return _first(self.block(*call.args, **call.kwargs))


@dataclass(frozen=True)
class RecordedBlocks:
    """What one forward pass leaves behind.

    Attributes:
        calls: Calls by layer, from the lowest layer asked for to the last.
        final_residual: What the last block put out.
        output_sizes: Per block, the length of the tuple it returned, or None for a bare tensor.
    """

    calls: dict[int, BlockCall]
    final_residual: Float[Tensor, "batch token d_model"]
    output_sizes: tuple[int | None, ...]


def record_blocks(model: Any, tokens: Int[Tensor, "batch token"], lowest: int = 0) -> RecordedBlocks:
    """One forward pass up to the last block, keeping the residual that enters each block.

    Args:
        model: A TransformerLens model with frozen parameters; grad mode must be on.
        tokens: Token ids on the model's device.
        lowest: First layer whose call is kept.

    Raises:
        ModelError: If a block does not run exactly once, or blocks hand on more than the residual.

    Memory: `O(L T d_model)` kept, and one block's graph at a time.
    """
    recorder = _Recorder(len(model.blocks), lowest)
    handles = []
    try:
        for layer, block in enumerate(model.blocks):
            enter = partial(recorder.enter, layer=layer)
            handles.append(block.register_forward_pre_hook(enter, prepend=True, with_kwargs=True))
            handles.append(block.register_forward_hook(partial(recorder.leave, layer=layer)))
        try:
            model(tokens, return_type="logits")
        except _LastBlockDone:
            pass
    finally:
        for handle in handles:
            handle.remove()
    return recorder.result()


def run_tail(
    model: Any,
    recorded_sizes: tuple[int | None, ...],
    tokens: Int[Tensor, "batch row"],
    residual: Float[Tensor, "batch row d_model"],
) -> Float[Tensor, "batch row vocabulary"]:
    """Logits of some rows of the final residual, by the model's own final norm and unembedding.

    Args:
        model: The model.
        recorded_sizes: `RecordedBlocks.output_sizes`.
        tokens: As many token ids as there are rows; their embedding is computed and dropped.
        residual: Rows of the final residual, in any order: norm and unembedding work on each by itself.
    """
    with _passed_over(model, recorded_sizes, residual):
        return model(tokens, return_type="logits")


class _LastBlockDone(Exception):
    """Ends a forward pass before logits of `[T, vocabulary]` are made."""


class _Recorder:
    def __init__(self, n_layers: int, lowest: int) -> None:
        self._n_layers = n_layers
        self._lowest = lowest
        self._entered: list[int] = []
        self._calls: dict[int, BlockCall] = {}
        self._sizes: list[int | None] = []
        self._final: Tensor | None = None

    def enter(self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, layer: int) -> Any:
        self._entered.append(layer)
        if layer != len(self._entered) - 1:
            raise ModelError(
                f"blocks ran in the order {self._entered}: expected each once, from the first to the last. "
                "Running it block by block cannot serve this model; use backend='hooks'."
            )
        call = _without_cache(_find_residual(block, args, kwargs, layer))
        call = call.with_residual(call.residual.detach())
        _refuse_side_channels(call, layer)
        if layer >= self._lowest:
            self._calls[layer] = call
        inner = call.with_residual(call.residual.clone().requires_grad_(True).clone())
        return inner.args, inner.kwargs

    def leave(self, block: Any, args: tuple[Any, ...], output: Any, *, layer: int) -> Any:
        size = len(output) if isinstance(output, tuple) else None
        self._sizes.append(size)
        residual = _first(output).detach()
        if layer == self._n_layers - 1:
            self._final = residual
            raise _LastBlockDone
        return residual if size is None else (residual, *output[1:])

    def result(self) -> RecordedBlocks:
        if self._final is None:
            absent = sorted(set(range(self._n_layers)) - set(self._entered))
            raise ModelError(
                f"blocks {absent} did not run in the model's forward pass: this model computes its layers "
                "elsewhere. Running it block by block cannot serve it; use backend='hooks'."
            )
        return RecordedBlocks(self._calls, self._final, tuple(self._sizes))


def _find_residual(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any], layer: int) -> BlockCall:
    if args and isinstance(args[0], Tensor):
        return BlockCall(block, args, dict(kwargs), 0)
    for name in ("hidden_states", "resid_pre"):
        if isinstance(kwargs.get(name), Tensor):
            return BlockCall(block, args, dict(kwargs), name)
    raise ModelError(
        f"block {layer} was called without a residual: expected a tensor first or as `hidden_states`, found "
        f"{len(args)} positional arguments and {sorted(kwargs)}. Use backend='hooks'."
    )


def _without_cache(call: BlockCall) -> BlockCall:
    def cleared(value: Any) -> Any:
        return None if hasattr(value, "get_seq_length") else value

    kwargs = {name: cleared(value) for name, value in call.kwargs.items()}
    if "use_cache" in kwargs:
        kwargs["use_cache"] = False
    return replace(call, args=tuple(cleared(value) for value in call.args), kwargs=kwargs)


def _refuse_side_channels(call: BlockCall, layer: int) -> None:
    # Only what an earlier block computed from its residual can require a gradient here.
    others = {**{f"argument {i}": value for i, value in enumerate(call.args)}, **call.kwargs}
    for name, value in others.items():
        if any(tensor.requires_grad for tensor in _tensors_in(value)):
            raise ModelError(
                f"block {layer} receives `{name}` from an earlier block besides the residual (shared keys "
                "and values, for example), and gradients through it would be lost when blocks run one by "
                "one. Use backend='hooks'."
            )


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors_in(tuple(value.values()))
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors_in(item)


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def _passed_over(
    model: Any, sizes: tuple[int | None, ...], residual: Float[Tensor, "batch row d_model"]
) -> Iterator[None]:
    def shaped(tensor: Any, size: int | None) -> Any:
        return tensor if size is None else (tensor, *[None] * (size - 1))

    def passing(size: int | None) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            return shaped(args[0] if args else kwargs.get("hidden_states", kwargs.get("resid_pre")), size)

        return forward

    blocks = list(model.blocks)
    with ExitStack() as stack:
        for block, size in zip(blocks, sizes, strict=True):
            stack.enter_context(replaced_forward(block, passing(size)))
        handle = blocks[-1].register_forward_hook(lambda *_: shaped(residual.clone(), sizes[-1]))
        stack.callback(handle.remove)
        yield
