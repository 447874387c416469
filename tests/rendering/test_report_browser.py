"""The report page in a real browser, offline: what it shows is what Python computes, by mouse and by key."""

import json

import pytest
import torch
from made_maps import labels_of, make_saliency
from rendered_pages import HOSTILE

from stepflow_tl import diagnose
from stepflow_tl.diagnosis.diagnosis import LAYER_METRICS
from stepflow_tl.rendering import report
from stepflow_tl.rendering import report_page as payload

READY = "document.documentElement.dataset.shown"
TEXTS = [f"Step {label} says {i * 7}." for i, label in enumerate(labels_of(6, 2))]


@pytest.fixture
def saliency():
    return make_saliency(6, 2, n_heads=3, text=TEXTS)


@pytest.fixture
def open_report(open_page, tmp_path):
    def open_one(saliency, **options):
        return open_page(report(saliency, tmp_path / "out.html"), READY, **options)

    return open_one


def shares(maps):
    maps = maps.to(torch.float64)
    return maps / maps.sum(-1, keepdim=True)


def percent(share):
    """As the page writes it."""
    if share < 0.0001:
        return "<0.01 %" if share else "0 %"
    return f"{100 * share:.{2 if share < 0.01 else 1}f} %"


def text(page, name):
    return page.evaluate(f"document.getElementById({name!r}).textContent")


def choose(page, name, value):
    """Pick an option as a person does, by its value."""
    page.evaluate(
        f"(() => {{ const s = document.getElementById({name!r}); s.value = {value!r};"
        " s.dispatchEvent(new Event('change', {bubbles: true})); })()"
    )
    wanted = page.evaluate(
        "`${document.getElementById('layer').value} ${document.getElementById('head').value}`"
    )
    page.wait_for(f"document.documentElement.dataset.shown === {wanted!r}")


def cell(page, query, key):
    """Middle of a cell, in pixels of the window."""
    page.evaluate("document.getElementById('map').scrollIntoView({block: 'center'})")
    cells = json.loads(page.evaluate("document.getElementById('map').dataset.cells"))
    n, x, y = page.evaluate(
        "(() => { const b = document.getElementById('map').getBoundingClientRect();"
        " return [document.querySelectorAll('.step').length, b.x, b.y]; })()"
    )
    size = cells["side"] / n
    return x + cells["left"] + (key + 0.5) * size, y + cells["top"] + (query + 0.5) * size


# A copy of the map to read pixels from; reading its own canvas again and again makes Chromium complain.
PIXELS = (
    "(() => { const c = document.getElementById('map'), d = new OffscreenCanvas(c.width, c.height);"
    " const p = d.getContext('2d', {willReadFrequently: true}); p.drawImage(c, 0, 0); return p; })()"
)


def values(page):
    return page.evaluate("[...document.querySelectorAll('.step .value')].map(e => e.textContent)")


def test_it_opens_on_the_deep_band_and_the_first_summary_step(saliency, open_report):
    page = open_report(saliency)
    assert page.evaluate("document.title") == "Step-Saliency: tiny"
    assert text(page, "about").startswith(
        "1 question, 6 thinking and 2 summary steps. 8 of 8 layers, 3 heads."
    )
    row = shares(saliency.head_mean(layers=[6, 7])).mean(0)[7].tolist()
    assert values(page) == [percent(share) for share in row[:8]] + [""]
    strongest = labels_of(6, 2)[row.index(max(row[:7]))]
    assert text(page, "text-note").startswith(f"S1 draws most on {strongest} (")


def test_hover_shows_both_steps_and_the_value(saliency, open_report):
    page = open_report(saliency)
    choose(page, "layer", "3")
    page.hover(*cell(page, 5, 2))
    share = float(shares(saliency.head_mean(layers=[3]))[0, 5, 2])
    nats = float(saliency.head_mean(layers=[3])[0, 5, 2])
    found = text(page, "readout-value")
    assert found.startswith(f"T5 draws on T2: {percent(share)} of its saliency, ")
    assert float(found.rpartition(", ")[2].removesuffix(" nats")) == pytest.approx(nats, rel=6e-3)
    assert (text(page, "query-label"), text(page, "query-text")) == ("T5", TEXTS[5])
    assert (text(page, "key-label"), text(page, "key-text")) == ("T2", TEXTS[2])
    page.hover(*cell(page, 2, 5))  # above the diagonal there is nothing
    assert text(page, "readout-value") == found


