"""What computes attention once it is installed (`attention_interface`).

`PlainAttention` hands a call to transformers' own SDPA function, bit for bit, unless somebody needs more of
it: the logsumexp of its rows, other scores, a soft-cap or sinks. Then `attention.Call` computes it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from stepflow_tl.models.attention import Call, ScoreShift, Visible


class AttentionCalls(ABC):
    """What computes attention while it is installed.

    Attributes:
        name: Under which transformers finds it; one per class.
    """

    name: ClassVar[str]

    @abstractmethod
    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """Entry of transformers' `AttentionInterface`; returns z as `[batch, token, head, d_head]`."""

    @staticmethod
    @abstractmethod
    def mask(**kwargs: Any) -> Any:
        """Entry of transformers' `AttentionMaskInterface`."""


#: Keyword arguments of attention functions that change what is computed, and that nothing of ours implements.
UNSERVED = (
    "position_bias",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "indices",
    "block_indices",
    "head_mask",
    "cache",
)


class PlainAttention(AttentionCalls):
    """Attention as transformers computes it with "sdpa"; what that cannot do, in blocks of queries.

    Subclasses say in which layers they need the logsumexp, what changes its scores, and what they make of a
    call.
    """

    name: ClassVar[str] = "stepflow_tl_plain"

    def attend(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        scaling: float | None = None,
        dropout: float = 0.0,
        softcap: float | None = None,
        is_causal: bool | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """The output of one call, as `[batch, token, head, d_head]`."""
        layer = getattr(module, "layer_idx", None)
        sinks = kwargs.get("s_aux", kwargs.get("sinks"))
        needed = self.needs_logsumexp(layer, query, key, kwargs)
        shift = self.shift(layer, query, key, kwargs)
        if softcap is None and sinks is None and shift is None and not needed:
            from transformers.integrations.sdpa_attention import sdpa_attention_forward

            z, _ = sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
            )
        else:
            visible = Visible(query.shape[2], key.shape[2], attention_mask)
            scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
            call = Call.computed(query, key, value, visible, scale, softcap, sinks, shift)
            z = self.output(layer, call).transpose(1, 2).contiguous()
        return self.finished(layer, value, z), None

    def needs_logsumexp(
        self, layer: int | None, query: Tensor, key: Tensor, arguments: Mapping[str, Any]
    ) -> bool:
        """Whether `output` is to be asked about this call, whatever computes it."""
        return False

    def shift(
        self, layer: int | None, query: Tensor, key: Tensor, arguments: Mapping[str, Any]
    ) -> ScoreShift | None:
        """What changes the scores of this call; None where nothing does."""
        return None

    def output(self, layer: int | None, call: Call) -> Tensor:
        """What becomes of a call that was computed with its logsumexp."""
        return call.z

    def finished(self, layer: int | None, value: Tensor, z: Tensor) -> Tensor:
        """The last word on every call; z is `[batch, token, head, d_head]`."""
        return z

    @staticmethod
    def mask(**kwargs: Any) -> Tensor | None:
        """The mask of "sdpa"."""
        from transformers.masking_utils import sdpa_mask

        return sdpa_mask(**kwargs)
