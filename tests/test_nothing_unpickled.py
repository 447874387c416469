"""Nothing is ever unpickled: not in the source, and not while everything that can be read is read."""

import pickle
import re
from pathlib import Path

import pandas  # noqa: F401  # imported before the refusal, which its first import would meet
import pytest
import torch
from fuzz_targets import TARGETS
from tiny_gguf import write_tiny_gguf

import stepflow_tl
from stepflow_tl.models.gguf import GgufCheckpoint
from stepflow_tl.testbed.model import read_weights

PACKAGE = Path(stepflow_tl.__file__).parent
# Whatever runs code that a file brings along.
FORBIDDEN = re.compile(
    r"\b(?:c?pickle|dill|joblib|cloudpickle|shelve|marshal)\b|allow_pickle|yaml\.(?:unsafe_)?load|"
    r"\b(?:eval|exec)\(|trust_remote_code\s*=\s*True|torch\.load\((?![^)]*weights_only=True)"
)


def offences(text):
    return [found[0] for found in FORBIDDEN.finditer(text) if text[found.start() - 1] != "."]


def test_the_source_names_nothing_that_unpickles_or_evaluates():
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 100
    found = {str(file.relative_to(PACKAGE)): offences(file.read_text(encoding="utf-8")) for file in files}
    # The grader of code executes code: there, in a caged process, and nowhere else. Nothing imports it.
    caged = "evaluation/caged/roles.py"
    assert {file: what for file, what in found.items() if what} == {caged: ["exec("] * 3}
    assert not [file for file in files if "evaluation.caged" in file.read_text(encoding="utf-8")]


@pytest.mark.parametrize(
    "line",
    ["import pickle", "x = torch.load(path)", "np.load(f, allow_pickle=True)", "eval(text)", "yaml.load(f)"],
)
def test_the_search_finds_what_it_looks_for(line):
    assert offences(f"\n{line}\n")


@pytest.fixture
def no_unpickling(monkeypatch):
    def refuse(*_args, **_options):
        raise AssertionError("something was unpickled")

    for name in ("load", "loads", "Unpickler", "_Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(AssertionError, match="unpickled"):
        pickle.loads(b"")


def test_everything_that_can_be_read_is_read_without_unpickling(no_unpickling, tmp_path):
    for target in TARGETS:
        for data in target.seeds():
            target.run(data)
    GgufCheckpoint.open(write_tiny_gguf(tmp_path / "m.gguf")).model(torch.float32)
    read_weights()
