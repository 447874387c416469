"""The keys and values of a whole trace, computed once, and passes that begin anywhere in it.

1. `fill_prefix` runs the trace once and keeps every key and value of every layer, those of sliding-window
   layers too: a cache as it is made for decoding would drop what has left the window. The window then acts
   through the mask alone, which transformers and HookedTransformer build from positions.
2. `run(start, end, n_rows)` feeds tokens `[start, end)` in `n_rows` equal rows after the first `start`
   tokens. The prefix is a view of the filled tensors, expanded over the rows; nothing is written into it, so
   passes cannot disturb one another.

Memory: one key and one value per token and layer, and within a pass, one layer at a time, a copy for each
row.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from functools import cache
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stepflow_tl.errors import ModelError
from stepflow_tl.models.facts import is_bridge, wrapped_model


class PrefixCacheRefusal(ModelError):
    """This model cannot run from a shared prefix. `method="auto"` takes whole passes then."""

    def __init__(self, reason: str) -> None:
        """State the reason; the advice is the same for all."""
        super().__init__(
            f"method='cached' cannot serve this run: {reason}. Use method='full', or 'auto' to fall back."
        )
        self.reason = reason


class SharedPrefix(ABC):
    """A cache to be filled once and read from anywhere."""

    argument: ClassVar[str]

    def __init__(self, model: Any, tokens: Int[Tensor, " token"]) -> None:
        """A cache for `tokens`, handed to the model as `argument`; nothing has run yet."""
        runner = wrapped_model(model)
        if self.argument not in inspect.signature(runner.forward).parameters:
            raise PrefixCacheRefusal(f"{type(runner).__name__} takes no key-value cache")
        self._model, self._tokens = model, tokens
        self._layers: list[tuple[Tensor, Tensor]] = []

    @abstractmethod
    def fill(self) -> Float[Tensor, "token vocabulary"]:
        """Run the trace, keep its keys and values, and return its logits."""

    @abstractmethod
    def run(self, start: int, end: int, n_rows: int) -> Float[Tensor, "row token vocabulary"]:
        """Logits of tokens `[start, end)`, in `n_rows` rows that differ only by what hooks do to them."""


def fill_prefix(
    model: Any, tokens: Int[Tensor, " token"]
) -> tuple[SharedPrefix, Float[Tensor, "token vocabulary"]]:
    """Run `tokens` once, keep keys and values; also the logits of that pass.

    Raises:
        PrefixCacheRefusal: If the model takes no such cache, or does not fill it.
    """
    prefix = (_TransformersPrefix if is_bridge(model) else _HookedPrefix)(model, tokens)
    return prefix, prefix.fill()


@cache
def _shared_layer_class() -> type:
    """The class of one layer's prefix, made when first needed: its base comes from transformers."""
    from transformers.cache_utils import DynamicLayer

    class SharedLayer(DynamicLayer):
        """A prefix that answers with prefix and new tokens, and keeps only the prefix."""

        def __init__(self, keys: Tensor, values: Tensor) -> None:
            super().__init__()
            self.keys, self.values = keys, values
            self.dtype, self.device = keys.dtype, keys.device
            self.is_initialized = True

        def update(
            self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            assert self.keys is not None and self.values is not None
            return torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)

    return SharedLayer


class _TransformersPrefix(SharedPrefix):
    """Behind a TransformerBridge: a transformers cache whose layers never drop a key."""

    argument = "past_key_values"

    def __init__(self, model: Any, tokens: Tensor) -> None:
        super().__init__(model, tokens)
        from transformers.cache_utils import DynamicCache

        inner = wrapped_model(model)
        if not getattr(model.adapter, "supports_kv_cache", True):
            raise PrefixCacheRefusal(f"{type(inner).__name__} takes no key-value cache")
        # Layers that remember more of the prefix than keys and values show in the model's own decoding cache.
        kinds = {type(layer).__name__ for layer in DynamicCache(config=inner.config).layers}
        if others := kinds - {"DynamicLayer", "DynamicSlidingWindowLayer"}:
            raise PrefixCacheRefusal(
                f"layers of {type(inner).__name__} keep more than keys and values "
                f"({', '.join(sorted(others))})"
            )

    def fill(self) -> Tensor:
        from transformers.cache_utils import Cache, DynamicLayer

        filled = Cache(layer_class_to_replicate=DynamicLayer)
        logits = self._forward(self._tokens[None], filled)
        for layer in filled.layers:
            keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
            if keys is None or values is None or keys.shape[-2] != len(self._tokens):
                break
            self._layers.append((keys, values))
        n_layers = int(self._model.cfg.n_layers)
        if len(self._layers) != n_layers:
            raise PrefixCacheRefusal(f"it left layer {len(self._layers)} of {n_layers} out of its cache")
        return logits[0]

    def run(self, start: int, end: int, n_rows: int) -> Tensor:
        from transformers.cache_utils import Cache

        shared: list[Any] = [
            _shared_layer_class()(*(held[:, :, :start].expand(n_rows, -1, -1, -1) for held in layer))
            for layer in self._layers
        ]
        return self._forward(self._tokens[start:end].expand(n_rows, -1), Cache(layers=shared))

    def _forward(self, tokens: Tensor, past: Any) -> Tensor:
        return self._model(tokens, return_type="logits", past_key_values=past, use_cache=True)


class _HookedPrefix(SharedPrefix):
    """A HookedTransformer with its own cache, frozen while the prefix is shared."""

    argument = "past_kv_cache"

    def fill(self) -> Tensor:
        filled = self._cache([], 0, 1)
        logits = self._forward(self._tokens[None], filled)
        self._layers = [(entry.past_keys, entry.past_values) for entry in filled.entries]
        return logits[0]

    def run(self, start: int, end: int, n_rows: int) -> Tensor:
        return self._forward(
            self._tokens[start:end].expand(n_rows, -1), self._cache(self._layers, start, n_rows)
        )

    def _cache(self, layers: list[tuple[Tensor, Tensor]], start: int, n_rows: int) -> Any:
        from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

        device = self._tokens.device
        past = TransformerLensKeyValueCache.init_cache(self._model.cfg, device, n_rows)
        for entry, held in zip(past.entries, layers, strict=False):
            entry.past_keys, entry.past_values = (
                tensor[:, :start].expand(n_rows, -1, -1, -1) for tensor in held
            )
        if layers:
            past.previous_attention_mask = torch.ones(n_rows, start, dtype=torch.int64, device=device)
            past.freeze()
        return past

    def _forward(self, tokens: Tensor, past: Any) -> Tensor:
        # Every token of a trace counts; without a mask, TransformerLens would look for padding by itself.
        return self._model(
            tokens, return_type="logits", past_kv_cache=past, attention_mask=torch.ones_like(tokens)
        )
