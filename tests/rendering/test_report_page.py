import base64
import hashlib
import json
import re
from importlib.resources import files

import pytest
import torch
from made_maps import make_saliency
from rendered_pages import HOSTILE, elements_of

from stepflow_tl.errors import ResultFileError
from stepflow_tl.rendering import report


@pytest.fixture
def written(tmp_path):
    def write(saliency, **options):
        return report(saliency, tmp_path / "out.html", **options).read_text(encoding="utf-8")

    return write


def scripts_of(page):
    return re.findall(r"<script([^>]*)>(.*?)</script>", page, flags=re.DOTALL)


def test_the_page_holds_one_script_and_its_data_and_asks_for_nothing(written):
    page = written(make_saliency(5, 1))
    assert [attributes for attributes, _ in scripts_of(page)] == [' type="application/json" id="data"', ""]
    for tag, attributes in elements_of(page):
        assert not {"src", "href", "srcset", "action", "style"} & set(attributes), (tag, attributes)
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        assert tag not in ("link", "img", "iframe", "base", "form", "object")
    assert "http:" not in page.replace("http://www.w3.org/2000/svg", "") and "https:" not in page


def test_the_policy_allows_this_script_and_this_style_by_hash_and_nothing_else(written):
    page = written(make_saliency(5, 1))
    policy = dict(elements_of(page)[3][1])["content"]
    style = re.search(r"<style>(.*?)</style>", page, flags=re.DOTALL)[1]
    digests = [
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for text in (scripts_of(page)[1][1], style)
    ]
    assert policy == (
        f"default-src 'none'; script-src 'sha256-{digests[0]}'; style-src 'sha256-{digests[1]}'; "
        "base-uri 'none'; form-action 'none'"
    )


def test_no_asset_writes_markup():
    assets = files("stepflow_tl.rendering").joinpath("assets")
    scripts = [file for file in assets.iterdir() if file.name.endswith(".js")]
    assert len(scripts) == 7
    for script in scripts:
        text = script.read_text(encoding="utf-8")
        for word in (
            "innerHTML",
            "outerHTML",
            "insertAdjacent",
            "document.write",
            "eval(",
            "Function(",
            "fetch(",
        ):
            assert word not in text, (script.name, word)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_change_no_element(text, written):
    plain = [tag for tag, _ in elements_of(written(make_saliency(5, 1)))]
    page = written(make_saliency(5, 1, text=text, model_name=text))
    assert [tag for tag, _ in elements_of(page)] == plain
    assert json.loads(scripts_of(page)[0][1])["pieces"][1]["text"] == text


def test_the_same_result_gives_the_same_page(written):
    assert written(make_saliency(5, 1)) == written(make_saliency(5, 1))


def test_the_title_is_the_model_s_or_one_s_own(written):
    assert "<title>Step-Saliency: tiny</title>" in written(make_saliency(2, 1))
    page = written(make_saliency(2, 1), title="$data </title> & more")
    assert "<title>$data &lt;/title&gt; &amp; more</title>" in page


def test_twenty_eight_layers_of_thirty_two_heads_at_sixty_steps_stay_under_six_megabytes(tmp_path):
    # Uniform noise over eight decades: nothing for the compression to find.
    decades = torch.rand(28, 32, 60, 60, generator=torch.Generator().manual_seed(0))
    saliency = make_saliency(
        57, 2, sums=torch.tril(10 ** (-8 * decades)), text="a step of ordinary length. " * 8
    )
    assert report(saliency, tmp_path / "out.html").stat().st_size < 6_000_000


@pytest.mark.parametrize("name", ["out.safetensors", "out", "out.pdf"])
def test_another_ending_is_refused_before_anything_is_written(name, tmp_path):
    (tmp_path / name).write_bytes(b"kept")
    with pytest.raises(ResultFileError, match=f"'{name}': expected a name that ends in .html"):
        report(make_saliency(2, 1), tmp_path / name)
    assert (tmp_path / name).read_bytes() == b"kept"


def test_a_missing_folder_is_named_and_an_old_page_is_replaced_whole(tmp_path):
    saliency = make_saliency(2, 1)
    with pytest.raises(ResultFileError, match="absent"):
        report(saliency, tmp_path / "absent" / "out.html")
    (tmp_path / "out.htm").write_text("old" * 1_000_000)
    assert report(saliency, str(tmp_path / "out.htm")).read_text("utf-8").endswith("</html>\n")
    assert [path.name for path in tmp_path.iterdir()] == ["out.htm"]
