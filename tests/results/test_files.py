"""Result files: what is saved comes back; what is cut off, foreign or newer is refused and named."""

import json
import os

import pytest
import safetensors
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from stepflow_tl import StepSaliency, step_saliency
from stepflow_tl.errors import ResultFileError
from stepflow_tl.results.plain_data import to_plain

SCHEMA = StepSaliency.schema


@pytest.fixture(scope="module")
def saliency(tiny_model, tiny_trace):
    return step_saliency(tiny_model(), tiny_trace, layers=[0, 3])


def load(path):
    return StepSaliency.load(path)


def rewrite(source, target, **changes):
    """Copy a result file with other metadata; a change to None drops the field."""
    with safe_open(source, framework="pt") as file:
        document = {**json.loads(file.metadata()[SCHEMA.name]), **changes}
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    document = {name: value for name, value in document.items() if value is not None}
    save_file(tensors, target, metadata={SCHEMA.name: json.dumps(document)})
    return target


def rewrite_raw(source, target, metadata):
    """Copy a result file with this string as its metadata."""
    save_file(load_file(source), target, metadata={SCHEMA.name: metadata})
    return target


def test_what_is_saved_comes_back(saliency, tmp_path):
    again = load(saliency.save(tmp_path / "map.safetensors"))
    assert torch.equal(again.sums, saliency.sums) and again.sums.dtype == saliency.sums.dtype
    assert torch.equal(again.template_sums, saliency.template_sums)
    assert (again.layers, again.n_layers, again.provenance) == (saliency.layers, 4, saliency.provenance)
    assert again.trace.text == saliency.trace.text and again.trace.steps == saliency.trace.steps
    assert torch.equal(again.trace.tokens, saliency.trace.tokens)


def test_saving_twice_gives_the_same_bytes(saliency, tmp_path):
    first, second = saliency.save(tmp_path / "a"), saliency.save(tmp_path / "b")
    assert first.read_bytes() == second.read_bytes()


def test_a_result_is_as_readable_as_any_other_file(saliency, tmp_path):
    (tmp_path / "ordinary").write_text("x")
    mode = (tmp_path / "ordinary").stat().st_mode
    assert saliency.save(tmp_path / "map").stat().st_mode == mode


def test_every_truncation_is_refused(saliency, tmp_path):
    whole = saliency.save(tmp_path / "whole").read_bytes()
    for length in [0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1]:
        (tmp_path / "cut").write_bytes(whole[:length])
        with pytest.raises(ResultFileError, match="cut is not a whole safetensors file.*Run the analysis"):
            load(tmp_path / "cut")


def test_a_foreign_file_is_refused(tmp_path):
    (tmp_path / "text").write_text("hello, this is not a map at all")
    with pytest.raises(ResultFileError, match="not a whole safetensors file"):
        load(tmp_path / "text")
    save_file({"weight": torch.zeros(2)}, tmp_path / "weights")
    with pytest.raises(ResultFileError, match=r"not a step-saliency result"):
        load(tmp_path / "weights")
    with pytest.raises(ResultFileError, match="no result file at"):
        load(tmp_path / "absent")


def test_a_newer_version_says_what_to_do(saliency, tmp_path):
    newer = rewrite(saliency.save(tmp_path / "map"), tmp_path / "newer", version=999)
    with pytest.raises(ResultFileError, match="schema version 999.*upgrade stepflow-tl"):
        load(newer)


@pytest.mark.parametrize(
    "changes",
    [
        {"trace": None},
        {"trace": {}},
        {"trace": "not an object"},
        {"layers": [0]},
        {"layers": [0, 7]},
        {"layers": [[0], [3]]},
        {"n_layers": "many"},
        {"provenance": {}},
        {"provenance": [1]},
    ],
)
def test_inconsistent_metadata_is_refused(saliency, tmp_path, changes):
    broken = rewrite(saliency.save(tmp_path / "map"), tmp_path / "broken", **changes)
    with pytest.raises(ResultFileError, match="its content is inconsistent"):
        load(broken)


@pytest.mark.parametrize("metadata", ["not json", "[]", "[" * 100_000, "", "null"])
def test_metadata_that_is_not_a_document_is_refused(saliency, tmp_path, metadata):
    broken = rewrite_raw(saliency.save(tmp_path / "map"), tmp_path / "broken", metadata)
    with pytest.raises(ResultFileError, match="its content is inconsistent"):
        load(broken)


def test_unknown_provenance_fields_of_later_versions_are_ignored(saliency, tmp_path):
    data = {**to_plain(saliency.provenance), "gpu": "one of tomorrow"}
    path = rewrite(saliency.save(tmp_path / "map"), tmp_path / "later", provenance=data)
    assert load(path).provenance == saliency.provenance


