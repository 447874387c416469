"""Views in circuitsvis: step maps and knockout maps as heatmaps, and the trace's text coloured by shares.

`show_step_maps` and `show_knockout`, in `AttentionHeads`:

1. Saliency. circuitsvis colours 0 to 1 and clips the rest, so raw saliency would be blank. Three decades of a
   logarithmic scale of each row's shares, as in `step_map_figure`; or each row relative to its strongest
   source; or three decades below the largest value of all. The last is blank in rows whose loss is small
   beside that of others: a token that the model is sure of has a gradient near 0, so a thinking step can lie
   five decades below the question. It compares rows; it is not the default.
2. Knockout. One heatmap on a linear scale, two colours for the two signs. Values are divided by the largest
   size of any effect, so +1 is the cut that hurts most if that is the largest effect; a pair that was not
   measured is white like a pair without effect, and the caption counts the measured ones.
3. Number. A browser draws every cell of every map before it shows one, some 0.1 ms each. Layers beyond
   `_MOST_CELLS` are thinned evenly over depth, and the caption says so.

`show_text`, in `ColoredTokens`:

1. Colour. `P[l, i, j]` of `diagnosis.row_shares`, averaged over the layers asked for. Sources of step s are
   row s, which sums to 1; readers of s are column s: the share that each later step gives to s. Full colour
   is the largest share on another step; the step's own share, often far larger, clips there.
2. Lines. circuitsvis makes every white space unbreakable, so a step is cut into lines, each a token that ends
   in a line break, its step's label and share before the first.
3. Characters that cannot be seen, or that change the order of others, are shown by name.

circuitsvis sets labels and tokens as innerHTML, so what could begin a tag or an entity is escaped. It draws
no colour bar and no boundaries; captions state scale and direction. Four decimals of a value are kept.
"""

from __future__ import annotations

import html
import re
import textwrap
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from stepflow_tl.causal.knockout_result import StepKnockout
from stepflow_tl.causal.spot_check import SpotCheck
from stepflow_tl.diagnosis import row_shares
from stepflow_tl.rendering.circuitsvis_view import CircuitsvisView, circuitsvis_view
from stepflow_tl.rendering.layout import (
    DECADES,
    PER_PAIR,
    evenly_over_depth,
    log_decades,
    require_steps,
    row_max,
    saliency_words,
    share_decades,
    signed_extent,
)
from stepflow_tl.saliency.pooling import Pooling
from stepflow_tl.saliency.result import StepSaliency
from stepflow_tl.saliency.scores import Score
from stepflow_tl.trace.steps import WHITE_SPACE

Scale = Literal["share", "row", "log", "signed"]
Direction = Literal["sources", "readers"]

_SCALES = {"share": share_decades, "row": row_max, "log": log_decades, "signed": signed_extent}
_PURPLE, _GREEN = "#3b0f70", "#00806a"
_COLOUR = "#e69f00"  # Okabe and Ito's orange: black text stays readable on it
_WIDTH = 92
# What HTML's tokenizer takes for the start of a tag or of an entity; elsewhere both characters are text.
_MARKUP = re.compile(r"&(?=[#A-Za-z])|<(?=[A-Za-z!/?])")
_ENTITY = {"&": "&amp;", "<": "&lt;"}
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)
_DECIMALS = 4
_MOST_CELLS = 60_000
_FEWEST_LAYERS = 6


