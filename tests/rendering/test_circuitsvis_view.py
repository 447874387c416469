import re
import socket
from urllib import request

import pytest
from made_maps import make_saliency
from rendered_pages import elements_of


@pytest.fixture
def view():
    return make_saliency(5, 1).show()


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
    again = make_saliency(5, 1).show()
    assert again._repr_html_() == view.html
    assert "CircuitsVis.render(" in view.html and "CircuitsVis.render(" not in view.fragment


def test_the_fragment_is_small_and_the_script_is_not(view):
    assert len(view.fragment) < 20_000 < 1_000_000 < len(view.html)


def test_the_bundle_is_whole_and_cannot_end_its_element(view):
    import circuitsvis

    from stepflow_tl.rendering.circuitsvis_view import carrier_script

    folder = re.sub(r"__init__\.py$", "", circuitsvis.__file__)
    with open(f"{folder}dist/cdn/iife.js", encoding="utf-8") as file:
        bundle = file.read()
    assert "</script" in bundle  # else there is nothing to escape
    script = carrier_script()
    assert script.count("</script") == 1 and script.rstrip().endswith("</script>")
    assert bundle.partition("\n//# sourceMappingURL")[0] in script.replace(r"<\/script", "</script")


def test_the_view_prints_one_line_not_megabytes(view):
    assert re.fullmatch(r"CircuitsvisView\('.*: tiny', \d\.\d MB of HTML\)", repr(view))
