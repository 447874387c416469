"""One run's attention calls: what each layer is to do, which keys it sees, where its pooled map ends up.

Which keys a query sees is read off the mask function (batch, head, query, key) by which transformers
describes its mask. Ours needs one number, the window:

1. Evaluate the function row block by row block and find what the last query sees: the window.
2. Demand that every row is exactly the causal band of that window. Chunked attention, packed sequences,
   padding and overlays are thus refused instead of being computed wrongly.
3. Return an empty `[0, window]` tensor. It travels to the attention call as the mask would, to any device,
   and its shape is the message. A real mask has no zero-sized axis and is recognised.

Cost of the mask: `O(T^2)` booleans in blocks of rows, once per kind of mask and forward pass; under 1 % of a
run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from stepflow_tl.errors import FusedRefusal
from stepflow_tl.models.attention_calls import UNSERVED, AttentionCalls
from stepflow_tl.saliency.fused.attention import saliency_attention
from stepflow_tl.saliency.fused.bridged import Bridging, SequenceGroups
from stepflow_tl.saliency.fused.call import AttentionSpec, accumulation_dtype
from stepflow_tl.saliency.fused.steps import StepSums, StepTiles
from stepflow_tl.saliency.scores import Score
from stepflow_tl.stepflow.calls import FlowCalls

_MASK_ENTRIES_PER_BLOCK = 1 << 22


@dataclass
class FusedSession(AttentionCalls):
    """What the attention calls of one forward and backward pass share.

    Attributes:
        tiles: Step bins of the trace.
        layers: Layers whose map is pooled.
        diagonal_only: Whether gradients stay at their own position (objective "per_token").
        flow: What StepFlow does in these calls; None without it.
        score: What is pooled.
        anchor: Scalar that requires a gradient; what autograd is asked for.
        sums: Pooled maps by layer, made at the layer's first call.
        seen: Every layer that has come through here.
        closed: Whether no layer should run now, since only the unembedding was asked for.
    """

    name: ClassVar[str] = "stepflow_tl_fused"

    tiles: StepTiles
    layers: frozenset[int]
    diagonal_only: bool
    flow: FlowCalls | None = None
    score: Score = "saliency"
    anchor: Tensor = field(default_factory=lambda: torch.zeros((), requires_grad=True))
    sums: dict[int, StepSums] = field(default_factory=dict)
    seen: set[int] = field(default_factory=set)
    closed: bool = False
    _groups: tuple[SequenceGroups, ...] = ()

    def attend(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        softcap: float | None = None,
        is_causal: bool | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Entry of transformers' `AttentionInterface`; returns z as `[batch, token, head, d_head]`.

        A call that asks for something that is not computed here is refused.
        """
        layer = getattr(module, "layer_idx", None)
        if layer is None:
            raise FusedRefusal(f"{type(module).__name__} does not say which layer it is (no `layer_idx`)")
        if self.closed:
            raise FusedRefusal(
                "the causal LM runs its layers again where only its unembedding was asked for: its logits "
                "are not made from the output of its `base_model`"
            )
        for name in UNSERVED:
            if kwargs.get(name) is not None:
                raise FusedRefusal(f"layer {layer}'s attention takes `{name}`")
        if dropout:
            raise FusedRefusal("attention dropout is on: call model.eval()")
        n_tokens = query.shape[2]
        if n_tokens != len(self.tiles.step_ids) or key.shape[2] != n_tokens:
            raise FusedRefusal(
                f"layer {layer} has {n_tokens} queries and {key.shape[2]} keys, the trace has "
                f"{len(self.tiles.step_ids)} tokens"
            )
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        self.seen.add(layer)
        spec = AttentionSpec(
            scale=float(scaling) if scaling is not None else query.shape[-1] ** -0.5,
            window=window_of(attention_mask, is_causal=bool(causal), n_tokens=n_tokens),
            softcap=softcap,
            diagonal_only=self.diagonal_only,
            block_divisor=self.tiles.block_divisor,
        )
        sinks = kwargs.get("s_aux", kwargs.get("sinks"))
        anchor = self.anchor if layer >= min(self.layers) else None
        if layer in self.layers and layer not in self.sums:
            like: Any = dict(dtype=accumulation_dtype(query.dtype), device=query.device)
            self.sums[layer] = StepSums.zeros(self.tiles, query.shape[1], **like, score=self.score)
        sums = self.sums.get(layer)
        bridging = self._bridging(layer, n_tokens, query.device)
        z = saliency_attention(
            query, key, value, spec, sums=sums, sinks=sinks, anchor=anchor, bridging=bridging
        )
        z = z.transpose(1, 2).contiguous()
        return z if self.flow is None else self.flow.injected(layer, value, z), None

    def _bridging(self, layer: int, n_tokens: int, device: torch.device) -> Bridging | None:
        """The bridge of a layer; None where it has none."""
        bridge = None if self.flow is None else self.flow.bridge_of(layer, device)
        if self.flow is None or bridge is None:
            return None
        if not self._groups:
            self._groups = (SequenceGroups(self.flow.spans(n_tokens), 0, n_tokens),)
        return Bridging(bridge, self.flow.spans(n_tokens, device), self._groups)

    @staticmethod
    def mask(**kwargs: Any) -> Tensor:
        """Entry of transformers' `AttentionMaskInterface`."""
        return band_mask(**kwargs)

    def check_seen(self, n_layers: int) -> None:
        """Refuse a model of which one of the `n_layers` layers has not come through here."""
        missing = sorted(set(range(n_layers)) - self.seen)
        if missing:
            raise FusedRefusal(
                f"layer(s) {missing} did not call transformers' attention interface (a state-space, "
                "convolution or linear-attention layer, or an attention of its own)"
            )


