"""The pages as a site: it builds without a warning, and every link in it leads to a file and a place."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ("sphinx", "furo", "myst_parser", "latex2mathml")
LACKING = [name for name in NEEDED if not importlib.util.find_spec(name)]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if LACKING:
        pytest.skip(f"needs {', '.join(LACKING)}: pip install -c constraints.txt '.[docs]'")
    out = tmp_path_factory.mktemp("site")
    options = ["-q", "-W", "--keep-going", "-n", "-E", "-c", "docs/site", "-d", str(out / "doctrees")]
    call = [sys.executable, "-m", "sphinx", *options, ".", str(out / "html")]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return out / "html"


def dead_links(page: Path) -> list[str]:
    """Links from a page to a file that is not there, or to a place that the file does not have."""
    dead = []
    for link in re.findall(r'(?:href|src)="([^"]*)"', page.read_text("utf-8")):
        name, _, place = unquote(link).partition("#")
        there = page.parent / name.partition("?")[0] if name else page
        if re.match(r"[a-z]+:", link):
            continue
        is_there = there.is_file() and (not place or f'id="{place}"' in there.read_text("utf-8"))
        dead += [] if is_there else [link]
    return dead


def test_every_link_leads_somewhere(site: Path):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 60
    assert {page.name: dead for page in pages if (dead := dead_links(page))} == {}


def test_links_formulas_and_sources_are_as_the_pages_mean_them(site: Path):
    front = (site / "README.html").read_text("utf-8")
    assert "url=README.html" in (site / "index.html").read_text("utf-8")
    assert "From the first map to a study" in front and "How to" in front  # the menu
    method = (site / "docs" / "method.html").read_text("utf-8")
    assert method.count("<math ") > 100 and not re.findall('<(?:script|link)[^>]*"http', method)
    assert 'href="../source/stepflow_tl/stepflow/bridge.py.html"' in method
    assert "Odds-Equal Bridge" in (site / "source/stepflow_tl/stepflow/bridge.py.html").read_text("utf-8")


def test_a_dead_link_is_found(tmp_path: Path):
    page = tmp_path / "page.html"
    links = ("#a", "#b", "gone.html", "https://example.org/x", "page.html#a")
    page.write_text("".join(f'<p id="a"><a href="{link}">' for link in links))
    assert dead_links(page) == ["#b", "gone.html"]
