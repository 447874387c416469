"""Step maps and knockout maps in circuitsvis' `attention_heads`, on scales that can be seen.

1. Saliency. circuitsvis colours 0 to 1 and clips the rest, so raw saliency would be blank. Three decades of a
   logarithmic scale of each row's shares, as in `step_map_figure`; or each row relative to its strongest
   source; or three decades below the largest value of all. The last is blank in rows whose loss is small
   beside that of others: a token that the model is sure of has a gradient near 0, so a thinking step can lie
   five decades below the question. It compares rows; it is not the default.
2. Knockout. One heatmap on a linear scale, two colours for the two signs. Values are divided by the largest
   size of any effect, so +1 is the cut that hurts most if that is the largest effect; a pair that was not
   measured is white like a pair without effect, and the caption counts the measured ones.
3. Labels. circuitsvis sets them as innerHTML, so they are escaped; short ids such as T12 hold no such
   character, so nothing changes for them. Four decimals of a value are kept.
4. Number. A browser draws every cell of every map before it shows one, some 0.1 ms each. Layers beyond
   `_MOST_CELLS` are thinned evenly over depth, and the caption says so.

circuitsvis draws no colour bar and no boundaries; the caption states scale and direction in words.
"""

from __future__ import annotations

import html
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from stepflow_tl.causal.knockout_result import StepKnockout
from stepflow_tl.errors import TraceError
from stepflow_tl.rendering.circuitsvis_view import CircuitsvisView, circuitsvis_view
from stepflow_tl.rendering.layout import (
    DECADES,
    PER_PAIR,
    evenly_over_depth,
    log_decades,
    row_max,
    saliency_words,
    share_decades,
)
from stepflow_tl.saliency.pooling import Pooling
from stepflow_tl.saliency.result import StepSaliency

Scale = Literal["share", "row", "log"]

_SCALES = {"share": share_decades, "row": row_max, "log": log_decades}
_PURPLE, _GREEN = "#3b0f70", "#00806a"
_DECIMALS = 4
_MOST_CELLS = 60_000
_FEWEST_LAYERS = 6


def show_step_maps(
    saliency: StepSaliency, layer: int | None = None, *, scale: Scale = "share", pooling: Pooling = "mean"
) -> CircuitsvisView:
    """Show the heads of one layer, or the head mean of every stored layer, as selectable heatmaps.

    Args:
        saliency: The step map of one trace.
        layer: Model layer whose heads to show; `None` shows the head mean of each layer side by side, or of
            some layers evenly over depth where all would take a browser too long: from 47 steps on for 28
            layers.
        scale: `"share"` colours what part of a row's saliency a cell is, from all of it (1) to a thousandth
            or less (0), logarithmically; `"row"` divides each row by its largest value; `"log"` colours from
            the largest value of all maps shown (1) to a thousandth of it or less (0), logarithmically.
        pooling: How token saliency was pooled, see `StepSaliency.pooled`.

    Returns:
        A view that a notebook displays; `.html` is all of it, `.save(path)` writes a page.

    Raises:
        ValueError: If `scale` or `pooling` is unknown.
        ModelError: If `layer` is not among the stored ones.
        TraceError: If the trace has no steps.
        MissingExtraError: If circuitsvis is not installed.

    Cost: a browser takes about 0.1 ms per cell of a map: seconds for the layers of 24 steps, ten seconds or
    more for 8 heads of 120 steps. `report` shows any number at once.
    """
    if scale not in get_args(Scale):
        raise ValueError(f"unknown scale {scale!r}: expected one of {', '.join(get_args(Scale))}")
    if not saliency.labels:
        raise TraceError(
            "this trace has no steps, so there is no map to show: give it a question or thinking"
        )
    if layer is None:
        shown = evenly_over_depth(
            saliency.layers, max(_FEWEST_LAYERS, _MOST_CELLS // len(saliency.labels) ** 2)
        )
        maps, what = saliency.head_mean(pooling, layers=shown), "head mean of each layer"
        if len(shown) < len(saliency.layers):
            what = f"head mean of {len(shown)} of {len(saliency.layers)} layers, evenly over depth"
        names = [f"L{number}" for number in shown]
    else:
        maps, what = saliency.pooled(pooling, layers=[layer])[0], f"heads of layer {layer}"
        names = [f"L{layer}H{head}" for head in range(saliency.n_heads)]
    maps = maps.detach().cpu().to(torch.float64)
    title = f"Step-Saliency, {what}: {saliency.provenance.model_name}"
    caption = f"{title}. {_caption(scale, pooling, float(maps.max()))}"
    return _heatmaps(_SCALES[scale](maps), names, saliency.labels, title, caption)


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
    title = f"Step knockout: {knockout.provenance.model_name}"
    onto = "its own predictions" if knockout.onto is None else knockout.onto
    caption = (
        f"{title}. Rows are the steps that read, columns the steps they were cut from; measured on {onto}. "
        f"Effect of the cut{PER_PAIR[pooling]} ({knockout.measure}), from {largest:.2g} (purple, the cut "
        f"hurts) to -{largest:.2g} (green, it helps). {int(knockout.measured.sum())} pairs were measured."
    )
    values = (effects / (largest or 1.0))[None]
    names = [html.escape(knockout.measure)]
    return _heatmaps(values, names, knockout.labels, title, caption, negativeColor=_GREEN)


def _heatmaps(
    values: Float[Tensor, "map query_step key_step"],
    names: list[str],
    labels: list[str],
    title: str,
    caption: str,
    **colours: str,
) -> CircuitsvisView:
    """Lower triangles of values from -1 to 1; `names` are HTML already, `labels` are not."""
    props = {
        "attention": values.numpy().round(_DECIMALS).tolist(),
        "attentionHeadNames": names,
        "tokens": [html.escape(label) for label in labels],
        "positiveColor": _PURPLE,
        **colours,
        "maxValue": 1,
        "minValue": -1,
        "maskUpperTri": True,
    }
    return circuitsvis_view("AttentionHeads", props, title=title, caption=caption)


def _caption(scale: Scale, pooling: Pooling, largest: float) -> str:
    quantity = saliency_words(pooling) + PER_PAIR[pooling]
    if scale == "share":
        colours = (
            f"Share of a row's {quantity}, logarithmic: full colour (1) is all of it, white (0) a thousandth "
            f"or less; each third is a factor of {10 ** (DECADES // 3)}."
        )
    elif scale == "row":
        colours = f"Each row's {quantity}, relative to the row's largest value (full colour, 1)."
    else:
        colours = (
            f"Logarithm of {quantity}: full colour (1) is the largest value shown, {largest:.2g} nats; "
            f"white (0) is a thousandth of it or less; each third is a factor of {10 ** (DECADES // 3)}."
        )
    return f"Rows are the steps that read, columns the steps they draw on. {colours}"
