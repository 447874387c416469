"""A knockout map as a circuitsvis view: one heatmap on a linear scale, two colours for the two signs.

Values are divided by the largest size of any effect, so +1 is the cut that hurts most if that is the largest
effect; a pair that was not measured is white like a pair without effect, and the caption counts them.
Escaping and offline use are those of `circuitsvis_view`.
"""

from __future__ import annotations

import html

from stepflow_tl.causal.knockout_result import StepKnockout
from stepflow_tl.rendering.circuitsvis_view import CircuitsvisView, circuitsvis_view
from stepflow_tl.saliency.pooling import Pooling

_HURTS, _HELPS = "#3b0f70", "#00806a"
_DECIMALS = 4
_UNIT = {
    "sum": "effect of the cut",
    "mean": "effect of the cut per token pair",
    "causal_mean": "effect of the cut per causal token pair",
}


def show_knockout(knockout: StepKnockout, *, pooling: Pooling = "sum") -> CircuitsvisView:
    """Show the effects as a heatmap.

    Args:
        knockout: The effects of one trace.
        pooling: As in `StepKnockout.pooled`.

    Returns:
        A view that a notebook displays; `.html` is all of it, `.save(path)` writes a page.

    Raises:
        ValueError: If `pooling` is unknown.
        MissingExtraError: If circuitsvis is not installed.
    """
    effects = knockout.pooled(pooling).double()
    largest = float(effects.abs().max())
    props = {
        "attention": (effects / (largest or 1.0)).numpy().round(_DECIMALS)[None].tolist(),
        "attentionHeadNames": [html.escape(knockout.measure)],
        "tokens": [html.escape(label) for label in knockout.labels],
        "positiveColor": _HURTS,
        "negativeColor": _HELPS,
        "maxValue": 1,
        "minValue": -1,
        "maskUpperTri": True,
    }
    title = f"Step knockout: {knockout.provenance.model_name}"
    onto = "its own predictions" if knockout.onto is None else knockout.onto
    caption = (
        f"{title}. Rows are the steps that read, columns the steps they were cut from; measured on {onto}. "
        f"{_UNIT[pooling].capitalize()} ({knockout.measure}), from {largest:.2g} (purple, the cut hurts) to "
        f"-{largest:.2g} (green, it helps). {int(knockout.measured.sum())} pairs were measured."
    )
    return circuitsvis_view("AttentionHeads", props, title=title, caption=caption)
