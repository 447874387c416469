"""Plain attention with the logsumexp of its rows, as one call of a transformers attention module asks for it.

1. On a CPU, PyTorch's flash kernel gives both, for causal calls, masks, grouped heads and single queries. It
   is called in the layout in which transformers' own SDPA function calls it, so z has the same bits.
2. On a GPU, flash attention where nothing is masked.
3. Elsewhere (a mask on a GPU, soft-cap, sinks, a shift of the scores, values of another width, other devices,
   or a gradient is wanted), scores are formed for one block of queries at a time.

Sinks are logits without a value that join the softmax: z shrinks by what they take.

Memory: O(tokens); in the third way one block of `_BLOCK_ELEMENTS` scores, all of them under autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_BLOCK_ELEMENTS = 1 << 22

ScoreShift = Callable[[Tensor, slice, slice, range], Tensor]
"""Takes the scores of some rows, queries and keys, after the soft-cap, and gives them changed."""


@dataclass(frozen=True)
class Visible:
    """Which keys each query of a call sees.

    Attributes:
        n_queries: Number of queries, which are the last of the keys.
        n_keys: Number of keys.
        mask: True, or a number above half the dtype's lowest, where a query sees a key; None: a query sees
            the earlier keys within the window, and its own.
        window: How many keys a query sees where there is no mask, itself included; None for all.
    """

    n_queries: int
    n_keys: int
    mask: Tensor | None = None  # [batch or 1, 1, query, key]
    window: int | None = None

    def block(
        self, rows: slice, queries: slice, keys: range | Tensor
    ) -> Bool[Tensor, "row 1 query key"] | bool:
        """For some rows, queries and keys (a range, or any indices); `True` where they all see all."""
        if self.mask is not None:
            part = self._rows(rows)[..., queries, _index(keys)]
            return part if part.dtype == torch.bool else part > torch.finfo(part.dtype).min / 2
        first = self.n_keys - self.n_queries + queries.start
        last = first + queries.stop - queries.start
        if isinstance(keys, Tensor):
            key = keys
        elif keys.stop - 1 <= first and (self.window is None or keys.start > last - 1 - self.window):
            return True
        else:
            key = torch.arange(keys.start, keys.stop)
        at = torch.arange(first, last, device=key.device)[:, None]
        seen = key <= at
        if self.window is not None:
            seen &= key > at - self.window
        return seen[None, None]

    def counts(
        self, rows: slice, queries: slice, groups: Bool[Tensor, "group row 1 1 key"]
    ) -> Int[Tensor, "group row 1 query"]:
        """How many keys of each group each query sees."""
        n_keys = groups.shape[-1]
        if self.mask is not None:
            return (self.block(rows, queries, range(n_keys)) & groups).sum(-1)
        if self.n_queries == 1 and self.window is None:  # a decoding pass: the query is after every key
            return groups.sum(-1)
        so_far = torch.nn.functional.pad(groups[..., 0, :].cumsum(-1), (1, 0))
        first = self.n_keys - self.n_queries + queries.start
        at = torch.arange(first, first + queries.stop - queries.start, device=groups.device)
        seen = so_far[..., (at + 1).clamp(max=n_keys)]
        return seen if self.window is None else seen - so_far[..., (at + 1 - self.window).clamp(min=0)]

    def _rows(self, rows: slice) -> Tensor:
        assert self.mask is not None
        return self.mask if self.mask.shape[0] == 1 else self.mask[rows]


@dataclass(frozen=True)
class Call:
    """One attention call, computed.

    Attributes:
        query: Queries.
        key: Keys, shared by consecutive query heads.
        value: Values.
        z: Output, sinks included.
        logsumexp: Natural logarithm of each row's normaliser, sinks included.
        visible: Which keys a query sees.
        scale: Factor on `q . k`.
        softcap: Bound of the scores, or None.
        sinks: One logit per head that joins the softmax without a value, or None.
        shift: What changes the scores, or None.
    """

    query: Float[Tensor, "batch head query d_head"]
    key: Float[Tensor, "batch kv_head key d_head"]
    value: Float[Tensor, "batch kv_head key d_value"]
    z: Float[Tensor, "batch head query d_value"]
    logsumexp: Float[Tensor, "batch head query"]
    visible: Visible
    scale: float
    softcap: float | None = None
    sinks: Float[Tensor, " head"] | None = None
    shift: ScoreShift | None = None

    @classmethod
    def computed(
        cls,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        visible: Visible,
        scale: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        shift: ScoreShift | None = None,
    ) -> Call:
        """Compute it; arguments as the attributes."""
        z, logsumexp = attention_with_logsumexp(
            query, key, value, visible, scale=scale, softcap=softcap, sinks=sinks, shift=shift
        )
        return cls(query, key, value, z, logsumexp, visible, scale, softcap, sinks, shift)

    def scores(
        self, rows: slice, queries: slice, keys: range | Tensor
    ) -> Float[Tensor, "row head query key"]:
        """Scores of some rows, queries and keys in at least float32, without a mask; a shift takes ranges."""
        key = self.key[rows, :, _index(keys)]
        scores = scores_of(self.query[rows, :, queries], key, self.scale, self.softcap)
        if self.shift is None:
            return scores
        assert isinstance(keys, range)
        return self.shift(scores, rows, queries, keys)


def _index(keys: range | Tensor) -> slice | Tensor:
    return slice(keys.start, keys.stop) if isinstance(keys, range) else keys


def attention_with_logsumexp(
    query: Float[Tensor, "batch head query d_head"],
    key: Float[Tensor, "batch kv_head key d_head"],
    value: Float[Tensor, "batch kv_head key d_value"],
    visible: Visible,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Float[Tensor, " head"] | None = None,
    shift: ScoreShift | None = None,
) -> tuple[Float[Tensor, "batch head query d_value"], Float[Tensor, "batch head query"]]:
    """z, and the natural logarithm of each row's normaliser in at least float32.

    Args:
        query: Queries.
        key: Keys; consecutive query heads share a KV head.
        value: Values.
        visible: Which keys a query sees.
        scale: Factor on `q . k`.
        softcap: Bound of the scores, `cap * tanh(score / cap)`.
        sinks: One logit per head that joins the softmax without a value.
        shift: What changes the scores.
    """
    batch, n_heads, n_queries, _ = query.shape
    is_causal = visible.mask is None and n_queries > 1
    aligned = not is_causal or n_queries == key.shape[2]  # the kernels align the first rows, not the last
    by_scores = softcap is not None or sinks is not None or shift is not None
    if not by_scores and visible.window is None and aligned:
        packed = query
        if n_queries == 1 and visible.mask is not None:  # a KV head's queries as the rows of one head
            packed = query.reshape(batch, key.shape[1], -1, query.shape[-1])
        found = by_kernel(packed, key, value, scale=scale, is_causal=is_causal, mask=visible.mask)
        if found is not None:
            z, logsumexp = found
            return z.reshape(query.shape), logsumexp.reshape(batch, n_heads, n_queries)
    return _in_blocks(query, key, value, visible, scale, softcap, sinks, shift)


def by_kernel(
    query: Float[Tensor, "batch head query d_head"],
    key: Float[Tensor, "batch kv_head key d_head"],
    value: Float[Tensor, "batch kv_head key d_value"],
    *,
    scale: float,
    is_causal: bool = False,
    mask: Tensor | None = None,
) -> tuple[Float[Tensor, "batch head query d_value"], Float[Tensor, "batch head query"]] | None:
    """Attention by one of PyTorch's flash kernels; None where none serves.

    Args:
        query: Queries.
        key: Keys; consecutive query heads share a KV head.
        value: Values.
        scale: Factor on `q . k`.
        is_causal: Whether a query sees the keys up to its own alone; as many keys as queries.
        mask: As in `Visible`; not beside `is_causal`. Served on a CPU.

    Returns:
        z, and the natural logarithm of each row's normaliser.
    """
    if query.shape[-1] != value.shape[-1] or (
        torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    ):
        return None  # the kernels' logsumexp passes no gradient back
    if query.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, is_causal, attn_mask=_additive(mask, query.dtype), scale=scale
        )
    if mask is None and flash_takes(query, key, value, is_causal=is_causal):
        return flash_forward(query, key, value, scale, is_causal=is_causal)
    return None


def flash_takes(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool) -> bool:
    """Whether PyTorch's flash kernels for CUDA compute this call, without a mask."""
    if not query.is_cuda or query.shape[-1] % 8 or query.shape[-1] != value.shape[-1]:
        return False
    grouped = query.shape[1] != key.shape[1]
    parameters = torch.backends.cuda.SDPAParams(query, key, value, None, 0.0, is_causal, grouped)
    return torch.backends.cuda.can_use_flash_attention(parameters)


