"""`StepPatching`: what is saved comes back, damage is named, and the table lists the strongest effects."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from stepflow_tl.causal import StepPatching, step_patching
from stepflow_tl.errors import ResultFileError


@pytest.fixture(scope="module")
def patching(tiny_model, right_trace, wrong_trace):
    return step_patching(
        tiny_model(), right_trace, wrong_trace, metric="summary", layers=[1, 0], steps=["T1", "S1"]
    )


def test_what_is_saved_comes_back(patching, tmp_path):
    again = StepPatching.load(patching.save(tmp_path / "patching"))
    assert torch.equal(again.effects, patching.effects) and again.effects.any()
    for name in ("method", "component", "alignment", "matches", "layers", "n_layers", "receiving_step"):
        assert getattr(again, name) == getattr(patching, name)
    assert (again.corrupted_value, again.clean_value) == (patching.corrupted_value, patching.clean_value)
    assert again.provenance == patching.provenance
    assert (again.unreached, again.tokens_run) == ((), patching.tokens_run) and again.tokens_run
    assert patching.save(tmp_path / "two").read_bytes() == (tmp_path / "patching").read_bytes()


@pytest.mark.parametrize(
    "changes", [{"method": "guess"}, {"alignment": 3}, {"matches": [[{}, {}]]}, {"layers": [0]}]
)
def test_inconsistent_metadata_is_refused(changes, patching, tmp_path):
    name = "stepflow_tl.StepPatching"
    with safe_open(patching.save(tmp_path / "whole"), framework="pt") as file:
        document = {**json.loads(file.metadata()[name]), **changes}
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    save_file(tensors, tmp_path / "broken", metadata={name: json.dumps(document)})
    with pytest.raises(ResultFileError, match="its content is inconsistent"):
        StepPatching.load(tmp_path / "broken")


def test_the_table_lists_the_strongest_effects_first(patching):
    lines = patching.table(3).splitlines()
    assert lines[0] == f"Patching of resid_pre: {patching.provenance.model_name}"
    row, column = divmod(int(patching.effects.abs().argmax()), 2)
    assert lines[5].split()[:2] == [str(patching.layers[row]), patching.labels[column]]
    assert lines[-1].startswith("3 of 4 entries; positive: the patch raises the metric; without a patch ")
