"""Cut attention edges: scores set to -inf before the softmax, so the other keys share the mass.

1. `cut_mask` marks, for each row of a batch, which scores of a pass are cut: the queries of one step, the
   keys of another. A token's score on itself is never marked.
2. `EdgeCut` holds the hooks of the chosen layers and heads, and the mask of the pass that is about to run.
   They run after every hook that is attached already, so an edge that is cut stays cut.
3. Where a layer has no live scores but a live pattern, the pattern is cut and its rows brought back to sum 1:
   the same numbers, as long as the pattern has kept any mass elsewhere.

Every query must keep a live key, or the softmax would have nothing to divide by: itself, as a rule, and the
TEMPLATE tokens, which are in no step and so are never cut. A hook from outside may have masked those: then
an error says so instead of NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from stepflow_tl.errors import ModelError
from stepflow_tl.models.hook_names import refuse_delegated, resolve_hooks
from stepflow_tl.models.passes import NamedHook

Span = tuple[int, int]


def cut_mask(
    queries: Span, keys: Sequence[Span | None], n_queries: int, n_keys: int
) -> Bool[Tensor, "batch 1 query key"]:
    """Which scores of a pass are cut.

    Args:
        queries: Half-open span of the cut rows, counted from the first query of the pass.
        keys: Half-open span of cut keys for each batch row, counted from the trace's first token; None cuts
            nothing in that row.
        n_queries: Queries of the pass.
        n_keys: Keys of the pass; its queries are the last of them.
    """
    mask = torch.zeros(len(keys), 1, n_queries, n_keys, dtype=torch.bool)
    for row, span in enumerate(keys):
        if span is not None:
            mask[row, 0, queries[0] : queries[1], span[0] : span[1]] = True
    own = torch.arange(n_queries)
    mask[:, :, own, own + n_keys - n_queries] = False
    return mask


class EdgeCut:
    """Hooks that cut what `mask` marks, in some layers and heads.

    Attributes:
        mask: Set before each pass; None cuts nothing.
    """

    def __init__(self, model: Any, layers: Sequence[int], heads: Sequence[int] | None = None) -> None:
        """Find the hook points.

        Raises:
            ModelError: If a layer's attention cannot be edited.
        """
        self.mask: Tensor | None = None
        self._heads = None
        if heads is not None:
            self._heads = torch.zeros(1, int(model.cfg.n_heads), 1, 1, dtype=torch.bool)
            self._heads[0, list(heads)] = True
        self._fired: dict[int, int] = dict.fromkeys(layers, 0)
        self.hooks: list[NamedHook] = []
        for hooks in resolve_hooks(model, layers).layers:
            layer, name, function = hooks.layer, hooks.scores, self._cut_scores
            refuse_delegated(model, hooks, "Leave the layer out with layers=[...].")
            if name is None:
                name, function = hooks.pattern, self._cut_pattern
            self.hooks.append((name, partial(function, layer=layer)))

    def check_fired(self) -> None:
        """Demand that every hook ran once since the last check; a filter that matches nothing is silent.

        Raises:
            ModelError: If not; the message names the layers.
        """
        wrong = [layer for layer, count in self._fired.items() if count != 1]
        counts = sorted({self._fired[layer] for layer in wrong})
        self._fired = dict.fromkeys(self._fired, 0)
        if wrong:
            raise ModelError(
                f"the scores of layers {wrong} fired {counts} times in one forward pass, expected once: boot "
                "the model with eager attention, and run no other pass inside a hook"
            )

    def _cut_scores(
        self, scores: Float[Tensor, "batch head query key"], hook: Any, *, layer: int
    ) -> Float[Tensor, "batch head query key"]:
        cut = self._cut(scores, hook, layer)
        if cut is None:
            return scores
        lowest = torch.finfo(scores.dtype).min / 2  # some models mask with the dtype's lowest value, not -inf
        result = scores.masked_fill(cut, -torch.inf)
        own = scores.diagonal(offset=scores.shape[-1] - scores.shape[-2], dim1=-2, dim2=-1)
        if not bool((own > lowest).all()):  # rare: look whether something else is left
            self._refuse_emptied((result.amax(-1) <= lowest) & cut.any(-1), hook)
        return result

    def _cut_pattern(
        self, pattern: Float[Tensor, "batch head query key"], hook: Any, *, layer: int
    ) -> Float[Tensor, "batch head query key"]:
        cut = self._cut(pattern, hook, layer)
        if cut is None:
            return pattern
        kept = pattern.masked_fill(cut, 0)
        mass = kept.sum(-1, keepdim=True)
        is_cut = cut.any(-1, keepdim=True)
        self._refuse_emptied(((mass <= 0) & is_cut)[..., 0], hook)
        return torch.where(is_cut, kept / torch.where(is_cut, mass, 1), pattern)

    def _cut(self, attention: Tensor, hook: Any, layer: int) -> Tensor | None:
        self._fired[layer] += 1
        if self.mask is None:
            return None
        expected, found = (
            (self.mask.shape[0], *self.mask.shape[2:]),
            (attention.shape[0], *attention.shape[2:]),
        )
        if expected != found:
            raise ModelError(
                f"{hook.name} has (batch, queries, keys) {found}, expected {expected}: this layer's keys are "
                "not the whole trace so far (a cache that drops keys, a prefix of its own). Use "
                "method='full'."
            )
        mask = self.mask.to(attention.device)
        return mask if self._heads is None else mask & self._heads.to(attention.device)

    def _refuse_emptied(self, emptied: Bool[Tensor, "batch head query"], hook: Any) -> None:
        if emptied.any():
            row, head, query = emptied.nonzero()[0].tolist()
            raise ModelError(
                f"{hook.name}: after the cut, query {query} of the pass (batch row {row}, head {head}) has "
                "no key left to attend to. A token keeps itself and the template tokens, so a hook attached "
                "from outside has masked those; take it off."
            )
