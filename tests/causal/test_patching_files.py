"""`StepPatching`: what is saved comes back, damage is named, and the picture shows the effects."""

import json

import numpy as np
import pytest
import torch


@pytest.fixture(scope="module")
def patching(tiny_model, right_trace, wrong_trace):
    from stepflow_tl.causal import step_patching

    return step_patching(
        tiny_model(), right_trace, wrong_trace, metric="summary", layers=[1, 0], steps=["T1", "S1"]
    )


def test_what_is_saved_comes_back(patching, tmp_path):
    from stepflow_tl.causal import StepPatching

    again = StepPatching.load(patching.save(tmp_path / "patching"))
    assert torch.equal(again.effects, patching.effects) and again.effects.any()
    for name in ("method", "component", "alignment", "matches", "layers", "n_layers", "receiving_step"):
        assert getattr(again, name) == getattr(patching, name)
    assert (again.corrupted_value, again.clean_value) == (patching.corrupted_value, patching.clean_value)
    assert again.provenance == patching.provenance
    assert patching.save(tmp_path / "two").read_bytes() == (tmp_path / "patching").read_bytes()


@pytest.mark.parametrize(
    "changes", [{"method": "guess"}, {"alignment": 3}, {"matches": [[{}, {}]]}, {"layers": [0]}]
)
def test_metadata_that_does_not_hold_together_is_refused(changes, patching, tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    from stepflow_tl.causal import StepPatching
    from stepflow_tl.errors import ResultFileError

    name = "stepflow_tl.StepPatching"
    with safe_open(patching.save(tmp_path / "whole"), framework="pt") as file:
        document = {**json.loads(file.metadata()[name]), **changes}
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    save_file(tensors, tmp_path / "broken", metadata={name: json.dumps(document)})
    with pytest.raises(ResultFileError, match="does not hold together"):
        StepPatching.load(tmp_path / "broken")


def test_the_picture_shows_layers_upward_and_steps_to_the_right(patching):
    pytest.importorskip("matplotlib")
    figure = patching.show()
    axes = figure.axes[0]
    np.testing.assert_array_equal(axes.images[0].get_array(), patching.effects.flip(0).numpy())
    assert [t.get_text() for t in axes.get_yticklabels()] == ["0", "1"] and not axes.yaxis_inverted()
    assert [t.get_text() for t in axes.get_xticklabels()] == ["T1", "S1"]
    norm = axes.images[0].norm
    assert norm.vmax == -norm.vmin == float(patching.effects.abs().max())
