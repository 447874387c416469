"""`StepKnockout`: what is saved comes back, what is foreign is refused, and no illegal state can be made."""

import dataclasses
import json
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from stepflow_tl import StepKnockout, step_knockout, step_saliency
from stepflow_tl.causal.knockout_result import CutGroup
from stepflow_tl.errors import ResultFileError


@pytest.fixture(scope="module")
def knockout(bridges, tiny_trace):
    return step_knockout(bridges("llama"), tiny_trace, layers="deep", heads=[1, 2])


def rewrite(source, target, without=(), **changes):
    name = "stepflow_tl.StepKnockout"
    with safe_open(source, framework="pt") as file:
        document = {**json.loads(file.metadata()[name]), **changes}
        document = {key: value for key, value in document.items() if key not in without}
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    save_file(tensors, target, metadata={name: json.dumps(document)})
    return target


def test_what_is_saved_comes_back(knockout, tmp_path):
    again = StepKnockout.load(knockout.save(tmp_path / "map"))
    assert torch.equal(again.effects, knockout.effects) and again.effects.dtype == torch.float64
    assert torch.equal(again.measured, knockout.measured) and again.trace == knockout.trace
    for name in ("layers", "n_layers", "heads", "measure", "onto", "provenance"):
        assert getattr(again, name) == getattr(knockout, name)
    assert again.heads == (1, 2) and again.layers == (3,) and again.effects.any()
    assert knockout.save(tmp_path / "two").read_bytes() == (tmp_path / "map").read_bytes()


def test_groups_come_back_and_a_file_from_before_them_still_loads(bridges, tiny_trace, tmp_path):
    found = step_knockout(
        bridges("llama"), tiny_trace, pairs="screened", top=1, tolerance=1.5, joint=[("S1", ["Q", "T2"])]
    )
    path = found.save(tmp_path / "map")
    again = StepKnockout.load(path)
    assert again.groups == found.groups and {group.role for group in found.groups} >= {"bound", "joint"}
    assert (again.tolerance, again.tokens_run) == (1.5, found.tokens_run)
    assert torch.equal(again.bounds.nan_to_num(9), found.bounds.nan_to_num(9))
    assert "screening" in again.provenance.notes

    whole = step_knockout(bridges("llama"), tiny_trace).save(tmp_path / "whole")
    older = StepKnockout.load(
        rewrite(whole, tmp_path / "older", without=("groups", "tolerance", "tokens_run", "minor"))
    )
    assert older.groups == () and older.tokens_run is None and not older.redundant
    assert older.effects.any()


def test_every_defect_of_a_file_is_named(knockout, tmp_path, bridges, tiny_trace):
    path = knockout.save(tmp_path / "map")
    (tmp_path / "cut").write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ResultFileError, match="cut is not a whole safetensors file"):
        StepKnockout.load(tmp_path / "cut")
    with pytest.raises(ResultFileError, match="expected a file written by StepKnockout.save"):
        StepKnockout.load(tmp_path / "absent")
    step_saliency(bridges("llama"), tiny_trace, layers=[0]).save(tmp_path / "saliency")
    with pytest.raises(ResultFileError, match="not a step-knockout result"):
        StepKnockout.load(tmp_path / "saliency")
    with pytest.raises(ResultFileError, match="schema version 7; this stepflow_tl reads up to 1"):
        StepKnockout.load(rewrite(path, tmp_path / "newer", version=7))


