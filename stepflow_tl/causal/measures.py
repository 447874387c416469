"""What a cut does to predictions, as one number in nats: larger means that the cut does more harm.

- `nll_change`: how much worse the tokens that follow are predicted, summed over the rows. Negative where the
  cut helps.
- `kl_divergence`: KL(clean || cut) of the next-token distributions, summed over the rows. Never negative.

Both read rows of logits, the token after each row, and the same rows without the cut; a callable with the
same arguments takes their place.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stepflow_tl.errors import KnockoutError
from stepflow_tl.saliency.objectives import token_nll

Measure = Literal["nll", "kl"] | str | Callable[[Tensor, Tensor, Tensor], Any]


def nll_change(
    logits: Float[Tensor, "row vocabulary"],
    clean: Float[Tensor, "row vocabulary"],
    tokens: Int[Tensor, " row"],
) -> Float[Tensor, ""]:
    """NLL of `tokens` under `logits` minus that under `clean`, summed over rows, in nats."""
    return (token_nll(logits, tokens) - token_nll(clean, tokens)).double().sum()


def kl_divergence(
    logits: Float[Tensor, "row vocabulary"],
    clean: Float[Tensor, "row vocabulary"],
    tokens: Int[Tensor, " row"],
) -> Float[Tensor, ""]:
    """KL of the clean distributions from the cut ones, summed over rows, in nats; `tokens` are not read."""
    precise = torch.promote_types(logits.dtype, torch.float32)
    cut, own = logits.to(precise).log_softmax(-1), clean.to(precise).log_softmax(-1)
    probability = own.exp()
    # A token that the model rules out (logit -inf) has probability 0 and adds 0, not NaN.
    terms = torch.where(probability > 0, probability * (own - cut), 0)
    return terms.sum(-1).double().sum()


class EffectMeasure:
    """A measure with its name, whose values are checked."""

    def __init__(self, measure: Measure) -> None:
        """Resolve a name or take a callable.

        Raises:
            KnockoutError: If it is neither.
        """
        known = {"nll": nll_change, "kl": kl_divergence}
        if isinstance(measure, str) and measure in known:
            self.name, self._function = str(measure), known[measure]
        elif callable(measure):
            self.name, self._function = getattr(measure, "__qualname__", repr(measure)), measure
        else:
            raise KnockoutError(
                f"measure is {measure!r}: expected 'nll', 'kl', or a callable (logits [row, vocabulary], "
                "clean [row, vocabulary], tokens [row]) -> number"
            )

    def __call__(self, logits: Tensor, clean: Tensor, tokens: Tensor) -> float:
        """The effect.

        Raises:
            KnockoutError: If a callable does not give one finite number.
        """
        value = self._function(logits, clean, tokens)
        try:
            number = float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise KnockoutError(
                f"measure {self.name!r} returned {_kind(value)}: expected one number"
            ) from error
        if not math.isfinite(number):
            raise KnockoutError(
                f"measure {self.name!r} gave {number}: the logits hold NaN or infinite values. Run the model "
                "in float32, and check its weights and any attached hook."
            )
        return number


def _kind(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