def band_mask(
    *,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Any],
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    device: Any = None,
    **_: Any,
) -> Tensor:
    """An empty `[0, window]` tensor for a causal band, from what transformers says of a mask.

    Every mask that is not a causal band over one unpadded sequence is refused.
    """
    if q_length != kv_length or int(q_offset) != 0 or int(kv_offset) != 0:
        raise FusedRefusal(
            f"{q_length} queries meet {kv_length} keys (a KV cache): it needs the whole sequence in one pass"
        )
    if attention_mask is not None and not bool(attention_mask.all()):
        raise FusedRefusal("the attention mask hides tokens (padding): pass one unpadded sequence")
    return torch.empty(0, _band_width(mask_function, q_length), device=device)


def window_of(mask: Tensor | None, *, is_causal: bool, n_tokens: int) -> int | None:
    """The window that a `band_mask` stands for; None where queries see every earlier key."""
    if mask is None:
        if not is_causal:
            raise FusedRefusal("the attention is not causal")
        return None
    if mask.ndim != 2 or mask.shape[0] != 0:
        raise FusedRefusal(f"the model builds its own attention mask of shape {tuple(mask.shape)}")
    return None if mask.shape[1] >= n_tokens else mask.shape[1]


def _band_width(mask_function: Callable[..., Any], n_tokens: int) -> int:
    zero = torch.zeros(1, 1, dtype=torch.long)
    keys = torch.arange(n_tokens)[None, :]

    def visible(first: int, last: int) -> Tensor:
        rows = torch.arange(first, last)[:, None]
        return torch.as_tensor(mask_function(zero, zero, rows, keys)).expand(last - first, n_tokens)

    try:
        window = int(visible(n_tokens - 1, n_tokens).sum())
        block = max(1, _MASK_ENTRIES_PER_BLOCK // n_tokens)
        for first in range(0, n_tokens, block):
            last = min(first + block, n_tokens)
            rows = torch.arange(first, last)[:, None]
            if not torch.equal(visible(first, last), (keys <= rows) & (keys > rows - window)):
                raise FusedRefusal("the attention mask is neither causal nor a causal sliding window")
    except (IndexError, RuntimeError, TypeError) as error:
        raise FusedRefusal(f"the attention mask cannot be evaluated by index ({error})") from error
    return window
