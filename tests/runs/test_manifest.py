"""The manifest: append-only, mended after a kill, locked, and refused where it is something else."""

import dataclasses
import errno
import json
import os

import pytest

from stepflow_tl.causal.agreement import TraceAgreement
from stepflow_tl.diagnosis import LAYER_METRICS
from stepflow_tl.errors import DiskFullError, ResultFileError
from stepflow_tl.runs.entries import (
    Done,
    Failed,
    RunSettings,
    entry_of,
)
from stepflow_tl.runs.manifest import Manifest, manifest_path
from stepflow_tl.runs.plan import Shard

SETTINGS = RunSettings("tiny", "per_token", "torch.float64", (0, 1), 2, "paragraph", "think")


def done(trace_id="a", **changes):
    diagnosis = {name: [0.25, None] for name in LAYER_METRICS} | {
        "layers": [0, 1],
        "n_layers": 2,
        "rows_without_mass": [0, 1],
        "decay_slope": None,
        "window": 0,
        "recent": 1,
        "pooling": "mean",
        "model_name": "tiny",
        "objective": "per_token",
        "n_question": 1,
        "n_thinking": 2,
        "n_summary": 1,
    }
    fields = dict(id=trace_id, line=1, file="a.safetensors", n_tokens=9, seconds=0.5, group=None, pair=None)
    return Done(**{**fields, "sha256": "0" * 64, "diagnosis": diagnosis, **changes})


FAILED = Failed("b", 2, "too long", "ModelError", "0123")


@pytest.fixture
def path(tmp_path):
    return manifest_path(tmp_path)


def open_manifest(path, **options):
    notes = []
    manifest = Manifest(path, options.pop("settings", SETTINGS), note=notes.append, **options)
    return manifest, notes


@pytest.fixture
def written(path):
    manifest, _ = open_manifest(path)
    with manifest:
        manifest.append(done())
        manifest.append(FAILED)
    return path


def test_the_first_line_says_what_was_analysed_and_the_others_what_became_of_it(written):
    header, first, second = map(json.loads, written.read_text().splitlines())
    assert (header["schema"], header["kind"]) == (1, "header")
    assert header["settings"]["layers"] == [0, 1] and header["settings"]["objective"] == "per_token"
    assert (first["kind"], first["metrics"]["lock_in"], first["decay_slope"]) == ("done", [0.25, None], None)
    assert set(first["metrics"]) == set(LAYER_METRICS) and not set(first) & set(LAYER_METRICS)
    assert second == {"kind": "failed", **dataclasses.asdict(FAILED)}
    assert entry_of(first) == done() and entry_of(second) == FAILED


def test_an_entry_gives_its_diagnosis_back():
    diagnosis = entry_of(json.loads(json.dumps(done().to_json()))).read_diagnosis()
    assert diagnosis.layers == (0, 1) and float(diagnosis.lock_in[0]) == 0.25
    assert diagnosis.lock_in.isnan().tolist() == [False, True]


def test_agreement_survives_the_line():
    agreement = TraceAgreement({("a", "b"): {"spearman": 0.1, "top_k": float("nan")}}, 3, 0.5, 12)
    found = type(agreement).from_json(json.loads(json.dumps(agreement.to_json())))
    assert repr(found) == repr(agreement)


def test_the_last_line_for_an_id_wins_across_openings(written):
    manifest, _ = open_manifest(written)
    with manifest:
        assert manifest.last("b") == FAILED and manifest.last("c") is None
        manifest.append(done("b", line=2))
        assert manifest.last("b") == done("b", line=2)
    manifest, notes = open_manifest(written)
    with manifest:
        assert len(manifest) == 2 and manifest.last("b") == done("b", line=2)
    assert notes == []


def test_a_manifest_cut_anywhere_is_mended_and_keeps_every_whole_line(written):
    """Every prefix is what a kill in the middle of a write can leave."""
    whole = written.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    for size in range(0, len(whole) + 1, 7):
        written.write_bytes(whole[:size])
        manifest, notes = open_manifest(written)
        with manifest:
            n_lines = sum(end <= size for end in ends)
            assert len(manifest) == max(0, n_lines - 1)
            manifest.append(done("c"))
        assert bool(notes) == (size not in (0, *ends))
        kept = ends[n_lines - 1] if n_lines else 0
        assert written.read_bytes().startswith(whole[:kept])
        assert [json.loads(line)["kind"] for line in written.read_text().splitlines()][0] == "header"


def test_a_damaged_line_in_the_middle_costs_that_line(written):
    header, first, second = written.read_bytes().splitlines(keepends=True)
    written.write_bytes(header + b"\x00" * 40 + b"\n" + second)
    manifest, notes = open_manifest(written)
    with manifest:
        assert manifest.last("a") is None and manifest.last("b") == FAILED
    assert "ignored a line that is damaged" in notes[0]


def test_a_second_run_in_the_folder_is_refused_and_another_shard_is_not(written, tmp_path):
    first, _ = open_manifest(written)
    with first:
        with pytest.raises(ResultFileError, match="another run works in this folder.*--shard i/n"):
            open_manifest(written)
        second, _ = open_manifest(manifest_path(tmp_path, Shard(1, 2)))
        second.close()
    third, _ = open_manifest(written)
    third.close()
    assert (tmp_path / "manifest-1-of-2.jsonl").exists()


def test_the_lock_outlasts_reading_and_a_failed_second_opening(written):
    first, _ = open_manifest(written)
    with first:
        first.last("a")
        for _ in range(2):
            with pytest.raises(ResultFileError, match="another run"):
                open_manifest(written)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"hello\n", "is no manifest of stepflow-tl"),
        (b"[1]\n", "is no manifest of stepflow-tl"),
        (b'{"kind": "done"}\n', "is no manifest of stepflow-tl"),
        (b'{"schema": 2, "kind": "header", "settings": {}}\n', "reads up to 1: upgrade"),
    ],
)
def test_a_file_of_something_else_is_refused_and_left_alone(content, said, path):
    path.write_bytes(content)
    with pytest.raises(ResultFileError, match=said):
        open_manifest(path)
    assert path.read_bytes() == content


def test_other_settings_are_refused_or_begin_anew(written):
    other = dataclasses.replace(SETTINGS, layers=(1,))
    with pytest.raises(ResultFileError, match=r"analysis with layers \[0, 1\], this one has \[1\]"):
        open_manifest(written, settings=other)
    manifest, _ = open_manifest(written, settings=other, overwrite=True)
    with manifest:
        assert len(manifest) == 0
    assert len(written.read_text().splitlines()) == 1


@pytest.mark.parametrize("room", [0, 1, 100])
def test_a_full_disk_leaves_whole_lines_only(room, written, monkeypatch):
    before, write = written.read_bytes(), os.write

    def full(descriptor, data):
        left = room - (os.fstat(descriptor).st_size - len(before))
        if left <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data[:left])

    manifest, _ = open_manifest(written)
    with manifest:
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(DiskFullError, match="No space left on device"):
            manifest.append(done("c"))
        monkeypatch.undo()
        assert written.read_bytes() == before and manifest.last("c") is None
        manifest.append(done("c"))
    assert written.read_bytes().startswith(before)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ResultFileError, match="cannot open .*nowhere"):
        open_manifest(tmp_path / "nowhere" / "manifest.jsonl")
