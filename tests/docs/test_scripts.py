"""Scripts and notebooks import names that the package has; no test runs all of them."""

import ast
import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("benchmarks", "docs/scripts", "scripts", "notebooks")
FILES = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*.*"))
SCRIPTS = sorted(path for path in FILES if path.suffix in (".py", ".ipynb"))


def source(path: Path) -> str:
    if path.suffix == ".py":
        return path.read_text("utf-8")
    cells = (cell for cell in json.loads(path.read_text("utf-8"))["cells"] if cell["cell_type"] == "code")
    lines = ("".join(cell["source"]).splitlines() for cell in cells)
    return "\n".join(line for cell in lines for line in cell if not line.startswith(("%", "!")))


def missing_names(text: str) -> list[str]:
    """The names that `text` imports from the package and that the package lacks."""
    imports = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom) and node.module]
    ours = [(node.module or "", alias.name) for node in imports for alias in node.names]
    return [
        f"{module}.{name}"
        for module, name in ours
        if module.split(".")[0] == "stepflow_tl" and not has(module, name)
    ]


def has(module: str, name: str) -> bool:
    try:
        return hasattr(importlib.import_module(module), name) or bool(
            importlib.import_module(f"{module}.{name}")
        )
    except ModuleNotFoundError:
        return False


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_every_name_imported_from_the_package_is_there(path: Path):
    assert missing_names(source(path)) == []


def test_a_name_that_is_gone_is_found():
    assert missing_names("from stepflow_tl.rendering.sheet import Sheet, new_figure\nimport os") == [
        "stepflow_tl.rendering.sheet.new_figure"
    ]
    assert missing_names("def f():\n    from stepflow_tl.nowhere import x") == ["stepflow_tl.nowhere.x"]
    assert missing_names("from stepflow_tl import trace") == []
