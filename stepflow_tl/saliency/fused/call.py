"""What one attention call computes, and what its backward pass has to work with."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stepflow_tl.errors import FusedRefusal
from stepflow_tl.saliency.fused.bridged import BridgedTerms


@dataclass(frozen=True)
class AttentionSpec:
    """Scale, mask, soft-cap, and what the backward pass does.

    Attributes:
        scale: Factor on `q . k`.
        window: How many keys a query sees, itself included; None for all earlier ones.
        softcap: Bound of the scores, `cap * tanh(score / cap)`; None for none.
        diagonal_only: Pass gradients on to a token's own key and value only.
        block_divisor: Tiles are smaller by this factor in rows and in keys.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    diagonal_only: bool = False
    block_divisor: int = 1

    def first_key(self, query: int) -> int:
        """The first key that `query` sees."""
        return 0 if self.window is None else max(0, query - self.window + 1)

    def window_within(self, n_tokens: int) -> int | None:
        """The window where it hides anything of so many tokens, else None."""
        return None if self.window is None or self.window >= n_tokens else self.window


@dataclass(frozen=True)
class BackwardCall:
    """One attention call as its backward pass finds it: a batch, one sequence, or one KV group of it.

    Attributes:
        query: Queries `[*batch, head, token, d_head]`; consecutive heads share a KV head.
        key: Keys `[*batch, kv_head, token, d_head]`.
        value: Values `[*batch, kv_head, token, d_value]`.
        logsumexp: Natural logarithm of each row's normaliser, after scale and soft-cap, sink included,
            `[*batch, head, token]`.
        dz: dL/dz, `[*batch, head, token, d_value]`.
        delta: `<dz, z>` of each row, z without the bridge, `[*batch, head, token]`.
        spec: What is computed.
        bridged: What the bridge does to each row; None without one.
        sink_mass: Mass of the sink in each row, `[*batch, head, token]`; None without one.

    Raises:
        FusedRefusal: If the shapes do not fit together.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    logsumexp: Tensor
    dz: Tensor
    delta: Tensor
    spec: AttentionSpec
    bridged: BridgedTerms | None = None
    sink_mass: Tensor | None = None

    def __post_init__(self) -> None:
        """Refuse tensors that do not fit together."""
        *batch, n_heads, n_tokens, d_head = self.query.shape
        n_kv_heads, d_value = self.key.shape[-3], self.value.shape[-1]
        if n_heads % n_kv_heads:
            raise FusedRefusal(f"{n_heads} query heads cannot share {n_kv_heads} KV heads evenly")
        expected = {
            "key": (*batch, n_kv_heads, n_tokens, d_head),
            "value": (*batch, n_kv_heads, n_tokens, d_value),
            "dz": (*batch, n_heads, n_tokens, d_value),
            "logsumexp": (*batch, n_heads, n_tokens),
            "delta": (*batch, n_heads, n_tokens),
            "sink_mass": (*batch, n_heads, n_tokens),
        }
        for name, shape in expected.items():
            if name == "sink_mass" and self.sink_mass is None:
                continue
            found = tuple(getattr(self, name).shape)
            if found != shape:
                raise FusedRefusal(
                    f"`{name}` has shape {found}; {shape} goes with query {tuple(self.query.shape)}"
                )

    @property
    def n_tokens(self) -> int:
        """Number of tokens."""
        return self.query.shape[-2]

    @property
    def heads_per_group(self) -> int:
        """How many query heads share one KV head."""
        return self.query.shape[-3] // self.key.shape[-3]

    def sequence(self, batch: int) -> BackwardCall:
        """One sequence of the batch."""
        names = ("query", "key", "value", "logsumexp", "dz", "delta")
        bridged = None if self.bridged is None else self.bridged.sequence(batch)
        sink_mass = None if self.sink_mass is None else self.sink_mass[batch]
        own = {name: getattr(self, name)[batch] for name in names}
        return replace(self, bridged=bridged, sink_mass=sink_mass, **own)

    def kv_heads(self, first: int, last: int) -> BackwardCall:
        """The KV heads `[first, last)` of one sequence, and the query heads that share them."""
        heads = slice(first * self.heads_per_group, last * self.heads_per_group)
        shared = {name: getattr(self, name)[first:last] for name in ("key", "value")}
        own = {name: getattr(self, name)[heads] for name in ("query", "logsumexp", "dz", "delta")}
        bridged = None if self.bridged is None else self.bridged.heads(heads)
        sink_mass = None if self.sink_mass is None else self.sink_mass[heads]
        return replace(self, bridged=bridged, sink_mass=sink_mass, **shared, **own)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """At least float32."""
    return torch.promote_types(dtype, torch.float32)