def test_a_click_highlights_the_step_s_sources_in_the_text(saliency, open_report):
    page = open_report(saliency)
    choose(page, "layer", "0")
    page.click(*cell(page, 4, 1))
    row = shares(saliency.head_mean(layers=[0]))[0, 4].tolist()
    assert values(page) == [percent(share) for share in row[:5]] + [""] * 4
    tints = page.evaluate(
        "[...document.querySelectorAll('.step')]"
        ".map(e => Number(/([\\d.]+)\\)$/.exec(e.style.background)?.[1] ?? 0))"
    )
    expected = [min(1, share / max(row[:4])) * 0.55 for share in row[:5]] + [0] * 4
    assert tints == pytest.approx(expected, abs=1e-3) and max(tints) == 0.55
    assert page.evaluate("document.querySelector('[aria-selected=true]').id") == "step-4"


def test_readers_are_the_map_s_column(saliency, open_report):
    page = open_report(saliency)
    choose(page, "layer", "1")
    page.click(*cell(page, 3, 0))
    page.evaluate("document.querySelector('[value=readers]').click()")
    column = shares(saliency.head_mean(layers=[1]))[0, :, 3].tolist()
    page.wait_for("document.querySelector('.step .value').textContent === ''")
    assert values(page) == [""] * 3 + [percent(share) for share in column[3:]]
    assert text(page, "text-note").startswith("T3 is drawn on most by ")


def test_one_head_shows_that_head_and_a_band_goes_back_to_the_mean(saliency, open_report):
    page = open_report(saliency)
    assert page.evaluate("document.getElementById('head').disabled")
    choose(page, "layer", "5")
    choose(page, "head", "2")
    row = shares(saliency.pooled(layers=[5])[0, 2])[7].tolist()
    assert values(page) == [percent(share) for share in row[:8]] + [""]
    assert text(page, "map-note").startswith("Layer 5, head 2; ")
    choose(page, "layer", "shallow")
    row = shares(saliency.head_mean(layers=[0, 1])).mean(0)[7].tolist()
    assert values(page) == [percent(share) for share in row[:8]] + [""]
    assert text(page, "map-note").startswith("Mean of the shallow layers 0 to 1, mean of the heads; ")


def test_the_map_s_pixels_follow_the_values_and_the_scale(saliency, open_report):
    page = open_report(saliency)
    choose(page, "layer", "2")

    def brightness(query, key):
        x, y = cell(page, query, key)
        return page.evaluate(
            "(() => { const b = document.getElementById('map').getBoundingClientRect();"
            f" const d = {PIXELS}.getImageData({x} - b.x, {y} - b.y, 1, 1).data;"
            " return d[0] + d[1] + d[2]; })()"
        )

    maps = saliency.head_mean(layers=[2])[0]
    for scale, found in (("share", shares(maps)[5]), ("nats", maps[5])):
        choose(page, "scale", scale)
        order = torch.argsort(found[:6], descending=True).tolist()
        seen = [brightness(5, key) for key in order]
        assert seen == sorted(seen) and len(set(seen)) > 2


def test_the_keyboard_reaches_everything(saliency, open_report):
    page = open_report(saliency)
    page.evaluate("document.body.focus()")
    reached: list[str] = []
    focused = "document.activeElement"
    for _ in range(6):
        page.press("Tab")
        reached.append(page.evaluate(f"{focused}.id || {focused}.name || {focused}.tagName"))
        assert page.evaluate(f"getComputedStyle({focused}).outlineStyle") == "solid", reached
    # The head selector is disabled while a band is shown.
    assert reached == ["layer", "scale", "map", "direction", "text", "SUMMARY"]
    page.evaluate("document.getElementById('map').focus()")
    page.press("Home")
    assert text(page, "readout-value").startswith("S1 draws on Q: ")
    for key in ("ArrowUp", "ArrowRight", "ArrowRight"):
        page.press(key)
    assert text(page, "readout-value").startswith("T6 draws on T2: ")
    page.press("ArrowLeft")
    assert text(page, "readout-value").startswith("T6 draws on T1: ")
    page.press("End")
    assert text(page, "readout-value").startswith("T6 draws on itself: ")
    page.press("ArrowUp")  # up along the diagonal, never above it
    assert text(page, "readout-value").startswith("T5 draws on itself: ")
    page.press("Enter")
    assert text(page, "text-note").startswith("T5 draws most on ")
    page.evaluate("document.getElementById('text').focus()")
    page.press("ArrowDown")
    assert text(page, "text-note").startswith("T6 draws most on ")
    page.press("Home")
    assert text(page, "text-note") == "Q draws most on no other step."
    active = page.evaluate(
        "document.getElementById(document.activeElement.getAttribute('aria-activedescendant')).ariaLabel"
    )
    assert active.startswith("Q, 100 %")


