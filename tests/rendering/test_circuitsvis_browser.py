"""The circuitsvis views in a real browser, offline: they draw, answer, share one script, and stay text."""

import json
import time

import pytest
from made_maps import labels_of, make_saliency
from rendered_pages import HOSTILE

from stepflow_tl.rendering import show

DRAWN = "document.querySelector('[data-stepflow-view][id] :not(p)')"
# What circuitsvis makes of white space.
TEXT = "document.querySelector('.colored-tokens').textContent.replaceAll('\\u00a0', ' ')"


def place(page, selector):
    """Middle of the first element that a selector finds."""
    box = page.evaluate(
        f"(() => {{ const b = document.querySelector({selector!r}).getBoundingClientRect();"
        " return [b.x + b.width / 2, b.y + b.height / 2]; })()"
    )
    return box[0], box[1]


@pytest.mark.parametrize("layer", [None, 2])
def test_maps_are_drawn_and_a_click_on_a_head_shows_it(layer, open_page, tmp_path):
    view = show(make_saliency(5, 1, n_layers=3, n_heads=3), layer=layer)
    page = open_page(view.save(tmp_path / "view.html"), DRAWN)
    name = "L1" if layer is None else "L2H1"
    page.wait_for("document.querySelectorAll('canvas').length >= 4")  # three small maps and a large one
    assert f"{name} Zoomed" not in page.evaluate("document.body.innerText")
    x, y = page.evaluate(
        f"(() => {{ const all = [...document.querySelectorAll('*')].filter(e => e.textContent === {name!r});"
        " const b = all.at(-1).getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height + 8]; })()"
    )
    page.click(x, y)
    page.wait_for(f"document.body.innerText.includes('{name} Zoomed')")


def test_the_text_view_shows_every_step_and_its_share_on_hover(open_page, tmp_path):
    saliency = make_saliency(5, 1, text="some words")
    page = open_page(show(saliency, step="T3").save(tmp_path / "view.html"), DRAWN)
    text = page.evaluate(TEXT)
    assert all(label in text for label in labels_of(5, 1)) and text.count("some words") == 7
    assert "▸T3" in text
    page.hover(*place(page, ".colored-tokens > span"))
    page.wait_for("document.querySelector('strong')")
    maps = saliency.head_mean()
    share = float((maps / maps.sum(-1, keepdim=True)).mean(0)[3, 0])
    assert f"{share:.4f}".rstrip("0") in page.evaluate("document.body.textContent")


def test_the_strongest_source_has_the_full_colour_and_a_later_step_none(open_page, tmp_path):
    saliency = make_saliency(5, 1)
    page = open_page(show(saliency, step="T3").save(tmp_path / "view.html"), DRAWN)
    colours = page.evaluate(
        "[...document.querySelectorAll('.colored-tokens > span > span')].map(e => e.style.backgroundColor)"
    )
    maps = saliency.head_mean()
    row = (maps / maps.sum(-1, keepdim=True)).mean(0)[3, :3]
    assert colours[int(row.argmax())] == "rgb(230, 159, 0)"
    assert set(colours[4:]) == {"rgb(255, 255, 255)"}


def test_hostile_texts_are_shown_as_written(open_page, tmp_path):
    saliency = make_saliency(len(HOSTILE) - 2, 1, text=HOSTILE, model_name=HOSTILE[0])
    page = open_page(show(saliency, step="S1").save(tmp_path / "view.html"), DRAWN)
    text = page.evaluate(TEXT)
    for hostile in HOSTILE:
        if hostile.isprintable():  # the others are named, see test_views_text
            assert hostile in text
    assert "[U+0000]" in text and "[U+202E]" in text
    assert page.evaluate("document.querySelectorAll('img, svg, a, b').length") == 0
    assert HOSTILE[0] in page.evaluate("document.body.innerText")  # the model's name, in the caption


def test_a_step_of_ten_thousand_characters_fits_the_page(open_page, tmp_path):
    saliency = make_saliency(1, 1, text=["What?", "x" * 10_000, "y"])
    page = open_page(show(saliency, step="S1").save(tmp_path / "view.html"), DRAWN)
    assert page.evaluate(TEXT).count("x") == 10_000
    assert page.evaluate(
        "document.querySelector('.colored-tokens').getBoundingClientRect().right <= innerWidth"
    )


@pytest.fixture
def notebook_page(open_page, tmp_path):
    """A page that shows outputs as a notebook does: script elements are made anew so that they run."""
    path = tmp_path / "notebook.html"
    path.write_text("<!DOCTYPE html><meta charset=utf-8><body></body>", encoding="utf-8")
    page = open_page(path)

    def show(name: str, html: str) -> None:
        page.evaluate(
            f"""(() => {{
              document.getElementById({json.dumps(name)})?.remove();
              const output = Object.assign(document.createElement("div"), {{id: {json.dumps(name)}}});
              output.innerHTML = {json.dumps(html)};
              document.body.append(output);
              for (const script of output.querySelectorAll("script")) {{
                const again = document.createElement("script");
                again.textContent = script.textContent;
                script.replaceWith(again);
              }}
            }})()"""
        )

    page.show = show
    return page


def is_drawn(page, name):
    return page.evaluate(f"!!document.querySelector('#{name} .colored-tokens')")


def test_later_outputs_use_the_first_one_s_script_also_when_it_is_cleared(notebook_page):
    view, other = show(make_saliency(3, 1), step="T1"), show(make_saliency(3, 1), step="T2")
    notebook_page.show("A", view.html)
    notebook_page.show("B", other.fragment)
    notebook_page.wait_for("document.querySelectorAll('.colored-tokens').length === 2")
    notebook_page.evaluate("document.getElementById('A').remove()")
    notebook_page.show("C", view.fragment)
    notebook_page.show("B", other.fragment)  # run again
    notebook_page.wait_for("document.querySelectorAll('.colored-tokens').length === 2")
    assert is_drawn(notebook_page, "B") and is_drawn(notebook_page, "C")


def test_outputs_that_come_before_the_script_wait_for_it_and_say_so(notebook_page):
    view = show(make_saliency(3, 1), step="T1")
    notebook_page.show("A", view.fragment)
    notebook_page.show("B", view.fragment)
    time.sleep(0.1)
    assert not is_drawn(notebook_page, "A")
    assert "run this cell again" in notebook_page.evaluate("document.body.innerText.replace(/\\s+/g, ' ')")
    notebook_page.show("C", view.html)
    notebook_page.wait_for("document.querySelectorAll('.colored-tokens').length === 3")
    assert "Nothing drawn yet" not in notebook_page.evaluate("document.body.innerText")


def test_a_second_copy_of_the_script_does_no_harm(notebook_page):
    view = show(make_saliency(3, 1), step="T1")
    notebook_page.show("A", view.html)
    notebook_page.show("B", view.html)
    notebook_page.wait_for("document.querySelectorAll('.colored-tokens').length === 2")
