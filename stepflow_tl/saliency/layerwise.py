"""The `layerwise` backend: the hooks backend with one block's patterns in memory at a time.

1. One forward pass up to the last block, each block under a checkpoint: it keeps what enters it and lets
   everything else go. The hooks of the `hooks` backend are on; they build the same graph.
2. The gradient at the final residual comes from the model's own final norm and unembedding, a few hundred
   rows at a time. A callable objective, or a hook outside the blocks that may know its positions, gets the
   logits of the whole trace, once.
3. One backward pass from there to what enters the lowest layer asked for. A block runs again when its turn
   comes, its pattern meets its gradient and is pooled, and the block's tensors are let go.
4. Every block must give the same output again; if not, something with state (a hook that counts, random
   numbers) is at work, and that is an error.

The numbers are those of the `hooks` backend. Hooks from outside stay in force: inside a block they run twice
(forward pass, second run), at the embeddings twice (forward pass, tail), at the final norm and unembedding
once, backward hooks once.

Nothing here knows an architecture: masks, ALiBi, rotary tables and shortformer's position embeddings are what
the model itself handed to its blocks. A KV cache has no use in a pass over the whole trace and would grow in
the second run; it is left out.

Memory `O(H T^2 + L T d_model)` where the `hooks` backend takes `O(L H T^2)`. Cost: a second forward pass
through the blocks.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import CheckpointError, checkpoint, set_checkpoint_early_stop

from stepflow_tl.errors import ModelError
from stepflow_tl.models.hook_names import hook_counts
from stepflow_tl.models.passes import attached, frozen, model_device, replaced_forward
from stepflow_tl.saliency.hooks_backend import PatternTaps
from stepflow_tl.saliency.objectives import Objective
from stepflow_tl.saliency.pooling import stack_layers
from stepflow_tl.saliency.scores import Score

_TAIL_ROWS = 256
# A second run of the same operations on the same numbers; kernels may still sum in another order.
_SAME_OUTPUT = {torch.float64: 1e-8, torch.float32: 1e-4}
_SAME_OUTPUT_HALF = 0.05
_STATE = (
    "something with state is at work in it, such as a hook that counts or draws random numbers, a random "
    "layer, or a store that blocks share and overwrite. Make it depend on its input alone, or use "
    "backend='hooks', which runs everything once."
)


def layerwise_backend(
    model: Any,
    tokens: Int[Tensor, " token"],
    step_ids: Int[Tensor, " token"],
    objective: Objective,
    layers: tuple[int, ...],
    *,
    score: Score = "saliency",
) -> Float[Tensor, "layer head query_step key_bin"]:
    """Step sums of the chosen layers, with the patterns of one layer in memory at a time.

    Arguments, result and errors as in `hooks_backend`; no block below the lowest layer runs a second time.

    Raises:
        ModelError: Also if blocks do not run once each in their order, or a block's second run gives another
            output.
    """
    taps = PatternTaps(model, step_ids, layers, per_token=objective.per_token, score=score, recomputed=True)
    with frozen(model), torch.inference_mode(False), torch.enable_grad():
        batch = tokens[None].to(model_device(model))
        blocks = CheckpointedBlocks(list(model.blocks))
        with attached(model, first=taps.first, last=taps.last):
            with attached(model, last=taps.start):
                final = blocks.run(model, batch)
            taps.check_fired()
            hooked = any(not name.startswith("blocks.") for name in hook_counts(model))
            gradient = objective.residual_gradient(
                final.detach(),
                batch,
                lambda rows: blocks.tail(model, batch[:, : rows.shape[1]], rows),
                rows=None if hooked else _TAIL_ROWS,
            )
            if gradient is not None and final.requires_grad:
                down_to = [*blocks.entered[min(layers)], *taps.constants]
                try:
                    torch.autograd.grad(final, down_to, gradient.to(final.device), allow_unused=True)
                except CheckpointError as error:
                    raise ModelError(
                        f"a block kept other tensors when it was run a second time: {_STATE}"
                    ) from error
    return stack_layers(taps.pooled, layers, "pattern")


class CheckpointedBlocks:
    """A model's blocks during one forward pass, each under a checkpoint.

    Nothing that a checkpoint calls refers back to this object: it holds the graph, and such a circle would
    never be collected.

    Attributes:
        entered: Per block, the tensors with a gradient that entered it, the residual among them.
        output_sizes: Per block, the length of the tuple it returned, or None for a bare tensor.
    """

    def __init__(self, blocks: list[Any]) -> None:
        """Nothing has run yet."""
        self._blocks = blocks
        self._order: list[int] = []
        self._outputs: dict[int, Tensor] = {}
        self._final: Tensor | None = None
        self.entered: list[list[Tensor]] = []
        self.output_sizes: list[int | None] = []

    def run(self, model: Any, tokens: Int[Tensor, "batch token"]) -> Float[Tensor, "batch token d_model"]:
        """The final residual, with its graph; refuses a model whose blocks do not run once, in order."""
        with ExitStack() as stack:
            stack.enter_context(set_checkpoint_early_stop(False))  # a second run goes on to its output
            for layer, block in enumerate(self._blocks):
                forward = partial(self._run_block, block.forward, layer)
                stack.enter_context(replaced_forward(block, forward))
            stack.callback(self._blocks[-1].register_forward_hook(self._stop).remove)
            try:
                model(tokens, return_type="logits")
            except _LastBlockDone:
                pass
        if self._final is None:
            absent = sorted(set(range(len(self._blocks))) - set(self._order))
            raise ModelError(
                f"blocks {absent} did not run in the model's forward pass: this model computes its layers "
                "elsewhere. Running it block by block cannot serve it; use backend='hooks'."
            )
        return self._final

    def tail(
        self, model: Any, tokens: Int[Tensor, "batch row"], residual: Float[Tensor, "batch row d_model"]
    ) -> Float[Tensor, "batch row vocabulary"]:
        """Logits of some rows of the final residual, by the model's own final norm and unembedding.

        Blocks are passed over; the embedding of `tokens`, of which there are as many, is dropped.
        """

        def shaped(tensor: Any, size: int | None) -> Any:
            return tensor if size is None else (tensor, *[None] * (size - 1))

        def pass_over(size: int | None, *args: Any, **kwargs: Any) -> Any:
            return shaped(args[0] if args else kwargs.get("hidden_states", kwargs.get("resid_pre")), size)

        def put_in(block: Any, args: Any, output: Any) -> Any:
            return shaped(residual.clone(), self.output_sizes[-1])

        with ExitStack() as stack:
            for block, size in zip(self._blocks, self.output_sizes, strict=True):
                stack.enter_context(replaced_forward(block, partial(pass_over, size)))
            stack.callback(self._blocks[-1].register_forward_hook(put_in).remove)
            return model(tokens, return_type="logits")

    def _run_block(self, forward: Any, layer: int, *args: Any, **kwargs: Any) -> Any:
        self._order.append(layer)
        if layer != len(self._order) - 1:
            raise ModelError(
                f"blocks ran in the order {self._order}: expected each once, from the first to the last. "
                "Running it block by block cannot serve this model; use backend='hooks'."
            )
        if "use_cache" in kwargs:
            kwargs["use_cache"] = False
        inputs = (*args, *kwargs.values())
        self.entered.append([x for x in inputs if isinstance(x, Tensor) and x.requires_grad])
        run = partial(_run_and_compare, forward, layer, self._outputs)
        output = checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
        self.output_sizes.append(len(output) if isinstance(output, tuple) else None)
        return output

    def _stop(self, block: Any, args: tuple[Any, ...], output: Any) -> None:
        self._final = _first(output)
        raise _LastBlockDone


class _LastBlockDone(Exception):
    """Ends a forward pass before logits of `[T, vocabulary]` are made."""


def _run_and_compare(
    forward: Any, layer: int, outputs: dict[int, Tensor], /, *args: Any, **kwargs: Any
) -> Any:
    """Run a block; a second run with another output would give another model's map."""
    output = forward(*map(_own, args), **{name: _own(value) for name, value in kwargs.items()})
    found = _first(output).detach()
    if layer not in outputs:
        outputs[layer] = found
        return output
    expected = outputs.pop(layer)
    tolerance = _SAME_OUTPUT.get(found.dtype, _SAME_OUTPUT_HALF)
    scale = float(expected.nan_to_num(0, 0, 0).abs().max())
    if found.shape != expected.shape or not torch.allclose(
        found, expected, rtol=tolerance, atol=tolerance * scale, equal_nan=True
    ):
        raise ModelError(f"block {layer} gave another output when it was run a second time: {_STATE}")
    return output


def _own(value: Any) -> Any:
    """A block's argument as the block gets it: a copy of what a hook may write into, and no KV cache."""
    if isinstance(value, Tensor) and value.requires_grad:
        return value.clone()
    return None if hasattr(value, "get_seq_length") else value


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
