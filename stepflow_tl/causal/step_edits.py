"""What is written over a step's activations: pure functions of two activations and a match of steps.

`step_patch_setter` speaks TransformerLens' own patching idiom, so the same edit serves `step_patching` and
`transformer_lens.patching.generic_activation_patch`:

    cells = make_df_from_ranges([model.cfg.n_layers, len(matches)], ["layer", "step"])
    setter = step_patch_setter(matches)
    generic_activation_patch(model, tokens, clean_cache, metric, setter, "resid_pre", index_df=cells)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from stepflow_tl.causal.alignment import Alignment, StepMatch
from stepflow_tl.causal.controls import norm_matched_activations


def step_difference(
    activation: Float[Tensor, " pos *feature"],
    clean: Float[Tensor, " clean_pos *feature"],
    match: StepMatch,
    alignment: Alignment,
) -> Float[Tensor, " step_pos *feature"]:
    """How far each token of the corrupted step is from where patching puts it."""
    here = activation[slice(*match.corrupted.token_span)]
    there = clean[slice(*match.clean.token_span)]
    if alignment == "tokens":
        return there - here
    return (there.mean(0, keepdim=True) - here.mean(0, keepdim=True)).expand_as(here)


def patched_step(
    activation: Float[Tensor, " pos *feature"],
    clean: Float[Tensor, " clean_pos *feature"],
    match: StepMatch,
    alignment: Alignment,
    *,
    placebo_seed: int | None = None,
    layer: int = 0,
) -> Float[Tensor, " step_pos *feature"]:
    """The new activations of the corrupted step.

    Args:
        activation: Activations of the corrupted run.
        clean: Activations of the clean run at the same hook point.
        match: The two steps.
        alignment: How their tokens meet, see `alignment`.
        placebo_seed: If given, each vector moves just as far, in a random direction.
        layer: Keeps the random directions of layers apart.
    """
    here = activation[slice(*match.corrupted.token_span)]
    if placebo_seed is not None:
        moved = here + step_difference(activation, clean, match, alignment)
        return norm_matched_activations(
            here, moved, seed=placebo_seed, layer=layer, position=match.corrupted.token_start
        )
    if alignment == "tokens":  # written as it is: adding a difference would round
        return clean[slice(*match.clean.token_span)]
    return here + step_difference(activation, clean, match, alignment)


def step_patch_setter(
    matches: Sequence[StepMatch], alignment: Alignment = "tokens", *, placebo_seed: int | None = None
) -> Callable[[Tensor, Sequence[Any], Tensor], Tensor]:
    """A `patch_setter` for TransformerLens' `generic_activation_patch`, over `[layer, step]` indices.

    Args:
        matches: The steps; the second index counts them.
        alignment: How tokens meet, see `alignment`.
        placebo_seed: If given, random directions of the same length instead.

    Returns:
        `setter(corrupted_activation, [layer, step], clean_activation)`, activations `[batch, pos, ...]`; the
        tensor it was given is not written to.
    """

    def setter(corrupted_activation: Tensor, index: Sequence[Any], clean_activation: Tensor) -> Tensor:
        layer, match = int(index[0]), matches[int(index[1])]
        patched = corrupted_activation.clone()
        for row in range(patched.shape[0]):
            patched[row, slice(*match.corrupted.token_span)] = patched_step(
                corrupted_activation[row],
                clean_activation[row].to(patched.device),
                match,
                alignment,
                placebo_seed=placebo_seed,
                layer=layer,
            )
        return patched

    return setter
