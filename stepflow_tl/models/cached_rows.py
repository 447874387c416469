"""A batch of sequences that a model continues token by token, from which rows can leave.

1. The prompts are padded on the left and read in one pass; keys and values stay in the cache that the model
   makes for itself (a sliding window keeps its window).
2. `read` feeds one more token per row and gives the logits after it.
3. `keep` drops all other rows from the cache: what has ended costs nothing any more. Cost: one copy of what
   is kept, about what one step of attention reads anyway.

A transformers model, also the one inside a TransformerBridge, counts positions off the attention mask, so
padding does not move them. A HookedTransformer counts padding in some configurations: it takes prompts of
one length only. A model without a cache reads everything again at every step.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stepflow_tl.errors import ModelError
from stepflow_tl.models.facts import is_bridge, is_transformerlens
from stepflow_tl.models.passes import model_device


class CachedRows(ABC):
    """Rows being decoded; see the module."""

    @property
    @abstractmethod
    def can_drop(self) -> bool:
        """Whether `keep` works: the model's cache may hold states that have no rows to select."""

    @abstractmethod
    def read(self, tokens: Int[Tensor, "row new"]) -> Float[Tensor, "row vocabulary"]:
        """Logits after these further tokens of every row."""

    @abstractmethod
    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone, in this order."""


def takes_padding(model: Any) -> bool:
    """Whether prompts of different lengths can be decoded together.

    Not in float64: the softmax inside transformers runs in float32, where the lowest float64, which its mask
    is made of, is minus infinity, and a row of padding becomes NaN.
    """
    return _is_transformers(model) and next(model.parameters()).dtype != torch.float64


def _is_transformers(model: Any) -> bool:
    return is_bridge(model) or not is_transformerlens(model)


def cached_rows(
    model: Any, prompts: Sequence[Sequence[int]], pad: int
) -> tuple[CachedRows, Float[Tensor, "row vocabulary"]]:
    """Read the prompts; the rows, and the logits after each.

    Args:
        model: A TransformerLens model or a transformers causal LM.
        prompts: Token ids of each row; of one length unless the model `takes_padding`.
        pad: The id to pad with on the left; it does not enter any row.

    Raises:
        ModelError: If the lengths differ and the model does not take padding.
    """
    if len(set(map(len, prompts))) > 1 and not takes_padding(model):
        raise ModelError("these prompts differ in length, and this model cannot be padded: decode them apart")
    longest, device = max(map(len, prompts)), model_device(model)
    tokens = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts], device=device)
    kind = _TransformersRows if _is_transformers(model) else _HookedRows
    rows = kind(model, mask)
    return rows, rows.read(tokens)


class _TransformersRows(CachedRows):
    def __init__(self, model: Any, mask: Tensor) -> None:
        self._runner = model.original_model if is_bridge(model) else model
        parameters = inspect.signature(self._runner.forward).parameters
        self._positions = "position_ids" in parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        self._mask, self._cache = mask, None
        self._tokens: Tensor | None = None  # all so far; needed only where there is no cache

    @property
    def can_drop(self) -> bool:
        layers = getattr(self._cache, "layers", None)
        return self._cache is None or bool(layers) and all(hasattr(x, "batch_select_indices") for x in layers)

    def read(self, tokens: Tensor) -> Tensor:
        if self._tokens is None:
            self._tokens = tokens
        else:
            self._tokens = torch.cat([self._tokens, tokens], dim=1)
            self._mask = torch.cat([self._mask, torch.ones_like(tokens)], dim=1)
        new = self._tokens if self._cache is None else tokens
        options: dict[str, Any] = {"attention_mask": self._mask, "use_cache": True, **self._last_only}
        if self._positions:
            options["position_ids"] = (self._mask.cumsum(-1) - 1).clamp(min=0)[:, -new.shape[1] :]
        if self._cache is not None:
            options["past_key_values"] = self._cache
        out = self._runner(input_ids=new, **options)
        self._cache = getattr(out, "past_key_values", None)
        return out.logits[:, -1]

    def keep(self, rows: Sequence[int]) -> None:
        chosen = torch.tensor(rows, device=self._mask.device)
        self._mask, self._tokens = self._mask[chosen], None if self._tokens is None else self._tokens[chosen]
        if self._cache is not None:
            self._cache.batch_select_indices(chosen)


class _HookedRows(CachedRows):
    def __init__(self, model: Any, mask: Tensor) -> None:
        from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

        self._model = model
        self._cache = TransformerLensKeyValueCache.init_cache(model.cfg, mask.device, len(mask))

    @property
    def can_drop(self) -> bool:
        return True

    def read(self, tokens: Tensor) -> Tensor:
        # Without a mask, TransformerLens would look for padding by itself.
        options: dict[str, Any] = {"attention_mask": torch.ones_like(tokens), "past_kv_cache": self._cache}
        return self._model(tokens, return_type="logits", **options)[:, -1]

    def keep(self, rows: Sequence[int]) -> None:
        for entry in self._cache.entries:
            chosen = torch.tensor(rows, device=entry.past_keys.device)
            entry.past_keys, entry.past_values = entry.past_keys[chosen], entry.past_values[chosen]
        mask = self._cache.previous_attention_mask
        self._cache.previous_attention_mask = mask[torch.tensor(rows, device=mask.device)]