def test_every_control_has_a_name(saliency, open_report):
    page = open_report(saliency)
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    roles = ("combobox", "radio", "listbox", "application", "option")
    controls = [node for node in nodes if node.get("role", {}).get("value") in roles]
    assert {node["role"]["value"] for node in controls} >= {"combobox", "radio", "listbox", "application"}
    assert [node for node in controls if not node["name"]["value"]] == []


def test_profiles_are_diagnose_s_numbers_and_a_click_chooses_the_layer(saliency, open_report):
    page = open_report(saliency)
    cells = page.evaluate(
        "[...document.querySelectorAll('#numbers tbody tr')].map(r => [...r.cells].map(c => c.textContent))"
    )
    diagnosis = diagnose(saliency)
    assert [int(row[0]) for row in cells] == list(range(8))
    for column, metric in enumerate(LAYER_METRICS, start=1):
        found = [float(row[column]) for row in cells]
        assert found == pytest.approx(getattr(diagnosis, metric).tolist(), rel=6e-3), metric
    titles = page.evaluate("[...document.querySelectorAll('#profiles circle title')].map(t => t.textContent)")
    lock_in = [percent(share) for share in diagnosis.lock_in.tolist()]
    assert titles[:8] == [f"Layer {i}, on the step itself (lock-in): {lock_in[i]}" for i in range(8)]
    page.evaluate("document.querySelector('#profiles svg').scrollIntoView({block: 'center'})")
    x, y = page.evaluate(
        "(() => { const b = document.querySelectorAll('#profiles circle')[3].getBoundingClientRect();"
        " return [b.x + b.width / 2, b.y + 40]; })()"
    )
    page.click(x, y)
    page.wait_for("document.documentElement.dataset.shown === '3 mean'")
    assert page.evaluate("document.getElementById('layer').value") == "3"


def test_provenance_and_precision_stand_at_the_end(saliency, open_report):
    page = open_report(saliency)
    found = page.evaluate("document.getElementById('provenance').innerText")
    assert "tiny" in found and "per_token" in found and "torch.float64 on cpu" in found
    assert "exact to 0.014 %" in text(page, "precision")


def test_hostile_texts_are_shown_as_written_and_run_nothing(open_report):
    texts = [*HOSTILE, "x" * 10_000]
    page = open_report(make_saliency(len(texts) - 2, 1, text=texts, model_name=HOSTILE[0]))
    shown = page.evaluate("[...document.querySelectorAll('.step .text')].map(e => e.textContent)")
    assert shown == texts
    for index in range(len(texts)):
        page.click(*cell(page, index, 0))
        assert text(page, "query-text").removesuffix("…") == texts[index][:600]
    assert page.evaluate("document.querySelectorAll('img, iframe, a, b, .text svg, object').length") == 0
    named = page.evaluate("[...document.querySelectorAll('.step .control')].map(e => e.dataset.name)")
    assert {"U+0000", "U+202E", "U+2067", "U+2028", "U+001B"} <= set(named)
    assert HOSTILE[0] in page.evaluate("document.querySelector('h1').textContent")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_the_policy_stops_script_style_and_requests_that_are_not_the_page_s_own(saliency, open_report):
    page = open_report(saliency)
    page.evaluate(
        "(() => { const s = document.createElement('script'); s.textContent = 'window.harmed = 1';"
        " document.body.append(s); const d = document.createElement('div');"
        " d.setAttribute('onclick', 'window.harmed = 1'); document.body.append(d); d.click();"
        " const i = new Image(); i.src = 'https://example.com/p.png'; document.body.append(i); })()"
    )
    page.wait_for("performance.now() > 0")
    assert page.evaluate("window.harmed") is None
    refused = [error for error in page.errors if "Content Security Policy" in error]
    assert len(refused) == 3 == len(page.errors)
    assert any("example.com/p.png" in error for error in refused)
    page.errors.clear()
    page.requests.clear()  # asked for, and refused before it was sent


