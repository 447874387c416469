"""What an installed stepflow-tl must do, without its extras and with them; run outside a checkout.

    python -m build && python -m twine check --strict dist/*
    python -m venv /tmp/plain && /tmp/plain/bin/pip install dist/*.whl
    cd /tmp && /tmp/plain/bin/python CHECKOUT/scripts/check_wheel.py
    /tmp/plain/bin/pip install "$(ls CHECKOUT/dist/*.whl)[all]"
    /tmp/plain/bin/python CHECKOUT/scripts/check_wheel.py --all

1. It is the wheel that is imported, not a checkout.
2. Every public name resolves, and `stepflow-tl --help` answers.
3. A map, its diagnosis and its page are made with the model in the wheel.
4. Without extras what needs one says which; with `--all` it works.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import stepflow_tl
from stepflow_tl import ReasoningTrace, diagnose, load_testbed_model, report, step_saliency
from stepflow_tl.errors import MissingExtraError
from stepflow_tl.rendering import step_map_figure
from stepflow_tl.testbed import ProblemSpec, make_problems

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--all", action="store_true", help="the extra `all` is installed")
has_extras = parser.parse_args().all

assert "site-packages" in stepflow_tl.__file__, f"{stepflow_tl.__file__} is not an installed wheel"
assert all(getattr(stepflow_tl, name) for name in stepflow_tl.__all__)
command = Path(sys.executable).with_name("stepflow-tl")
assert "examples:" in subprocess.run([command, "--help"], capture_output=True, text=True, check=True).stdout

model = load_testbed_model()
(problem,) = make_problems(ProblemSpec(n_steps=4), 1, seed=0)
trace = ReasoningTrace.from_parts(model.tokenizer, problem.question, problem.thinking, problem.answer)
saliency = step_saliency(model, trace)
with tempfile.TemporaryDirectory() as folder:
    assert Path(report(saliency, Path(folder) / "map.html")).stat().st_size > 10_000
try:
    step_map_figure(saliency)
    assert has_extras, "a figure without matplotlib: the extras are installed, so give --all"
except MissingExtraError as error:
    assert not has_extras, error
    print(error)
assert len(diagnose(saliency).to_dataframe()) == model.cfg.n_layers  # pandas comes with TransformerLens
print(f"stepflow-tl {stepflow_tl.__version__}, Python {sys.version.split()[0]}, extras: {has_extras}: whole")
