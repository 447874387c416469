"""A run that dies between any two system calls leaves a folder from which the same call goes on."""

import json
import os
import random
import signal
import time

import pytest

from stepflow_tl.runs.run import analyze_dataset

# A fork in a process that has threads is what 3.12 warns of; the child uses none of them.
pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
    pytest.mark.usefixtures("remembered_saliency"),
]

CALLS = ("open", "write", "fsync", "replace", "chmod", "close", "ftruncate", "unlink")


def in_a_child(run, prepare):
    """Run in a forked process after `prepare()`; its exit code, negative if it was killed."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            prepare()
            code = 0 if run().is_complete else 3
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die_at(number):
    """From here on, the process dies at that call of `CALLS`: before it, after it, or half-way in a write."""
    count = [0]

    def armed(call, is_write):
        def dying(*arguments, **options):
            count[0] += 1
            if count[0] != number:
                return call(*arguments, **options)
            if is_write:
                call(arguments[0], arguments[1][: len(arguments[1]) // 2])
            elif number % 2:
                call(*arguments, **options)
            os.kill(os.getpid(), signal.SIGKILL)

        return dying

    for name in CALLS:
        setattr(os, name, armed(getattr(os, name), name == "write"))


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


def test_kills_at_random_moments_of_one_run_after_the_other(tiny_model, make_dataset, out, tmp_path):
    path, model, rng = make_dataset(12), tiny_model(), random.Random(0)

    def run(folder=out):
        return analyze_dataset(model, path, folder)

    run(tmp_path / "calm")
    began = time.monotonic()
    run(tmp_path / "timed")
    working = time.monotonic() - began
    sizes = []
    for _ in range(3):
        moment = rng.uniform(0.1, 0.4) * working

        def prepare(moment=moment):
            signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            signal.setitimer(signal.ITIMER_REAL, moment)

        assert in_a_child(run, prepare) == -signal.SIGKILL
        sizes.append(len(list(out.glob("*.safetensors"))))
    assert max(sizes) < 12 or sizes[0] < 12, "the kills came too late to test anything"
    assert run().is_complete
    files, entries = state(out)
    assert (files, sorted(map(repr, entries))) == (
        state(tmp_path / "calm")[0],
        sorted(map(repr, state(tmp_path / "calm")[1])),
    )
    done = [entry["id"] for entry in entries if entry["kind"] == "done"]
    assert len(done) == len(set(done)) == 12
