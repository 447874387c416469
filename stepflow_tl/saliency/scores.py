"""The three scores that a pattern and its gradient give: what is summed over the tokens of two steps.

Notation of one row t of one layer and head: p the pattern (under StepFlow's bridge the bridged one),
`c_k = dL/dp[t, k] = <dz_t, v_k>`.

1. `"saliency"`, the paper's: `|p_k c_k|`. Not negative; what shares and `diagnose` are made of.
2. `"signed"`: `p_k c_k`, so that opposite signs cancel. Scale the edge by `1 - eps`, after the softmax and
   without renormalising, and L changes by `- eps` times its sum (`causal.linearity`).
3. `"cut"`: what removing step j from the row's softmax does to L, to first order in z. The other keys, a sink
   among them, take over j's mass in proportion. With j's mass `P_j = sum p_k` and gain `G_j = sum p_k c_k`,
   and R, H the same sums over all that is left in the row (a sink has mass and no gain),

       effect = <dz, z_cut - z> = P_j H / R - G_j = (P_j <dz, z> - G_j) / (1 - P_j)    (rows that sum to one).

   In nats, positive where the cut hurts, as in step knockout, of which it is the first order with one layer's
   row cut at a time. The left form is computed: R and H are sums over the others, not differences from one,
   so a step that holds nearly all of a row loses no digits. Without a sink, a constant added to all c of a
   row (a part of the values that all keys share) changes no effect.

An effect is 0 where nothing is left in the row once the step is removed (the first tokens of a trace).
TEMPLATE is a step like any other here. Of a pair (i, i), which knockout never cuts, the row loses its own
step's tokens, itself included.

`"saliency"` and `"signed"` are sums over token pairs; `"cut"` is not: its two sums per row and step are
`O(T * steps)` numbers, of which only some rows live at a time.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from stepflow_tl.errors import ScoreError

Score = Literal["saliency", "signed", "cut"]

#: What a map of each score is called.
TITLES: dict[str, str] = {"saliency": "Step-Saliency", "signed": "Signed saliency", "cut": "Cut score"}


def check_score(score: str) -> None:
    """Refuse a name that is no score.

    Raises:
        ScoreError: If it is not one of the three.
    """
    if score not in get_args(Score):
        raise ScoreError(f"unknown score {score!r}: expected one of {', '.join(get_args(Score))}")


def cut_effects(
    mass: Float[Tensor, "*row bin"],
    gain: Float[Tensor, "*row bin"],
    sink_mass: Float[Tensor, "*row"] | None = None,
) -> Float[Tensor, "*row bin"]:
    """First-order effect on each row's loss of removing each bin of keys from its softmax.

    Args:
        mass: `P`, the pattern summed over each bin, in at least float32; the bins hold all keys.
        gain: `G`, pattern times gradient summed over each bin.
        sink_mass: Mass of a sink, which joins the softmax without a value; None without one.

    Returns:
        `P H / R - G`, in nats; 0 where nothing else is left.
    """
    largest = mass.argmax(-1, keepdim=True)
    rest_mass, rest_gain = _all_others(mass, largest), _all_others(gain, largest)
    if sink_mass is not None:
        rest_mass += sink_mass[..., None]
    # Below this, numbers are denormal and a ratio of them means nothing.
    smallest = torch.finfo(mass.dtype).tiny / torch.finfo(mass.dtype).eps
    mean_gain = rest_gain.div_(rest_mass.clamp(min=smallest))
    return mean_gain.mul_(mass).sub_(gain).masked_fill_(rest_mass <= smallest, 0)


def _all_others(sums: Float[Tensor, "*row bin"], largest: Tensor) -> Float[Tensor, "*row bin"]:
    """For each bin, the sum over the others.

    A difference from the total, but for the bin with the largest mass: every other bin leaves at least half
    of the row's mass, so only there could the difference be all rounding.
    """
    others = sums.sum(-1, keepdim=True) - sums
    return others.scatter_(-1, largest, sums.scatter(-1, largest, 0.0).sum(-1, keepdim=True))