@pytest.mark.parametrize(
    "changes",
    [
        {"trace": {}},
        {"layers": [9]},
        {"layers": []},
        {"measure": 3},
        {"onto": 1},
        {"heads": "x"},
        {"provenance": []},
        {"groups": [{"query": 4, "keys": [0, 1], "effect": 0.1, "role": "other"}]},
        {"groups": [{"query": 4, "keys": [0, 1], "effect": 0.1, "role": "bound"}]},  # measured, too
        {"groups": [{"query": 4, "keys": [1, 0], "effect": 0.1, "role": "joint"}]},
        {"groups": [{"query": 9, "keys": [0, 1], "effect": 0.1, "role": "joint"}]},
        {"groups": [{"query": 4, "keys": [0, 1], "effect": None, "role": "joint"}]},
        {"tolerance": "much"},
        {"tokens_run": 1.5},
    ],
)
def test_inconsistent_metadata_is_refused(changes, knockout, tmp_path):
    broken = rewrite(knockout.save(tmp_path / "map"), tmp_path / "broken", **changes)
    with pytest.raises(ResultFileError, match="its content is inconsistent"):
        StepKnockout.load(broken)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("effects", torch.full((5, 5), torch.nan), "must be finite"),
        ("effects", torch.ones(5, 5), "must be 0 where nothing was measured"),
        ("measured", torch.ones(5, 5, dtype=torch.bool), "key step comes after its query step"),
        ("layers", (), "must be distinct and at least one"),
        ("layers", (4,), "outside the model's 0..3"),
        ("groups", (CutGroup(4, (0, 1), 0.1, "bound"),), "bounds a pair that was measured, or that another"),
        ("groups", (CutGroup(7, (0, 1), 0.1, "joint"),), "names a step that the trace does not have"),
        ("groups", (CutGroup(4, (0, 1), float("inf"), "joint"),), "effect and size must be finite"),
        ("groups", (CutGroup(4, (0, 1), -2.0, "joint", 1.0),), "the size not below the effect"),
    ],
)
def test_no_illegal_state_can_be_made(field, value, said, knockout):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(knockout, **{field: value})


@pytest.mark.parametrize("keys", [(0,), (1, 1), (2, 1), (-1, 2), (3, 5)])
def test_a_group_is_of_two_or_more_earlier_steps(keys):
    with pytest.raises(ValueError, match="expected two or more steps, ascending, none after the query"):
        CutGroup(4, keys, 0.1, "joint")


def test_excess_and_redundancy_by_hand(knockout):
    """S1: Q alone .1, T1 alone .2; T2 and T3 bounded together with .05."""
    effects, measured = torch.zeros(5, 5, dtype=torch.float64), torch.zeros(5, 5, dtype=torch.bool)
    effects[4, :2], measured[4, :2] = torch.tensor([0.1, 0.2], dtype=torch.float64), True
    groups = [
        ((2, 3), 0.05, "bound"),
        ((0, 1), 0.9, "joint"),
        ((1, 2), 2.0, "joint"),
        ((0, 1, 2, 3), 3.0, "split"),
    ]
    groups = tuple(CutGroup(4, *group) for group in groups)
    found = dataclasses.replace(knockout, effects=effects, measured=measured, groups=groups, tolerance=0.5)
    bound, pair, partly, everything = groups
    assert found.excess(pair) == pytest.approx(0.6) and found.excess(everything) == pytest.approx(3.0 - 0.35)
    assert all(math.isnan(found.excess(group)) for group in (bound, partly))
    assert found.redundant == (pair,), "the smallest only"
    assert dataclasses.replace(found, tolerance=0.7).redundant == (everything,)
    assert found.bounds[4, 2:4].tolist() == [0.05, 0.05] and found.bounds.isfinite().sum() == 2
    text = found.table()
    assert "2 more pairs in 1 groups that were cut together: at most 0.0500 each group" in text
    assert "redundant: S1 from 2 together (Q, T1): 0.9000, 0.3000 as a sum of its parts" in text
    assert "S1 from 2 together (T1, T2): 2.0000" in text
    assert "StepKnockout(2 pairs and 4 groups of 5 steps" in repr(found)


def test_pooling_is_that_of_a_saliency_map(knockout):
    lengths = knockout.step_lengths.double()
    assert torch.equal(knockout.pooled("sum"), knockout.effects)
    assert torch.allclose(knockout.pooled("mean"), knockout.effects / (lengths[:, None] * lengths))
    assert knockout.labels == ["Q", "T1", "T2", "T3", "S1"]


def test_the_table_lists_the_strongest_pairs_first(knockout):
    lines = knockout.table(3).splitlines()
    assert "Step knockout: tiny-llama" in lines[0] and "3 of 10 pairs; positive: the cut hurts" in lines[-1]
    place = knockout.effects.abs().argmax()
    query, key = divmod(int(place), 5)
    assert lines[5].split()[:2] == [knockout.labels[query], knockout.labels[key]]
    assert repr(knockout) == (
        "StepKnockout(10 pairs of 5 steps, 1 of 4 layers, measure='nll', method='cached', model='tiny-llama')"
    )


def test_a_map_of_another_number_of_steps_is_refused(knockout):
    with pytest.raises(ValueError, match=r"effects has shape \(3, 3\), expected \(5, 5\)"):
        dataclasses.replace(knockout, effects=torch.zeros(3, 3), measured=torch.zeros(3, 3, dtype=torch.bool))
