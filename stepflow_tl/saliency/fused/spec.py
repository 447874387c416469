"""What one attention call computes, apart from its tensors."""

from __future__ import annotations

from dataclasses import dataclass

from stepflow_tl.saliency.fused.tiles import StepSums


@dataclass(frozen=True)
class AttentionSpec:
    """Scale, mask, soft-cap, and what the backward pass does.

    Attributes:
        scale: Factor on `q . k`.
        window: How many keys a query sees, itself included; None for all earlier ones.
        softcap: Bound of the scores, `cap * tanh(score / cap)`; None for none.
        diagonal_only: Pass gradients on to a token's own key and value only.
        step_sums: Where the pooled saliency goes; None to pool nothing.
        block_divisor: Tiles are smaller by this factor in rows and in keys.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    diagonal_only: bool = False
    step_sums: StepSums | None = None
    block_divisor: int = 1

    def first_key(self, query: int) -> int:
        """The first key that `query` sees."""
        return 0 if self.window is None else max(0, query - self.window + 1)
