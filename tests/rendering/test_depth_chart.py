"""Charts over depth: every number is drawn where it belongs, and what cannot be drawn is refused or said."""

import re
from xml.etree import ElementTree

import pytest

from stepflow_tl.rendering.depth_chart import Curve, DepthChart

NAN = float("nan")
SVG = "{http://www.w3.org/2000/svg}"


def parsed(chart, **options):
    return ElementTree.fromstring(chart.svg(**options))


def test_points_stand_at_their_layers_and_heights():
    curve = Curve("right", (0, 1, 3), (0.0, 0.5, 1.0))
    root = parsed(DepthChart("lock_in", (curve,), 4))
    marks = [(float(each.get("cx", 0)), float(each.get("cy", 0))) for each in root.iter(f"{SVG}circle")][
        1:
    ]  # the first one is the legend's
    (x0, y0), (x1, y1), (x3, y3) = marks
    assert x3 - x0 == pytest.approx(3 * (x1 - x0), abs=0.2)
    assert y0 > y1 > y3 and y0 - y3 == pytest.approx(2 * (y0 - y1), abs=0.2)
    ticks = [text.text for text in root.iter(f"{SVG}text")]
    assert {"0", "0.2", "1", "shallow", "deep", "layer", "right"} <= set(ticks)


def test_a_difference_has_bars_a_zero_line_and_hollow_markers_where_nothing_is_sure():
    first = Curve("all", (0, 1), (-0.2, 0.1), (-0.3, -0.1), (-0.1, 0.3), (True, False))
    second = Curve("matched", (0, 1), (NAN, 0.1), (NAN, -0.2), (NAN, 0.2), (False, False))
    svg = DepthChart("difference", (first, second), 2).svg()
    assert svg.count('class="zero"') == 1 and svg.count('class="first hollow"') == 1
    assert (
        len(re.findall(r'<line class="first"', svg)) == 2
        and len(re.findall(r'<line class="second"', svg)) == 1
    )
    assert "<path" not in svg and "nan" not in svg


def test_a_gap_in_a_line_and_a_chart_without_a_value():
    svg = DepthChart("x", (Curve("a", (0, 1, 2), (0.1, NAN, 0.3)),), 3).svg()
    assert "nan" not in svg and svg.count("<circle") == 3
    assert "no layer has a value" in DepthChart("x", (Curve("a", (0,), (NAN,)),), 1).svg()


def test_equal_values_and_large_ones_can_be_drawn():
    for values in ((0.0, 0.0), (5.0, 5.0), (1e-9, 2e-9), (1e8, -1e8)):
        parsed(DepthChart("x", (Curve("a", (0, 1), values),), 2))


def test_alone_it_brings_a_style_and_in_a_page_it_does_not():
    chart = DepthChart("a < b & c", (Curve("<i>", (0,), (1.0,)),), 1)
    assert "<style>" in chart.svg(alone=True) and "<style>" not in chart.svg()
    assert "<i>" not in chart.svg()
    parsed(chart, alone=True)


def test_what_cannot_be_a_chart_is_refused():
    with pytest.raises(ValueError, match="2 layers, but lists of"):
        Curve("a", (0, 1), (0.1,))
    with pytest.raises(ValueError, match="has 0 curves: expected one or two"):
        DepthChart("x", (), 1)
