"""The package keeps to the plan of `scripts/house.py`, and a house that does not is found out."""

import re
from pathlib import Path

import pytest
from house import NEIGHBOURS, PACKAGE, STOREY_OF, code_lines, faults, measures, read_house, room

ROOT = Path(__file__).resolve().parents[1]


def build(root: Path, files: dict[str, str]) -> Path:
    """A checkout with these files in the package, and an `__init__.py` in every folder without one."""
    for name, source in files.items():
        path = root / PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    for folder in (root / PACKAGE, *(root / PACKAGE).rglob("*/")):
        (folder / "__init__.py").touch()
    return root


def faults_of(root: Path, files: dict[str, str]) -> list[str]:
    return faults(read_house(build(root, files)))


def test_the_package_keeps_to_the_plan():
    house = read_house(ROOT)
    assert len(house.files) > 50 and len(house.imports) > 200  # something was read
    assert faults(house) == []


def test_every_room_of_the_plan_exists_and_neighbours_share_a_storey():
    assert {room(module) for module in read_house(ROOT).files} == set(STOREY_OF)
    for own, others in NEIGHBOURS.items():
        assert {STOREY_OF[other] for other in others} == {STOREY_OF[own]}


LAZY = "def f():\n    {}\n"
TYPING = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    {}\n"
RESOLVER = "def __getattr__(name): ...\n"
# A house that is in order: every kind of import that the plan allows.
GOOD = {
    "__init__.py": TYPING.format("from stepflow_tl.trace import Trace")
    + "_HOME_OF = {'Trace': 'stepflow_tl.trace'}\n"
    + RESOLVER,
    "errors.py": "import json\n",
    "trace/__init__.py": "from stepflow_tl.trace.trace import Trace as Trace\n",
    "trace/trace.py": "from stepflow_tl.errors import Error\nfrom stepflow_tl.trace.formats import table\n",
    "trace/formats/__init__.py": "from stepflow_tl.trace.formats.table import get as get\n",
    "trace/formats/table.py": "import stepflow_tl.errors\n",
    "results/files.py": "from stepflow_tl.trace import Trace\n",
    "saliency/fast.py": LAZY.format("import torch") + LAZY.format("from stepflow_tl.saliency import kernels"),
    "saliency/kernels.py": "import triton\n",
    "rendering/__init__.py": "_HOME_OF = {'page': 'stepflow_tl.rendering.page'}\n" + RESOLVER,
    "rendering/page.py": "from stepflow_tl import errors\n",
    "cli/main.py": LAZY.format("from stepflow_tl import Trace") + LAZY.format("import stepflow_tl.rendering"),
    "__main__.py": "from stepflow_tl.cli.main import main\n",
}


def test_a_house_in_order_has_no_faults(tmp_path):
    assert faults_of(tmp_path, GOOD) == []


