"""One base for every result: files of earlier versions load, heads are read alone, kinds are not mixed up."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import safetensors
import torch
from made_maps import make_knockout, make_patching, make_saliency

import stepflow_tl
from stepflow_tl import StepKnockout, StepSaliency
from stepflow_tl.causal import StepPatching
from stepflow_tl.errors import ResultFileError
from stepflow_tl.results.result import ResultHead, StoredResult, read_head
from stepflow_tl.results.tables import shortened

KINDS = {"saliency": StepSaliency, "knockout": StepKnockout, "patching": StepPatching}
# Made maps, written when each kind had a codec of its own (schema version 1, minor 0).
WRITTEN_BEFORE = Path(__file__).parent / "written_before"


def made(kind: str):
    saliency = make_saliency(3, 1)
    make = {"saliency": lambda saliency: saliency, "knockout": make_knockout, "patching": make_patching}
    return make[kind](saliency)


def test_class_variables_say_of_what_type_they_are():
    # On Python 3.10 `get_type_hints`, by which a result knows its tensors, refuses a ClassVar without one.
    sources = {path: path.read_text("utf-8") for path in Path(stepflow_tl.__file__).parent.rglob("*.py")}
    assert sum("ClassVar[" in source for source in sources.values()) > 3
    assert [path.name for path, source in sources.items() if re.search(r": ClassVar\b(?!\[)", source)] == []


def tensors_of(result):
    values = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_an_earlier_version_loads_and_saves_to_the_same_content(kind, tmp_path):
    old = WRITTEN_BEFORE / f"{kind}.safetensors"
    result = KINDS[kind].load(old)
    assert result.labels == ["Q", "T1", "T2", "T3", "S1"] and result.n_layers == 8
    assert result.provenance.model_name == "</script>" and result.provenance.objective == "per_token"
    again = KINDS[kind].load(result.save(tmp_path / "again"))
    for name, tensor in tensors_of(result).items():
        assert tensor.any() and torch.equal(getattr(again, name), tensor)
    with (
        safetensors.safe_open(old, framework="pt") as before,
        safetensors.safe_open(tmp_path / "again", framework="pt") as after,
    ):
        assert set(before.keys()) == set(after.keys())
        written, again = (json.loads(file.metadata()[KINDS[kind].schema.name]) for file in (before, after))
    added = {"knockout": {"groups", "tolerance", "tokens_run"}, "patching": {"unreached", "tokens_run"}}
    assert again.keys() - written.keys() == added.get(kind, set())
    assert {**again, **written} == {**again, "minor": written["minor"]}


def test_facts_of_earlier_files_are_those_that_were_written():
    saliency, knockout, patching = (
        kind.load(WRITTEN_BEFORE / f"{name}.safetensors") for name, kind in KINDS.items()
    )
    assert torch.equal(saliency.sums, make_saliency(3, 1).sums)
    assert (knockout.measure, knockout.onto, knockout.heads) == ("nll", "S1", None)
    assert torch.equal(knockout.measured, torch.ones(5, 5, dtype=torch.bool).tril(-1))
    assert (patching.method, patching.component, patching.receiving_step) == ("patching", "resid_pre", "S1")
    assert (patching.layers, patching.corrupted_value) == ((7, 6, 5, 4, 3, 2, 1, 0), 1.25)
    assert patching.matches[1].clean == saliency.trace.steps[1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_is_read_alone(kind, tmp_path, monkeypatch):
    result = made(kind)
    path = result.save(tmp_path / "result")

    def refuse(*_arguments):
        raise AssertionError("more than the head was read")

    monkeypatch.setattr(KINDS[kind], "_build", refuse)
    monkeypatch.setattr(KINDS[kind], "_specs", refuse)
    head = read_head(path, KINDS[kind])
    assert head == ResultHead(result.layers, result.n_layers, result.provenance)


def test_a_head_of_another_kind_or_of_a_cut_file_is_refused(tmp_path):
    path = made("saliency").save(tmp_path / "map")
    with pytest.raises(ResultFileError, match="not a step-knockout result"):
        read_head(path, StepKnockout)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ResultFileError, match="not a whole safetensors file"):
        read_head(path, StepSaliency)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("layers", "message"), [((0,) * 8, "must be distinct"), (range(1, 9), r"outside the model's 0\.\.7")]
)
def test_layers_are_checked_alike(kind, layers, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(made(kind), layers=tuple(layers))


def test_a_kind_must_say_how_it_is_stored():
    class Unfinished(StoredResult):
        pass

    with pytest.raises(TypeError, match="abstract"):
        Unfinished()  # pyright: ignore[reportAbstractUsage]


def test_the_table_of_a_saliency_lists_the_pairs_with_the_largest_mean():
    saliency = made("saliency")
    lines = saliency.table(2).splitlines()
    mean = saliency.head_mean().mean(0).tril(-1)
    reader, source = divmod(int(mean.argmax()), 5)
    assert lines[0] == "Step-Saliency: tiny"
    assert lines[5].split()[:2] == [saliency.labels[reader], saliency.labels[source]]
    assert float(lines[5].split()[2]) == pytest.approx(float(mean.max()), rel=1e-2)
    assert lines[-1] == "2 of 10 pairs; nats per token pair, mean of heads and 8 of 8 layers"


def test_a_table_is_as_long_as_there_are_entries():
    assert made("saliency").table(99).splitlines()[-1].startswith("10 of 10 pairs")
    assert make_saliency(0, 0).table().splitlines()[-1].startswith("0 of 0 pairs")


def test_a_long_text_is_cut_and_put_on_one_line():
    assert shortened("a\n b", 5) == "a b" and shortened("abcdef", 5) == "abcd…"