def show_step_maps(
    saliency: StepSaliency,
    layer: int | None = None,
    *,
    scale: Scale | None = None,
    pooling: Pooling = "mean",
    check: SpotCheck | None = None,
) -> CircuitsvisView:
    """Show the heads of one layer, or the head mean of every stored layer, as selectable heatmaps.

    Args:
        saliency: The step map of one trace.
        layer: Model layer whose heads to show; `None` shows the head mean of each layer side by side, or of
            some layers evenly over depth where all would take a browser too long: from 47 steps on for 28
            layers.
        scale: `"share"` colours what part of a row's saliency a cell is, from all of it (1) to a thousandth
            or less (0), logarithmically; `"row"` divides each row by its largest value; `"log"` colours from
            the largest value of all maps shown (1) to a thousandth of it or less (0), logarithmically;
            `"signed"` has a colour for each sign, linearly up to the largest size shown, and is the only one
            for maps whose score is signed. By default "share", or "signed" for those.
        pooling: How token saliency was pooled, see `StepSaliency.pooled`.
        check: A `spot_check` of this map; the caption ends with what it found.

    Raises:
        ValueError: If `scale` or `pooling` is unknown.
        ComparisonError: If the check is of another map.
        ModelError: If `layer` is not among the stored ones.
        TraceError: If the trace has no steps.
        ScoreError: If the scale does not go with the map's score.
        MissingExtraError: If circuitsvis is not installed.

    Cost: a browser takes about 0.1 ms per cell of a map: seconds for the layers of 24 steps, ten seconds or
    more for 8 heads of 120 steps. `report` shows any number at once.
    """
    if scale is None:
        scale = "signed" if saliency.signed else "share"
    if scale not in get_args(Scale):
        raise ValueError(f"unknown scale {scale!r}: expected one of {', '.join(get_args(Scale))}")
    if scale != "signed":
        saliency.require_unsigned(f"scale={scale!r}")
    cells = require_steps(saliency) ** 2
    if layer is None:
        shown = evenly_over_depth(saliency.layers, max(_FEWEST_LAYERS, _MOST_CELLS // cells))
        maps, what = saliency.head_mean(pooling, layers=shown), "head mean of each layer"
        if len(shown) < len(saliency.layers):
            what = f"head mean of {len(shown)} of {len(saliency.layers)} layers, evenly over depth"
        names = [f"L{number}" for number in shown]
    else:
        maps, what = saliency.pooled(pooling, layers=[layer])[0], f"heads of layer {layer}"
        names = [f"L{layer}H{head}" for head in range(saliency.n_heads)]
    maps = maps.detach().cpu().to(torch.float64)
    title = f"{saliency.title}, {what}: {saliency.provenance.model_name}"
    caption = f"{title}. {_caption(scale, pooling, float(maps.abs().max()), saliency.score)}"
    if check is not None:
        caption += f" {check.line_for(saliency)}"
    colours = {"negativeColor": _GREEN} if scale == "signed" else {}
    return _heatmaps(_SCALES[scale](maps), names, saliency.labels, title, caption, **colours)


def show_knockout(knockout: StepKnockout, *, pooling: Pooling = "sum") -> CircuitsvisView:
    """Show the effects as a heatmap; where pairs were cut in groups only, a second one shows these.

    Args:
        knockout: The effects of one trace.
        pooling: As in `StepKnockout.pooled`; of pairs cut alone.

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
    values, names = (effects / (largest or 1.0))[None], [html.escape(knockout.measure)]
    caption = " ".join([caption, *(f"{line}." for line in knockout.in_words())])
    if (bounds := knockout.bounds.double()).isfinite().any():
        bounds = bounds.nan_to_num()
        values = torch.cat([values, bounds[None] / (float(bounds.max()) or 1.0)])
        names.append("together")
        caption += f" The second map is the size of their joint effect, up to {float(bounds.max()):.2g}."
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


def _caption(scale: Scale, pooling: Pooling, largest: float, score: Score) -> str:
    quantity = saliency_words(pooling, score) + PER_PAIR[pooling]
    hurts, helps = (", the cut hurts", ", it helps") if score == "cut" else ("", "")
    third = f"each third is a factor of {10 ** (DECADES // 3)}."
    colours = {
        "share": f"Share of a row's {quantity}, logarithmic: full colour (1) is all of it, white (0) a "
        f"thousandth or less; {third}",
        "row": f"Each row's {quantity}, relative to the row's largest value (full colour, 1).",
        "log": f"Logarithm of {quantity}: full colour (1) is the largest value shown, {largest:.2g} nats; "
        f"white (0) is a thousandth of it or less; {third}",
        "signed": f"{quantity.capitalize()}, from {largest:.2g} nats (purple{hurts}) to -{largest:.2g} "
        f"(green{helps}).",
    }[scale]
    return f"Rows are the steps that read, columns the steps they draw on. {colours}"


def show_text(
    saliency: StepSaliency,
    step: str | int,
    *,
    direction: Direction = "sources",
    layer: int | None = None,
    pooling: Pooling = "mean",
) -> CircuitsvisView:
    """Show the trace's steps, coloured by what one of them draws on or by what draws on it.

    Args:
        saliency: The step map of one trace.
        step: The chosen step: its label ("T3") or its index.
        direction: `"sources"` colours by the shares of the step's saliency (its row); `"readers"` by the
            share that each later step gives to it (its column).
        layer: Model layer whose head mean to read; `None` averages the shares of all stored layers.
        pooling: How token saliency was pooled, see `StepSaliency.pooled`.

    Raises:
        ValueError: If `direction` or `pooling` is unknown.
        ScoreError: If the map's score is signed: there are no shares.
        TraceError: If the trace has no such step.
        ModelError: If `layer` is not among the stored ones.
        MissingExtraError: If circuitsvis is not installed.
    """
    if direction not in get_args(Direction):
        raise ValueError(f"unknown direction {direction!r}: expected one of {', '.join(get_args(Direction))}")
    found = saliency.trace.step(step)
    chosen, label = found.index, found.label
    # In float64: row (sources) or column (readers) of the mean over layers.
    all_shares = row_shares(saliency if layer is None else saliency.select([layer]), pooling).mean(dim=0)
    shares = all_shares[chosen] if direction == "sources" else all_shares[:, chosen]
    others = [share for index, share in enumerate(shares.tolist()) if index != chosen]
    largest = max(others, default=0.0) or 1.0
    tokens, values = _coloured_lines(saliency, chosen, shares, direction)
    where = f"mean of {len(saliency.layers)} layers" if layer is None else f"layer {layer}"
    if direction == "sources":
        what = f"What {label} draws on"
        meaning = f"Percentages are shares of {label}'s saliency over the steps up to it; they sum to 100 %."
    else:
        what = f"What draws on {label}"
        meaning = f"Percentages are the share of each step's own saliency that falls on {label}."
    title = f"{what}, {where}: {saliency.provenance.model_name}"
    caption = (
        f"{title}. Most: {_strongest(saliency, chosen, shares)}. {meaning} "
        f"Full colour is {100 * largest:.3g} %, the largest of any other step, or more."
    )
    props = {
        "tokens": tokens,
        "values": values,
        "minValue": -largest,
        "maxValue": largest,
        "positiveColor": _COLOUR,
    }
    style = "font: 14px/1.5 ui-monospace, 'DejaVu Sans Mono', monospace; max-height: 46em; overflow-y: auto"
    return circuitsvis_view("ColoredTokens", props, title=title, caption=caption, style=style)


def _strongest(saliency: StepSaliency, chosen: int, shares: Float[Tensor, " step"]) -> str:
    """The three other steps with the largest shares: the text scrolls, and they may be out of sight."""
    order = shares.argsort(descending=True, stable=True).tolist()
    others = [i for i in order if i != chosen and shares[i] > 0][:3]
    return ", ".join(f"{saliency.labels[i]} ({100 * float(shares[i]):.3g} %)" for i in others) or "none"


def _coloured_lines(
    saliency: StepSaliency, chosen: int, shares: Float[Tensor, " step"], direction: Direction
) -> tuple[list[str], list[float]]:
    tokens: list[str] = []
    values: list[float] = []
    width = max(len(label) for label in saliency.labels)
    for index, (step, share) in enumerate(zip(saliency.trace.steps, shares.tolist(), strict=True)):
        applies = index <= chosen if direction == "sources" else index >= chosen
        head = f"{'▸' if index == chosen else ' '}{step.label:>{width}} "
        head += f"{100 * share:6.2f} %  " if applies else " " * 10
        for number, line in enumerate(_lines(step.text)):
            start = head if number == 0 else " " * len(head)
            tokens.append(f"{start}{escaped(line)}\n")
            values.append(round(share, _DECIMALS))
    return tokens, values


def _lines(text: str) -> list[str]:
    """The text's own lines, long ones cut, without the blank ones at its end."""
    seen = _UNSEEN.sub(
        lambda found: f"[U+{ord(found[0]):04X}]", text.replace("\r\n", "\n").rstrip(WHITE_SPACE)
    )
    wrap = textwrap.TextWrapper(_WIDTH, replace_whitespace=False, break_on_hyphens=False, expand_tabs=False)
    return [part for line in seen.split("\n") for part in (wrap.wrap(line) or [""])]


def escaped(text: str) -> str:
    """The text as innerHTML reads it back; what cannot be markup is left alone, so tooltips stay plain."""
    return _MARKUP.sub(lambda found: _ENTITY[found[0]], text)