def test_a_folder_that_is_not_there_is_named_and_nothing_is_left(saliency, tmp_path):
    with pytest.raises(ResultFileError, match="cannot write .*nothing was changed there"):
        saliency.save(tmp_path / "nowhere" / "map")
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_half_way_keeps_the_old_file(saliency, tmp_path, monkeypatch):
    target = saliency.save(tmp_path / "map")
    before = target.read_bytes()

    def disk_full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(ResultFileError, match="No space left on device"):
        saliency.select([3]).save(target)
    assert target.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["map"]


def test_a_later_minor_version_is_read_and_what_it_adds_passed_over(saliency, tmp_path):
    source = saliency.save(tmp_path / "map")
    with safe_open(source, framework="pt") as file:
        document = json.loads(file.metadata()[SCHEMA.name])
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    assert (document["version"], document["minor"]) == (1, 0)
    document |= {"minor": 7, "mood": "good"}
    document["trace"] |= {"mood": ["good"]}
    document["trace"]["steps"][0]["mood"] = "good"
    save_file({**tensors, "later": torch.ones(3)}, source, {SCHEMA.name: json.dumps(document)})
    again = load(source)
    assert again.trace == saliency.trace and torch.equal(again.sums, saliency.sums)


@pytest.mark.parametrize("version", [0, -1, True, 1.0, "1", None])
def test_a_version_that_is_not_a_whole_number_is_refused(saliency, tmp_path, version):
    broken = rewrite(saliency.save(tmp_path / "map"), tmp_path / "broken", version=version)
    with pytest.raises(ResultFileError, match="the schema version is .*expected a whole number"):
        load(broken)


@pytest.mark.parametrize(
    ("name", "change", "found"),
    [
        ("sums", lambda sums: sums[:1], r"'sums' is F64 \(1, "),
        ("sums", lambda sums: sums[..., :-1], r"'sums' is F64 \(2, "),
        ("sums", lambda sums: sums[:, :0], r"'sums' is F64 \(2, 0, "),
        ("sums", lambda sums: sums[0], r"'sums' is F64 \(\d+, \d+, \d+\)"),
        ("sums", lambda sums: sums.to(torch.int64), "'sums' is I64"),
        ("sums", lambda sums: sums.to(torch.float8_e4m3fn), "'sums' is F8_E4M3"),
        ("template_sums", lambda sums: None, "there is no tensor 'template_sums'"),
    ],
)
def test_tensors_that_the_document_does_not_account_for_are_refused_unread(
    saliency, tmp_path, name, change, found, monkeypatch
):
    source = saliency.save(tmp_path / "map")
    with safe_open(source, framework="pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    changed = change(tensors[name])
    tensors |= {} if changed is None else {name: changed.contiguous()}
    if changed is None:
        del tensors[name]
    save_file(tensors, source, {SCHEMA.name: metadata[SCHEMA.name]})

    class Unread:
        """An open file whose tensors must not be read."""

        def __init__(self, *arguments, **options):
            self.opened = safe_open(*arguments, **options)

        def __enter__(self):
            self.file = self.opened.__enter__()
            return self

        def __exit__(self, *error):
            return self.opened.__exit__(*error)

        def __getattr__(self, name):
            assert name != "get_tensor", "a tensor was read before its shape was checked"
            return getattr(self.file, name)

    monkeypatch.setattr(safetensors, "safe_open", Unread)
    with pytest.raises(ResultFileError, match=f"its content is inconsistent.*{found}"):
        load(source)


def test_a_header_that_declares_more_than_the_file_holds_is_refused(saliency, tmp_path):
    """Before anything is allocated: 2**60 bytes could not be."""
    source = saliency.save(tmp_path / "map")
    data = source.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["sums"]["shape"] = [2, 2**55, 1, 1]
    header["sums"]["data_offsets"][1] = header["sums"]["data_offsets"][0] + 2**59
    text = json.dumps(header).encode()
    for head in (len(text), 2**62):  # the header's own length too
        source.write_bytes(head.to_bytes(8, "little") + text + data[8 + length :])
        with pytest.raises(ResultFileError, match="is not a whole safetensors file"):
            load(source)


def test_a_link_at_the_target_is_replaced_and_not_followed(saliency, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("mine")
    (tmp_path / "map").symlink_to(elsewhere)
    saliency.save(tmp_path / "map")
    assert elsewhere.read_text() == "mine" and not (tmp_path / "map").is_symlink()
