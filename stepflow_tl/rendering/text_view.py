"""The trace's text in circuitsvis' `ColoredTokens`: what a step draws on, or what draws on it.

1. Colour. `P[l, i, j]` of `diagnosis.measures.row_shares`, averaged over the layers asked for. Sources of
   step s are row s, which sums to 1; readers of s are column s: the share that each later step gives to s.
   Full colour is the largest share on another step; the step's own share, often far larger, clips there.
2. Lines. circuitsvis makes every white space unbreakable, so a step is cut into lines, each a token that ends
   in a line break, its step's label and share before the first.
3. Text. circuitsvis sets tokens as innerHTML, so what could begin a tag or an entity is escaped. Characters
   that cannot be seen, or that change the order of others, are shown by name.
"""

from __future__ import annotations

import re
import textwrap
from typing import Literal, get_args

from jaxtyping import Float
from torch import Tensor

from stepflow_tl.diagnosis import row_shares
from stepflow_tl.rendering.circuitsvis_view import CircuitsvisView, circuitsvis_view
from stepflow_tl.saliency.pooling import Pooling
from stepflow_tl.saliency.result import StepSaliency
from stepflow_tl.trace.steps import WHITE_SPACE

Direction = Literal["sources", "readers"]

_COLOUR = "#e69f00"  # Okabe and Ito's orange: black text stays readable on it
_WIDTH = 92
_DECIMALS = 4
# What HTML's tokenizer takes for the start of a tag or of an entity; elsewhere both characters are text.
_MARKUP = re.compile(r"&(?=[#A-Za-z])|<(?=[A-Za-z!/?])")
_ENTITY = {"&": "&amp;", "<": "&lt;"}
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)


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

    Returns:
        A view that a notebook displays; `.save(path)` writes a page.

    Raises:
        ValueError: If `direction` or `pooling` is unknown.
        TraceError: If the trace has no such step.
        ModelError: If `layer` is not among the stored ones.
        MissingExtraError: If circuitsvis is not installed.
    """
    if direction not in get_args(Direction):
        raise ValueError(f"unknown direction {direction!r}: expected one of {', '.join(get_args(Direction))}")
    found = saliency.trace.step(step)
    chosen, label = found.index, found.label
    shares = step_shares(saliency, chosen, direction, layer, pooling)
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


def step_shares(
    saliency: StepSaliency, step: int, direction: Direction, layer: int | None, pooling: Pooling
) -> Float[Tensor, " step"]:
    """Row (sources) or column (readers) of the row shares, averaged over layers, in float64."""
    kept = saliency if layer is None else saliency.select([layer])
    shares = row_shares(kept, pooling).mean(dim=0)
    return shares[step] if direction == "sources" else shares[:, step]


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
