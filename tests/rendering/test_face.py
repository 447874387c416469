"""The face of `rendering`: nothing heavy before it is used, and a missing library is named."""

import subprocess
import sys
from pathlib import Path

import pytest
from made_maps import make_saliency

from stepflow_tl import errors, rendering
from stepflow_tl.errors import MissingExtraError

FILES = sorted(Path(rendering.__file__).parent.glob("[!_]*.py"))
MODULES = ["stepflow_tl.rendering", *(f"stepflow_tl.rendering.{file.stem}" for file in FILES)]
PLOTTING = ("matplotlib", "circuitsvis")


def loaded_after(statement: str) -> set[str]:
    """Top-level packages in a fresh interpreter after `statement`."""
    code = f"{statement}\nimport sys; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return set(run.stdout.split())


def test_no_rendering_module_imports_a_plotting_library():
    loaded = loaded_after("import " + ", ".join(MODULES))
    assert len(FILES) > 10 and "stepflow_tl" in loaded and not loaded & set(PLOTTING)


def test_the_package_itself_imports_no_torch():
    assert "torch" not in loaded_after("import stepflow_tl.rendering")


def test_the_check_above_can_fail():
    assert "circuitsvis" in loaded_after("import stepflow_tl.rendering, circuitsvis")


@pytest.mark.parametrize(
    ("library", "view"), [("matplotlib", "step_map_figure"), ("circuitsvis", "show_step_maps")]
)
def test_a_missing_library_is_named_with_its_install_command(library, view, monkeypatch):
    draw, real = getattr(rendering, view), errors.importlib.import_module

    def without_library(name, *args):
        if name.partition(".")[0] == library:
            raise ModuleNotFoundError(f"No module named {library!r}", name=library)
        return real(name, *args)

    monkeypatch.setattr(errors.importlib, "import_module", without_library)
    with pytest.raises(MissingExtraError, match=rf"needs {library}.*pip install 'stepflow-tl\[plots\]'"):
        draw(make_saliency(2, 1))


def test_a_library_that_is_installed_but_broken_raises_its_own_error(monkeypatch):
    def broken(name):
        raise ModuleNotFoundError("No module named 'kiwisolver'", name="kiwisolver")

    monkeypatch.setattr(errors.importlib, "import_module", broken)
    with pytest.raises(ModuleNotFoundError, match="kiwisolver"):
        errors.require("matplotlib", purpose="Drawing", extra="plots")


def test_an_unknown_name_is_refused_with_the_public_ones():
    with pytest.raises(AttributeError, match="'sankey'; public names: CircuitsvisView, agreement_figure"):
        _ = rendering.sankey
    assert set(rendering.__all__) <= set(dir(rendering))
