"""A run that dies between any two system calls leaves a folder from which the same call goes on."""

import itertools
import json
import os
import random
import signal

import pytest
from dying import die_at, in_a_child

from stepflow_tl.runs import analyze_dataset

# A fork in a process that has threads is what 3.12 warns of; the child uses none of them.
pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
    pytest.mark.usefixtures("remembered_saliency"),
]


def state(folder):
    """Result files, and what the manifest says, without times."""
    files = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    entries = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    return files, [{**entry, "seconds": None} for entry in entries]


def test_a_kill_at_every_system_call_costs_nothing(tiny_model, make_dataset, out, tmp_path):
    path, model = make_dataset(3), tiny_model()

    def run(folder=out):
        return analyze_dataset(model, path, folder)

    run(tmp_path / "calm")
    expected = state(tmp_path / "calm")
    assert len(expected[0]) == 3
    number, kills = 0, 0
    while True:
        number += 1
        folder = tmp_path / f"killed-{number}"
        code = in_a_child(lambda folder=folder: run(folder), lambda number=number: die_at(number))
        if code == 0:
            break
        assert code == -signal.SIGKILL
        kills += 1
        for trace in folder.glob("*.safetensors"):  # whatever is there under its name is whole
            assert trace.read_bytes() == expected[0][trace.name]
        assert run(folder).is_complete
        assert state(folder) == expected, f"killed at call {number}"
        assert not list(folder.glob(".*.safetensors.*")), "a temporary file was left"
    assert kills > 20, "the calls that a run makes were not met: nothing was tested"


def n_calls(run, file):
    """How many of `CALLS` a run makes that nobody disturbs."""
    counters = []

    def run_and_tell():
        report = run()
        file.write_text(str(counters[0][0]))
        return report

    assert in_a_child(run_and_tell, lambda: counters.append(die_at(0))) == 0
    return int(file.read_text())


def test_kills_at_random_moments_of_one_run_after_the_other(tiny_model, make_dataset, out, tmp_path):
    path, model, rng = make_dataset(12), tiny_model(), random.Random(0)

    def run(folder=out):
        return analyze_dataset(model, path, folder)

    run(tmp_path / "calm")
    total = n_calls(lambda: run(tmp_path / "counted"), tmp_path / "count")
    assert total > 12 * 4, "the calls that a run makes were not met"
    sizes = [0]
    for _ in range(4):
        number = rng.randint(total // 10, total // 5)
        assert in_a_child(run, lambda number=number: die_at(number)) == -signal.SIGKILL
        sizes.append(len(list(out.glob("*.safetensors"))))
    # Every run went on where the one before was killed, and none came to the end.
    assert all(before < after < 12 for before, after in itertools.pairwise(sizes)), sizes
    assert run().is_complete
    files, entries = state(out)
    assert (files, sorted(map(repr, entries))) == (
        state(tmp_path / "calm")[0],
        sorted(map(repr, state(tmp_path / "calm")[1])),
    )
    done = [entry["id"] for entry in entries if entry["kind"] == "done"]
    assert len(done) == len(set(done)) == 12
