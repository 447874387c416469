"""The code blocks of the pages run, in order and in one namespace, and print what the pages say they do."""

import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from stepflow_tl import ReasoningTrace, load_testbed_model
from stepflow_tl.diagnosis import LAYER_METRICS
from stepflow_tl.evaluation import grading

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = ("tutorial.md", "extending.md")
#: Their blocks begin where a reader has a model and a trace.
GOING_ON = ("long_traces.md", "stepflow.md")
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)


def run(text: str, **names: Any) -> list[tuple[str, str]]:
    """What each block with an output is said to print, and what it prints."""
    outputs = []
    for code, said in BLOCK.findall(text):
        printed = StringIO()
        with redirect_stdout(printed):
            exec(compile(code, "page", "exec"), names)
        outputs.append((said, "\n".join(line.rstrip() for line in printed.getvalue().splitlines())))
    return [(said.rstrip(), printed) for said, printed in outputs if said]


@pytest.fixture(autouse=True)
def registered_goes_again():
    tables = (LAYER_METRICS, grading._graders)
    before = [dict(table) for table in tables]
    yield
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)


@pytest.mark.parametrize("name", PAGES)
def test_the_blocks_of_a_page_print_what_it_says(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    outputs = run((DOCS / name).read_text("utf-8"))
    assert len(outputs) > 3
    for said, printed in outputs:
        assert printed == said


@pytest.mark.parametrize("name", GOING_ON)
def test_the_blocks_of_a_page_run_on_a_model_and_a_trace(name: str):
    text = (DOCS / name).read_text("utf-8")
    model = load_testbed_model()
    trace = ReasoningTrace.from_parts(model.tokenizer, "a = 3", "a = 3\n\na = 3", "3")
    assert BLOCK.search(text) is not None
    run(text, model=model, trace=trace)


def test_a_page_that_is_wrong_is_found():
    page = "```python\nx = 1\n```\n\n```python\nprint(x + 1)\n```\n\n```text\n3\n```\n"
    assert run(page) == [("3", "2")]
    with pytest.raises(ZeroDivisionError):
        run("```python\n1 / 0\n```\n")
