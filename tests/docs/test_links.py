"""Every relative link and every command in the pages leads somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("docs", "benchmarks", "notebooks")
TOP = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")
PAGES = sorted(
    [*map(ROOT.joinpath, TOP), *(page for name in FOLDERS for page in (ROOT / name).rglob("*.md"))]
)
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]

FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`[^`\n]*`")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
COMMAND = re.compile(r"\bpython\s+(?:-m\s+([\w.]+)|([\w./-]+\.py))")


def links(text: str) -> list[str]:
    return [target for target in LINK.findall(CODE.sub("", FENCED.sub("", text))) if "://" not in target]


def anchors(text: str) -> set[str]:
    """GitHub's anchors: small letters, spaces to hyphens, other signs left out, repeats numbered."""
    found: list[str] = []
    for heading in re.findall(r"(?m)^#+ (.*)$", FENCED.sub("", text)):
        slug = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        repeats = sum(re.fullmatch(rf"{re.escape(slug)}(-\d+)?", other) is not None for other in found)
        found.append(f"{slug}-{repeats}" if repeats else slug)
    return set(found)


def broken(page: Path) -> list[str]:
    text = page.read_text("utf-8")
    wrong = []
    for target in links(text):
        name, _, anchor = target.partition("#")
        there = (page.parent / name).resolve() if name else page
        if not there.exists() or (anchor and anchor not in anchors(there.read_text("utf-8"))):
            wrong.append(target)
    return wrong


def missing_commands(text: str) -> list[str]:
    wrong = []
    for module, script in COMMAND.findall(text):
        path = Path(module.replace(".", "/")) if module else Path(script)
        if module and not module.startswith("stepflow_tl"):
            continue
        if not any((ROOT / each).is_file() for each in (path, path.with_suffix(".py"), path / "__main__.py")):
            wrong.append(module or script)
    return wrong


@pytest.mark.parametrize("name", NAMES)
def test_relative_links_resolve(name: str):
    assert broken(ROOT / name) == []


@pytest.mark.parametrize("name", [name for name in NAMES if name != "CHANGELOG.md"])  # which names old ones
def test_commands_name_scripts_that_exist(name: str):
    text = re.sub(r"\s+", " ", (ROOT / name).read_text("utf-8"))  # a command may be broken over two lines
    assert missing_commands(text) == []


def test_there_is_something_to_check():
    every = "\n".join(page.read_text("utf-8") for page in PAGES)
    assert len(links(every)) > 20
    assert len(COMMAND.findall(every)) > 4
    assert "docs/method.md" in NAMES


def test_what_leads_nowhere_is_found(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text("# A `b`\n[x](gone.md) [y](page.md#a-b) [z](#c) [w](https://example.org/x) `[v](u.md)`\n")
    assert broken(page) == ["gone.md", "#c"]
    commands = "python benchmarks/gone.py, python -m stepflow_tl.gone, python -m pip, python README.py"
    assert missing_commands(commands) == ["benchmarks/gone.py", "stepflow_tl.gone", "README.py"]
