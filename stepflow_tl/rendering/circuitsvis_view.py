"""Step maps in circuitsvis' `attention_heads`, made safe: offline, escaped, and on a scale that can be seen.

1. Values. circuitsvis colours 0 to 1 and clips the rest, so raw saliency would be blank. Either three decades
   of a common logarithmic scale, or each row relative to its strongest source. Four decimals are kept.
2. Script. circuitsvis' own HTML probes the network and takes its script from a CDN where it can, so a page
   would depend on the machine that made it. This view always carries the bundle that ships in the circuitsvis
   wheel (1.3 MB), and a saved page forbids every request by its content security policy.
3. Text. Labels reach the page as data inside a script element. They are HTML-escaped before that: `</script>`
   in a label would end the script, and some circuitsvis views set labels as innerHTML. Short ids such as T12
   hold no such character, so nothing changes for them.

circuitsvis draws no colour bar and no boundaries; the caption states scale and direction in words.
"""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch

from stepflow_tl.errors import TraceError
from stepflow_tl.rendering.extras import require
from stepflow_tl.rendering.scales import DECADES, log_decades, row_max
from stepflow_tl.result_files import write_atomically
from stepflow_tl.saliency.pooling import Pooling
from stepflow_tl.saliency.result import StepSaliency

Scale = Literal["log", "row"]

_COLOUR = "#3b0f70"
_DECIMALS = 4
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"


@dataclass(frozen=True)
class StepMapView:
    """An interactive view as HTML; a notebook shows it, `save` makes a page of it.

    Attributes:
        html: Self-contained fragment, about 1.3 MB of script included. It loads nothing.
        title: Plain text for the page's title.
    """

    html: str
    title: str

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        """One line; the fragment itself is megabytes long."""
        return f"StepMapView({self.title!r}, {len(self.html) / 1e6:.1f} MB of HTML)"

    def save(self, path: str | Path) -> Path:
        """Write a page that opens from disk without any network, and return its path.

        Raises:
            ResultFileError: If the file cannot be written; `path` is then as it was.
        """
        page = (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
            f"<title>{html.escape(self.title)}</title>\n"
            "<style>body { font-family: system-ui, sans-serif; background: white; color: black }</style>\n"
            f"</head>\n<body>\n{self.html}\n</body>\n</html>\n"
        )
        target = Path(path)
        write_atomically(target, page.encode("utf-8"))
        return target


def show_step_maps(
    saliency: StepSaliency, layer: int | None = None, *, scale: Scale = "log", pooling: Pooling = "mean"
) -> StepMapView:
    """Show the heads of one layer, or the head mean of every stored layer, as selectable heatmaps.

    Args:
        saliency: The step map of one trace.
        layer: Model layer whose heads to show; `None` shows the head mean of each layer side by side.
        scale: `"log"` colours from the largest value of all maps shown (1) to a thousandth of it or less (0);
            `"row"` divides each row by its largest value.
        pooling: How token saliency was pooled, see `StepSaliency.pooled`.

    Returns:
        A view that a notebook displays; `.html` is the fragment, `.save(path)` writes a page.

    Raises:
        ValueError: If `scale` or `pooling` is unknown.
        ModelError: If `layer` is not among the stored ones.
        TraceError: If the trace has no steps.
        MissingExtraError: If circuitsvis is not installed.

    Cost: a browser draws every cell of every map before it shows one. Thirty maps take seconds at 24 steps,
    ten seconds or more at 120; `saliency.select(layers)` shows fewer.
    """
    if scale not in get_args(Scale):
        raise ValueError(f"unknown scale {scale!r}: expected one of {', '.join(get_args(Scale))}")
    if not saliency.labels:
        raise TraceError(
            "this trace has no steps, so there is no map to show: give it a question or thinking"
        )
    attention = require("circuitsvis.attention", purpose="The interactive view")
    if layer is None:
        maps, what = saliency.head_mean(pooling), "head mean of each layer"
        names = [f"L{number}" for number in saliency.layers]
    else:
        maps, what = saliency.pooled(pooling, layers=[layer])[0], f"heads of layer {layer}"
        names = [f"L{layer}H{head}" for head in range(saliency.n_heads)]
    maps = maps.detach().cpu().to(torch.float64)
    values = log_decades(maps) if scale == "log" else row_max(maps)
    rendered = attention.attention_heads(
        attention=values.numpy().round(_DECIMALS),
        tokens=[html.escape(label) for label in saliency.labels],
        attention_head_names=names,
        positive_color=_COLOUR,
        max_value=1,
        min_value=-1,
        mask_upper_tri=True,
    )
    title = f"Step-Saliency, {what}: {saliency.provenance.model_name}"
    caption = f"{title}. {_caption(scale, pooling, float(maps.max()))}"
    fragment = f'<p style="max-width: 60em; margin: 15px">{html.escape(caption)}</p>\n{rendered.local_src}'
    return StepMapView(fragment, title)


def _caption(scale: Scale, pooling: Pooling, largest: float) -> str:
    quantity = {
        "mean": "mean saliency per token pair",
        "causal_mean": "mean saliency per causal token pair",
        "sum": "summed saliency",
    }[pooling]
    if scale == "row":
        colours = f"Each row's {quantity}, relative to the row's largest value (full colour, 1)."
    else:
        colours = (
            f"Logarithm of {quantity}: full colour (1) is the largest value shown, {largest:.2g} nats; "
            f"white (0) is a thousandth of it or less; each third is a factor of {10 ** (DECADES // 3)}."
        )
    return f"Rows are the steps that read, columns the steps they draw on. {colours}"
