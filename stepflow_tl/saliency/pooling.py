"""From token saliency to step sums, and from step sums to the three pooled maps.

1. `step_bins` numbers each token with its step; TEMPLATE tokens share one extra bin at the end.
2. `pool_tokens` adds a `[head, query, key]` token map into `[head, query_step, key_bin]`, by one of the
   scores of `scores`. Queries on TEMPLATE tokens are dropped; the mass on TEMPLATE keys (the attention sink)
   lands in the extra bin.
3. `normalise` divides stored sums by the number of token pairs, which depends on step lengths alone.

Sums and lengths are stored once; every pooled map is derived. Memory of one call: a `[head, block, T]`
buffer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stepflow_tl.errors import GradientError
from stepflow_tl.saliency.scores import Score, cut_effects

Pooling = Literal["mean", "causal_mean", "sum"]

_QUERY_BLOCK = 256


def step_bins(
    step_ids: Int[Tensor, " token"], *, dtype: torch.dtype, device: torch.device
) -> Float[Tensor, "token bin"]:
    """One-hot columns that say which step each token belongs to; the last one marks TEMPLATE, -1."""
    n_steps = int(step_ids.max()) + 1 if step_ids.numel() else 0
    bins = torch.where(step_ids >= 0, step_ids, n_steps).to(device)
    one_hot = torch.zeros(len(step_ids), n_steps + 1, dtype=dtype, device=device)
    one_hot[torch.arange(len(step_ids), device=device), bins] = 1
    return one_hot


def pool_tokens(
    pattern: Float[Tensor, "head query key"],
    pattern_grad: Float[Tensor, "head query key"],
    bins: Float[Tensor, "token bin"],
    *,
    score: Score = "saliency",
    has_sink: bool = False,
) -> Float[Tensor, "head query_step key_bin"]:
    """Sum a score over step pairs (docs/method.md section 4; paper, Step-Saliency).

    Args:
        pattern: Post-softmax attention A of one layer.
        pattern_grad: dL/dA of the same layer.
        bins: The trace's `step_bins`; their dtype is the accumulation dtype.
        score: What is summed.
        has_sink: Whether a sink without a column joins the softmax, so that a row lacks its mass; for "cut".

    Returns:
        Sums per step pair; the last key bin is TEMPLATE.

    Cost: `O(H T^2 S)` multiply-adds, one `[head, 256, key]` buffer; two of them for "cut".
    """
    out = bins.new_zeros(pattern.shape[0], bins.shape[1] - 1, bins.shape[1])
    for start in range(0, pattern.shape[1], _QUERY_BLOCK):
        rows = slice(start, start + _QUERY_BLOCK)
        weights = pattern[:, rows].to(out.dtype)
        products = weights * pattern_grad[:, rows].to(out.dtype)
        per_key_bin = (products.abs_() if score == "saliency" else products) @ bins
        if score == "cut":
            sink_mass = (1 - weights.sum(-1)).clamp(min=0) if has_sink else None
            per_key_bin = cut_effects(weights @ bins, per_key_bin, sink_mass)
        out += bins[rows, :-1].T @ per_key_bin
    return out


def pair_counts(step_lengths: Int[Tensor, " step"], pooling: Pooling) -> Float[Tensor, "query_step key_step"]:
    """Number of token pairs each step pair is averaged over.

    `"mean"` counts all pairs of the rectangle, the paper's choice: zeros above the diagonal count.
    `"causal_mean"` counts pairs with key <= query only. `"sum"` counts one, which keeps the mass.

    For step lengths 2 and 3: mean gives [[4, 6], [6, 9]], causal_mean [[3, 0], [6, 6]].

    Raises:
        ValueError: If `pooling` is not one of the three names.
    """
    n = step_lengths.to(torch.float64)
    if pooling == "sum":
        return torch.ones(len(n), len(n), dtype=torch.float64)
    if pooling == "mean":
        return n[:, None] * n[None, :]
    if pooling == "causal_mean":
        return torch.tril(n[:, None] * n[None, :], diagonal=-1) + torch.diag(n * (n + 1) / 2)
    raise ValueError(f"unknown pooling {pooling!r}: expected one of {', '.join(get_args(Pooling))}")


def row_parts(
    maps: Float[Tensor, "*map query_step key_step"],
) -> Float[Tensor, "*map query_step key_step"]:
    """Each row of maps without negative entries divided by its sum; a row without mass stays 0."""
    # Dividing by the largest entry first keeps a row of denormal numbers from losing its sum to rounding.
    largest = maps.amax(dim=-1, keepdim=True)
    scaled = torch.where(largest > 0, maps / largest, torch.zeros_like(maps))
    return scaled / scaled.sum(dim=-1, keepdim=True).clamp(min=1)


def normalise(
    sums: Float[Tensor, "*layer_head query_step key_step"],
    step_lengths: Int[Tensor, " step"],
    pooling: Pooling,
) -> Float[Tensor, "*layer_head query_step key_step"]:
    """Divide sums by their pair counts; pairs that cannot exist (key after query) stay 0."""
    counts = pair_counts(step_lengths, pooling).to(sums.device)
    return torch.where(counts > 0, sums / counts.clamp(min=1).to(sums.dtype), torch.zeros_like(sums))


def stack_layers(
    sums: Mapping[int, Tensor], layers: Sequence[int], source: str
) -> Float[Tensor, "layer head query_step key_bin"]:
    """The sums of the wanted layers in one tensor, once each of them is there and finite.

    `sums` holds `[head, query_step, key_bin]` of the layers whose `source` ("pattern") a gradient reached.

    Raises:
        GradientError: If a layer got no gradient, or one that is not finite.
    """
    missing = [layer for layer in layers if layer not in sums]
    if missing:
        raise GradientError(
            f"no gradient reached the {source} of layers {missing}: the objective does not depend on them "
            "(a hook that cuts the residual stream, or logits computed elsewhere)."
        )
    stacked = torch.stack([sums[layer] for layer in layers])
    finite = torch.isfinite(stacked).flatten(2).all(-1)
    if not finite.all():
        index, head = (~finite).nonzero()[0].tolist()
        raise GradientError(
            f"the saliency of layer {layers[index]}, head {head} is not finite (NaN or infinite gradients in "
            f"{int((~finite).sum())} of {finite.numel()} layer-head pairs). Run the model in float32, and "
            "check its weights and any attached hook for NaN."
        )
    return stacked
