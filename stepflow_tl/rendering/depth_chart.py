"""Small charts over depth, as SVG: for pages that follow the reader's colours and for files beside Markdown.

1. One or two curves over the layers, in the colours and dashes of every figure here: first solid with round
   markers, second dashed with square ones. The shallow and deep bands are shaded.
2. A curve with intervals is a difference: bars and markers without a line, zero drawn. A filled marker is a
   layer whose corrected p-value was small; a hollow one is not. Two such curves stand side by side.
3. A value that is NaN leaves a gap; a chart without any value says so.

Colours are classes. A page brings its own style; a file on its own gets `STYLE`, which knows light and dark.
No plotting library, nothing that depends on time or place: equal numbers give equal bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from stepflow_tl.models.bands import deep_band, shallow_band

_WIDTH, _HEIGHT = 420, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 42, 30

STYLE = """
svg.depth { --text: #1a1a1a; --soft: #595959; --line: #d0d0d0; --band: #ececec; --page: #ffffff;
  --first: #0072b2; --second: #c24e00; background: var(--page); font: 11px system-ui, sans-serif; }
@media (prefers-color-scheme: dark) { svg.depth { --text: #e8e8e8; --soft: #a9adb3; --line: #444a52;
  --band: #2a2e34; --page: #16181c; --first: #56b4e9; --second: #ff9e4a; } }
"""
"""Colours for a chart that stands alone in a file."""

RULES = """
svg.depth { display: block; width: 100%; height: auto; max-width: 34rem; }
svg.depth text { fill: var(--text); font-size: 11px; }
svg.depth text.soft { fill: var(--soft); }
svg.depth text.name { font-weight: 600; font-size: 12px; }
svg.depth .band { fill: var(--band); }
svg.depth .grid { stroke: var(--line); stroke-width: 1; }
svg.depth .zero { stroke: var(--soft); stroke-width: 1; }
svg.depth .first { stroke: var(--first); fill: var(--first); }
svg.depth .second { stroke: var(--second); fill: var(--second); }
svg.depth path.first, svg.depth path.second { fill: none; stroke-width: 1.6; }
svg.depth path.second { stroke-dasharray: 6 3; }
svg.depth .hollow { fill: var(--page); }
"""
"""What the classes of a chart mean, in the colours of whatever it stands in."""


@dataclass(frozen=True)
class Curve:
    """One number per layer.

    Attributes:
        name: For the legend.
        layers: Model layers, in rising order.
        values: The number at each; NaN leaves a gap.
        low: Lower ends of the intervals; empty for a curve without, which is drawn as a line.
        high: Upper ends.
        sure: Whether each layer's corrected p-value is small; empty without intervals.

    Raises:
        ValueError: If the lists differ in length.
    """

    name: str
    layers: tuple[int, ...]
    values: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    sure: tuple[bool, ...] = ()

    def __post_init__(self) -> None:
        """Refuse lists that do not belong together."""
        lengths = {len(self.values), *(len(each) for each in (self.low, self.high, self.sure) if each)}
        if lengths != {len(self.layers)} or bool(self.low) != bool(self.high):
            raise ValueError(
                f"curve {self.name!r}: {len(self.layers)} layers, but lists of {sorted(lengths)}"
            )


@dataclass(frozen=True)
class DepthChart:
    """One or two curves over the layers of a model.

    Attributes:
        title: What is shown.
        curves: One or two.
        n_layers: Layers of the whole model, for the axis and the bands.

    Raises:
        ValueError: If there is no curve, or more than two.
    """

    title: str
    curves: tuple[Curve, ...]
    n_layers: int

    def __post_init__(self) -> None:
        """Refuse what has no colour."""
        if not 1 <= len(self.curves) <= 2:
            raise ValueError(f"chart {self.title!r} has {len(self.curves)} curves: expected one or two")

    def svg(self, *, alone: bool = False) -> str:
        """The chart as an SVG element.

        Args:
            alone: With a style of its own, for a file; else it takes the colours of the page it stands in.
        """
        style = f"<style>{STYLE}{RULES}</style>" if alone else ""
        return (
            f'<svg class="depth" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
            f'role="img" aria-label="{escape(self._spoken())}">{style}{"".join(self._parts())}</svg>'
        )

    def _spoken(self) -> str:
        return f"{self.title}: {' and '.join(curve.name for curve in self.curves)}, over the layers"

    def _parts(self) -> Iterator[str]:
        yield f'<text class="name" x="{_LEFT}" y="14">{escape(self.title)}</text>'
        for band, name in ((shallow_band(self.n_layers), "shallow"), (deep_band(self.n_layers), "deep")):
            left, right = self._x(band.start - 0.5), self._x(band.stop - 0.5)
            height = _HEIGHT - _TOP - _BOTTOM
            yield (
                f'<rect class="band" x="{left:.1f}" y="{_TOP}" width="{right - left:.1f}" height="{height}"/>'
            )
            yield _text((left + right) / 2, _TOP + 11, name, "soft", "middle")
        bottom = _HEIGHT - _BOTTOM
        for layer in _whole_ticks(self.n_layers):
            yield _text(self._x(layer), bottom + 14, str(layer), "soft", "middle")
        yield _text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 3, "layer", "soft", "middle")
        drawn = _drawn(self.curves)
        if not drawn:
            middle = (_LEFT + _WIDTH - _RIGHT) / 2
            yield _text(middle, (_TOP + bottom) / 2, "no layer has a value", "soft", "middle")
            return
        is_difference = any(curve.low for curve in self.curves)
        if is_difference:
            drawn.append(0.0)
        ticks = _ticks(min(drawn), max(drawn))
        low, high = min(ticks[0], *drawn), max(ticks[-1], *drawn)
        high += 0.12 * (high - low)  # room for the bands' names

        def y(value: float) -> float:
            return bottom - (value - low) / (high - low) * (bottom - _TOP)

        for tick in ticks:
            kind = "zero" if is_difference and tick == 0 else "grid"
            yield (
                f'<line class="{kind}" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(tick):.1f}" '
                f'y2="{y(tick):.1f}"/>'
            )
            yield _text(_LEFT - 5, y(tick) + 4, f"{tick:.6g}", "soft", "end")
        at = float(_LEFT)
        for place, (curve, kind) in enumerate(zip(self.curves, ("first", "second"), strict=False)):
            yield _marker(at + 5, 26, kind, hollow=False)
            yield _text(at + 14, 30, curve.name, "", "start")
            at += 30 + 6.2 * len(curve.name)
            shift = (place - (len(self.curves) - 1) / 2) * 5 if curve.low else 0.0
            points = [
                (self._x(layer) + shift, y(value), i)
                for i, (layer, value) in enumerate(zip(curve.layers, curve.values, strict=True))
                if math.isfinite(value)
            ]
            if curve.low:
                yield from (
                    f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{y(curve.low[i]):.1f}" '
                    f'y2="{y(curve.high[i]):.1f}"/>'
                    for x, _, i in points
                    if math.isfinite(curve.low[i]) and math.isfinite(curve.high[i])
                )
            elif points:
                way = " ".join(f"{x:.1f},{height:.1f}" for x, height, _ in points)
                yield f'<path class="{kind}" d="M{way}"/>'
            for x, height, i in points:
                yield _marker(x, height, kind, hollow=bool(curve.sure) and not curve.sure[i])

    def _x(self, layer: float) -> float:
        return _LEFT + (layer + 0.5) / self.n_layers * (_WIDTH - _RIGHT - _LEFT)


def _drawn(curves: Sequence[Curve]) -> list[float]:
    values = [value for curve in curves for each in (curve.values, curve.low, curve.high) for value in each]
    return [value for value in values if math.isfinite(value)]


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers that span the values as nearly as they can."""
    spread = (high - low) or abs(high) or 1.0
    size = 10.0 ** math.floor(math.log10(spread))
    step = next(size * part for part in (0.2, 0.5, 1.0, 2.0) if spread / (size * part) <= 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


def _whole_ticks(n_layers: int) -> list[int]:
    stride = next(step for step in (1, 2, 4, 5, 10, 20, 50, 1000) if n_layers / step <= 9)
    return list(range(0, n_layers, stride))


def _marker(x: float, y: float, kind: str, *, hollow: bool) -> str:
    shown = f"{kind} hollow" if hollow else kind
    if kind == "first":
        return f'<circle class="{shown}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>'
    return f'<rect class="{shown}" x="{x - 2.4:.1f}" y="{y - 2.4:.1f}" width="4.8" height="4.8"/>'


def _text(x: float, y: float, words: str, kind: str, anchor: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'
