"""The API reference is what the docstrings say, and the docstrings say what there is."""

import ast
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "docs" / "scripts" / "api_reference.py"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("api_reference", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["api_reference"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


api = load()


def made_definition(source: str):
    return api.Definition("made", "stepflow_tl", ast.parse(source).body[0], source)


def test_the_committed_pages_are_what_the_script_writes():
    pages = api.all_pages()
    assert {path.name for path in api.PAGES.glob("*.md")} == {path.name for path in pages}
    for path, text in pages.items():
        assert path.read_text("utf-8") == text, f"{path.name} is out of date: run `python {SCRIPT.name}`"


@pytest.mark.parametrize("package", api.PACKAGES)
def test_the_names_are_those_that_python_finds(package: str):
    names = api.public_names(package)
    module = importlib.import_module(package)
    assert names
    assert all(hasattr(module, name) for name in names)
    if hasattr(module, "__all__"):
        assert set(names) == set(module.__all__)


@pytest.mark.parametrize("package", api.PACKAGES)
def test_every_public_name_documents_its_arguments(package: str):
    assert [gap for definition in api.public_definitions(package) for gap in api.gaps(definition)] == []


@pytest.mark.parametrize(
    ("source", "gap"),
    [
        ("def made(x): pass", "made has no docstring"),
        (
            'def made(x):\n    "Text that says `x`, but does not list it."',
            "made: its docstring does not name x",
        ),
        (
            'def made(x, *, y):\n    """T.\n\n    Args:\n        x: X.\n    """',
            "made: its docstring does not name y",
        ),
        ('@dataclass\nclass made:\n    """T."""\n    x: int', "made: its docstring does not name x"),
        (
            'class made:\n    """T."""\n    def of(self, x):\n        "T."',
            "made.of: its docstring does not name x",
        ),
        ('class made:\n    """T."""\n    def of(self): pass', "made.of has no docstring"),
    ],
)
def test_a_gap_is_found(source: str, gap: str):
    assert api.gaps(made_definition(source)) == [gap]


def test_arguments_may_be_left_to_a_function_that_lists_them():
    as_exact = 'def made(question, answer):\n    """T. Arguments as in `exact`."""'
    more = 'def made(question, other):\n    """T. Arguments as in `exact`."""'
    assert api.gaps(made_definition(as_exact)) == []
    assert api.gaps(made_definition(more)) == ["made: its docstring does not name other"]
    with pytest.raises(LookupError, match="nowhere"):
        api.gaps(made_definition('def made(x):\n    """T. Arguments as in `nowhere`."""'))


def test_a_stale_page_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(api, "PAGES", tmp_path)
    monkeypatch.setattr(sys, "argv", ["api_reference.py"])
    api.main()
    (tmp_path / "stepflow_tl.md").write_text("old")
    monkeypatch.setattr(sys, "argv", ["api_reference.py", "--check"])
    with pytest.raises(SystemExit, match="stepflow_tl.md: out of date"):
        api.main()


def test_text_outside_code_is_no_html_and_no_emphasis():
    assert api.escaped("a <think> and `<b>` and *x*") == r"a &lt;think> and `<b>` and \*x\*"