def contrast(one, other):
    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("dark", [False, True])
def test_text_is_readable_on_light_and_on_dark(dark, saliency, open_report):
    page = open_report(saliency, dark=dark)
    names = ("page", "panel", "text", "soft", "accent", "mark", "first", "second", "problem")
    colour = {
        name: page.evaluate(f"getComputedStyle(document.documentElement).getPropertyValue('--{name}').trim()")
        for name in names
    }
    assert (contrast(colour["page"], "#ffffff") > 10) is dark
    for name in ("text", "soft", "accent", "mark", "problem", "first", "second"):
        for ground in ("page", "panel") if name in ("text", "soft", "accent") else ("page",):
            assert contrast(colour[name], colour[ground]) >= 4.5, (name, ground)
    tint = page.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--tint')")
    ground = [int(colour["page"][i : i + 2], 16) for i in (1, 3, 5)]
    strongest = [round(0.55 * int(t) + 0.45 * g) for t, g in zip(tint.split(), ground, strict=True)]
    assert contrast(colour["text"], "#" + "".join(f"{part:02x}" for part in strongest)) >= 4.5


def test_the_colours_are_magma_both_ways(saliency, open_report):
    matplotlib = pytest.importorskip("matplotlib")
    magma = matplotlib.colormaps["magma"]
    for dark in (False, True):
        page = open_report(saliency, dark=dark)
        cells = json.loads(page.evaluate("document.getElementById('map').dataset.cells"))
        bar = page.evaluate(
            f"(() => {{ const p = {PIXELS};"
            f" const at = f => [...p.getImageData({cells['left'] + cells['side'] + 22}, {cells['top']} + 1"
            " + f * 237, 1, 1).data].slice(0, 3); return [0.02, 0.25, 0.5, 0.75, 0.98].map(at); })()"
        )
        for place, found in zip((0.98, 0.75, 0.5, 0.25, 0.02), bar, strict=True):
            expected = [255 * part for part in magma(place if dark else 1 - place)[:3]]
            assert found == pytest.approx(expected, abs=9)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: make_saliency(0, 0), "No profiles: the trace has 1 question steps"),
        (lambda: make_saliency(3, 1, sums=torch.zeros(2, 2, 5, 5)), "No profiles: the step map is zero"),
        (lambda: make_saliency(3, 1).select([3, 4]), "Where Shallow Lock-in"),
        (lambda: make_saliency(3, 0, n_layers=1), "Where Shallow Lock-in"),
    ],
)
def test_small_and_empty_results_open_too(made, said, open_report):
    page = open_report(made())
    assert text(page, "profiles-note").startswith(said)
    assert page.evaluate("document.getElementById('problem').hidden")


@pytest.mark.parametrize("bits", [8, None])
def test_fewer_bits_open_too(bits, saliency, open_report, monkeypatch):
    monkeypatch.setattr(payload, "head_bits", lambda n_maps, n_steps: bits)
    page = open_report(saliency)
    choose(page, "layer", "5")
    assert page.evaluate("document.getElementById('head').disabled") is (bits is None)
    if bits:
        choose(page, "head", "2")
        row = shares(saliency.pooled(layers=[5])[0, 2])[7].tolist()
        found = [float(value.strip("<% ")) / 100 for value in values(page)[:8]]
        assert found == pytest.approx(row[:8], rel=0.05, abs=2e-4)


def test_a_damaged_page_says_so(saliency, open_page, tmp_path):
    path = report(saliency, tmp_path / "out.html")
    page_text = path.read_text("utf-8")
    path.write_text(page_text.replace('"codes":"', '"codes":"AAAA', 1), encoding="utf-8")
    page = open_page(path, "!document.getElementById('problem').hidden")
    assert text(page, "problem").startswith("This page could not be drawn: ")
    assert len(page.errors) >= 1
    page.errors.clear()