UP = "from stepflow_tl.rendering.page import page"
UPWARD = r"files:\d imports stepflow_tl\.rendering\.page: results stands on storey 0, rendering on storey 4"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"results/files.py": UP}, UPWARD),
        ({"results/files.py": "import stepflow_tl.rendering.page as page"}, UPWARD),
        ({"results/files.py": "from stepflow_tl.rendering import page"}, UPWARD),
        ({"results/files.py": TYPING.format(UP)}, UPWARD),
        ({"results/files.py": f"try:\n    {UP}\nexcept ImportError:\n    pass"}, UPWARD),
        ({"results/files.py": f"class A:\n    {UP}"}, UPWARD),
        ({"results/files.py": "from stepflow_tl import Trace"}, "stepflow_tl on storey 7"),
        (
            {"results/__init__.py": "_HOME_OF = 'stepflow_tl.rendering.page'\n" + RESOLVER},
            r"results:1 imports stepflow_tl\.rendering\.page: results stands on storey 0",
        ),
        (
            {"errors.py": "from stepflow_tl.trace import Trace"},
            "errors stands on storey 0, trace on storey 0",
        ),
        ({"trace/formats/table.py": "import stepflow_tl.trace"}, "the face of a folder it stands in"),
        ({"results/files.py": LAZY.format("import stepflow_tl.errors")}, "inside a function"),
        ({"results/files.py": "async " + LAZY.format("import stepflow_tl.errors")}, "inside a function"),
        ({"results/files.py": "from . import other"}, r"results\.files:1 is a relative import"),
        ({"results/files.py": "import stepflow_tl.nowhere"}, "stepflow_tl.nowhere, which does not exist"),
        ({"results/files.py": RESOLVER}, "resolves names lazily"),
        ({"results/files.py": "__getattr__, __all__ = lazy_face(__name__)"}, "resolves names lazily"),
        (
            {"results/files.py": "import importlib\nimportlib.import_module('stepflow_tl.errors')"},
            "imports stepflow_tl.errors by import_module",
        ),
        ({"cellar/wine.py": ""}, "room 'cellar' stands on no storey"),
    ],
)
def test_what_breaks_the_plan_is_the_one_fault_found(tmp_path, files, expected):
    (found,) = [f for f in faults_of(tmp_path, GOOD | files) if not f.startswith("circle")]
    assert re.search(expected, found)


def test_a_lazy_upward_import_is_found_for_both_reasons(tmp_path):
    first, second = faults_of(tmp_path, GOOD | {"results/files.py": LAZY.format(UP)})
    assert "results stands on storey 0, rendering on storey 4" in first and "inside a function" in second


A_AND_B = "circle: stepflow_tl.results.a, stepflow_tl.results.b"


@pytest.mark.parametrize("back", ["{}", LAZY, TYPING])
def test_a_circle_of_two_files_is_found_however_one_of_them_imports(tmp_path, back):
    files = {
        "results/a.py": "from stepflow_tl.results.b import b",
        "results/b.py": back.format("from stepflow_tl.results import a"),
    }
    assert A_AND_B in faults_of(tmp_path, GOOD | files)


def test_a_longer_circle_and_one_through_a_face_are_found_whole(tmp_path):
    files = {
        "results/a.py": "import stepflow_tl.results.b",
        "results/b.py": "import stepflow_tl.results.c",
        "results/c.py": "import stepflow_tl.results.a",
        "trace/trace.py": "from stepflow_tl.trace import formats",
        "trace/formats/table.py": "from stepflow_tl.trace.trace import Trace",
    }
    assert faults_of(tmp_path, GOOD | files) == [
        f"{A_AND_B}, stepflow_tl.results.c",
        "circle: stepflow_tl.trace.formats, stepflow_tl.trace.formats.table, stepflow_tl.trace.trace",
    ]


def test_code_lines_leave_out_blank_lines_comments_and_docstrings():
    source = '"""A module\n\nof three lines."""\n\n# a comment\nx = """text\n\nthat counts"""  # so\n\n\n'
    source += 'def f():\n    """Doc."""\n    return (\n        1\n    )\n'
    assert code_lines(source) == 3 + 1 + 3


def test_the_measures_of_a_house_without_plan_come_from_its_imports(tmp_path):
    files = {
        "__init__.py": RESOLVER + "_HOME = 'stepflow_tl.attic'\n",
        "attic.py": "import stepflow_tl.hall\n",
        "hall.py": "import stepflow_tl.cellar\n",
        "cellar.py": LAZY.format("import stepflow_tl.attic") + LAZY.format("import stepflow_tl.attic"),
    }
    assert measures(build(tmp_path, files)) == {
        "lines": 8,
        "code lines": 8,
        "files": 4,
        "storeys": 3,
        "circles": 1,
        "upward imports": 1,
    }


def test_the_measures_of_a_house_with_plan_count_what_breaks_it(tmp_path):
    found = measures(build(tmp_path, GOOD | {"results/files.py": LAZY.format(UP)}))
    assert (found["storeys"], found["circles"], found["upward imports"]) == (8, 0, 1)
