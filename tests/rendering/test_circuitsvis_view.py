"""The view is offline, whole and escaped; of a notebook's outputs always exactly one carries the script."""

import re
import socket
import sys
from types import ModuleType, SimpleNamespace
from urllib import request

import circuitsvis
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_maps import make_saliency
from rendered_pages import elements_of

from stepflow_tl.rendering import circuitsvis_view, show
from stepflow_tl.rendering.circuitsvis_view import CircuitsvisView, ScriptCarrier, carrier_script


@pytest.fixture
def view():
    return show(make_saliency(5, 1))


def test_the_page_requests_nothing_and_forbids_the_rest(view, tmp_path):
    page = view.save(tmp_path / "view.html").read_text(encoding="utf-8")
    elements = elements_of(page)
    assert [tag for tag, _ in elements].count("script") == 2
    for tag, attributes in elements:
        assert not {"src", "href", "srcset", "data", "action"} & set(attributes), (tag, attributes)
    policy = next(a["content"] for tag, a in elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'") and "http" not in policy
    assert not re.search(r"""(import|from|src\s*=)\s*["']?https?:""", page)
    assert "unpkg.com" not in page and "jsdelivr" not in page and "sourceMappingURL" not in page


def test_the_html_is_the_same_every_time_and_never_asks_the_network(view, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(request, "urlopen", refuse)
    again = show(make_saliency(5, 1))
    assert again._repr_html_() == view.html
    assert "CircuitsVis.render(" in view.html and "CircuitsVis.render(" not in view.fragment


def test_the_fragment_is_small_and_the_script_is_not(view):
    assert len(view.fragment) < 20_000 < 1_000_000 < len(view.html)


def test_the_bundle_is_whole_and_cannot_end_its_element(view):
    folder = re.sub(r"__init__\.py$", "", circuitsvis.__file__)
    with open(f"{folder}dist/cdn/iife.js", encoding="utf-8") as file:
        bundle = file.read()
    assert "</script" in bundle  # else there is nothing to escape
    script = carrier_script()
    assert script.count("</script") == 1 and script.rstrip().endswith("</script>")
    assert bundle.partition("\n//# sourceMappingURL")[0] in script.replace(r"<\/script", "</script")


def test_the_view_prints_one_line_not_megabytes(view):
    assert re.fullmatch(r"CircuitsvisView\('.*: tiny', \d\.\d MB of HTML\)", repr(view))


VIEW = CircuitsvisView("<p></p>", "made")


class Notebook:
    """A front end: outputs are cleared when their cell runs, and can be replaced by display id."""

    def __init__(self, carrier):
        self.carrier, self.runs, self.outputs = carrier, 0, {}

    def run(self, cell, n_views=1):
        self.runs += 1
        self.outputs[cell] = {}
        for _ in range(n_views):
            carries, display_id, former = self.carrier.place(VIEW, cell, f"run {self.runs}")
            self.outputs[cell][display_id] = carries
            if former is not None and former.display_id in self.outputs.get(former.cell, {}):
                self.outputs[former.cell][former.display_id] = False

    def clear(self, cell):
        self.outputs[cell] = {}

    @property
    def carriers(self):
        return [cell for cell, outputs in self.outputs.items() if any(outputs.values())]

    @property
    def copies(self):
        return sum(carries for outputs in self.outputs.values() for carries in outputs.values())


@pytest.fixture
def notebook():
    return Notebook(ScriptCarrier())


def test_the_first_output_carries_and_later_ones_share(notebook):
    for cell in "ABC":
        notebook.run(cell, n_views=2)
    assert (notebook.carriers, notebook.copies) == (["A"], 1)


def test_the_carrier_run_again_carries_again(notebook):
    for cell in "ABA":
        notebook.run(cell, n_views=2)
    assert (notebook.carriers, notebook.copies) == (["A"], 1)


def test_another_cell_run_again_takes_the_script_over(notebook):
    for cell in "ABB":
        notebook.run(cell)
    assert (notebook.carriers, notebook.copies) == (["B"], 1)


def test_after_the_carrier_was_cleared_running_any_cell_again_brings_the_script_back(notebook):
    notebook.run("A")
    notebook.run("B")
    notebook.clear("A")
    assert notebook.copies == 0
    notebook.run("B")
    assert (notebook.carriers, notebook.copies) == (["B"], 1)


@settings(max_examples=60)
@given(st.lists(st.tuples(st.sampled_from("ABCD"), st.integers(1, 3)), min_size=1, max_size=12))
def test_there_is_one_copy_whatever_is_run_in_whatever_order(order):
    notebook = Notebook(ScriptCarrier())
    for cell, n_views in order:
        notebook.run(cell, n_views)
        assert notebook.copies == 1


@pytest.fixture
def jupyter(monkeypatch):
    """IPython's display functions and a kernel shell, recorded; `jupyter.request` is the execute request."""
    state = SimpleNamespace(shown=[], updated=[], request=None)
    ipython, display = ModuleType("IPython"), ModuleType("IPython.display")
    ipython.get_ipython = lambda: SimpleNamespace(get_parent=lambda: state.request)
    display.display = lambda data, raw, display_id=None: state.shown.append((data, display_id))
    display.update_display = lambda data, raw, display_id: state.updated.append((data, display_id))
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.setattr(circuitsvis_view, "_THE_CARRIER", circuitsvis_view.ScriptCarrier())
    return state


def execute_request(run, cell_id=None, code=""):
    return {
        "header": {"msg_id": run},
        "metadata": {"cellId": cell_id} if cell_id else {},
        "content": {"code": code},
    }


@pytest.mark.parametrize(
    "cells", [({"cell_id": "a"}, {"cell_id": "b"}), ({"code": "show(s)"}, {"code": "show(s, layer=3)"})]
)
def test_ipython_gets_the_script_once_and_the_former_carrier_is_sent_again_without_it(jupyter, cells):
    view = show(make_saliency(3, 1))
    for run, cell in (("1", cells[0]), ("2", cells[1]), ("3", cells[1])):
        jupyter.request = execute_request(run, **cell)
        view._ipython_display_()
    assert [data["text/html"] == view.html for data, _ in jupyter.shown] == [True, False, True]
    assert jupyter.shown[1][0]["text/html"] == view.fragment
    assert jupyter.updated == [({"text/html": view.fragment, "text/plain": repr(view)}, jupyter.shown[0][1])]


def test_outside_a_kernel_and_on_colab_every_view_carries_the_script(jupyter, monkeypatch):
    view = show(make_saliency(3, 1))
    view._ipython_display_()
    view._ipython_display_()
    jupyter.request = execute_request("1", "a")
    monkeypatch.setitem(sys.modules, "google.colab", ModuleType("google.colab"))
    view._ipython_display_()
    view._ipython_display_()
    assert [data["text/html"] == view.html for data, _ in jupyter.shown] == [True] * 4
    assert jupyter.updated == []