def flash_forward(
    query: Float[Tensor, "batch head query d_head"],
    key: Float[Tensor, "batch kv_head key d_head"],
    value: Float[Tensor, "batch kv_head key d_head"],
    scale: float,
    *,
    is_causal: bool = True,
) -> tuple[Float[Tensor, "batch head query d_head"], Float[Tensor, "batch head query"]]:
    """Attention on CUDA: z, and the natural logarithm of each row's normaliser in float32."""
    z, logsumexp, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, 0.0, is_causal, scale=scale
    )
    return z, logsumexp


def scores_of(
    query: Float[Tensor, "batch head query d_head"],
    key: Float[Tensor, "batch kv_head key d_head"],
    scale: float,
    softcap: float | None,
) -> Float[Tensor, "batch head query key"]:
    """Scores in at least float32, without a mask."""
    work = torch.promote_types(query.dtype, torch.float32)
    batch, n_heads, n_queries, width = query.shape
    by_group = query.to(work).mul(scale).reshape(batch, key.shape[1], -1, width)
    scores = (by_group @ key.to(work).transpose(-1, -2)).view(batch, n_heads, n_queries, key.shape[2])
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def weighted_values(
    pattern: Float[Tensor, "batch head query key"], value: Float[Tensor, "batch kv_head key d_value"]
) -> Float[Tensor, "batch head query d_value"]:
    """Sum of the values by their weights; consecutive heads share a KV head."""
    batch, n_heads, n_queries, n_keys = pattern.shape
    by_group = pattern.reshape(batch, value.shape[1], -1, n_keys)
    return (by_group @ value).view(batch, n_heads, n_queries, value.shape[-1])


def _in_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Visible,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    shift: ScoreShift | None,
) -> tuple[Tensor, Tensor]:
    batch, n_heads, n_queries, _ = query.shape
    size = max(1, _BLOCK_ELEMENTS // (batch * n_heads * key.shape[2]))
    everyone, offset = slice(0, batch), key.shape[2] - n_queries
    parts: list[tuple[Tensor, Tensor]] = []
    for start in range(0, n_queries, size):
        queries = slice(start, min(start + size, n_queries))
        n_seen = key.shape[2] if visible.mask is not None else offset + queries.stop
        scores = scores_of(query[:, :, queries], key[:, :, :n_seen], scale, softcap)
        if shift is not None:
            scores = shift(scores, everyone, queries, range(n_seen))
        seen = visible.block(everyone, queries, range(n_seen))
        if not isinstance(seen, bool):
            scores = scores.masked_fill(~seen.to(scores.device), float("-inf"))
        logsumexp = scores.logsumexp(-1)
        if sinks is not None:
            sink = sinks.to(query.dtype).to(logsumexp.dtype)[:, None]
            logsumexp = torch.logaddexp(logsumexp, sink)
        pattern = (scores - logsumexp.nan_to_num(neginf=0.0)[..., None]).exp()
        z = weighted_values(pattern, value[:, :, :n_seen].to(pattern.dtype))
        parts.append((z.to(query.dtype), logsumexp))
    z, logsumexp = (torch.cat(found, dim=2) for found in zip(*parts, strict=True))
    return z, logsumexp


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask as numbers to add to the scores."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))
