"""The same run on Ray: the same files, and a replica that dies is replaced."""

import importlib.util
import json
import os
import sys
from functools import partial

import pytest
import torch
from dying import losing_a_replica
from tiny_models import build_tiny_model

from stepflow_tl.errors import MissingExtraError, ModelError
from stepflow_tl.runs import analyze_dataset, engines, worker

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason='needs the extra "ray"')


def load_tiny(threads=1):
    """The tiny model, as a function that another process can call."""
    torch.set_num_threads(threads)
    return build_tiny_model()


def load_deadly():
    """A replica that dies of any trace about 8, as it would of one too large for the machine."""
    original = worker.step_saliency

    def dying(model, trace, **options):
        if "8*4" in trace.text or "Then 8." in trace.text:
            os._exit(1)
        return original(model, trace, **options)

    worker.step_saliency = dying
    return load_tiny()


def refuse():
    raise ModelError("no such model: name another")


@pytest.fixture
def ray(monkeypatch):
    """A cluster on this machine, whose processes find the package and these helpers."""
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    monkeypatch.setenv("RAY_DEDUP_LOGS", "0")
    yield ray
    ray.shutdown()


def results(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def entries(folder):
    lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    return sorted(repr({**line, "seconds": None}) for line in lines)


@pytest.mark.filterwarnings("ignore")  # ray's own
@needs_ray
def test_a_run_on_two_replicas_gives_the_same_files_even_if_one_is_killed(ray, make_dataset, tmp_path):
    path = make_dataset(8)
    analyze_dataset(load_tiny, path, tmp_path / "local")
    killed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "RayEngine", losing_a_replica(engines.RayEngine, killed))
        report = analyze_dataset(load_tiny, path, tmp_path / "ray", engine="ray", replicas=2)
    assert killed and report.counts in ({"analysed": 8}, {"analysed": 7, "kept": 1})
    assert results(tmp_path / "ray") == results(tmp_path / "local")
    assert entries(tmp_path / "ray") == entries(tmp_path / "local")
    with pytest.raises(ModelError, match="no such model: name another"):
        analyze_dataset(refuse, path, tmp_path / "refused", engine="ray", replicas=1)


@pytest.mark.filterwarnings("ignore")
@needs_ray
def test_a_trace_that_every_replica_dies_of_is_a_failure_of_that_trace(ray, make_dataset, tmp_path):
    path = make_dataset(4)
    rows = path.read_text().splitlines()
    path.write_text("\n".join([*rows[:2], rows[2].replace("2*4 is 8", "8*4 is 32"), rows[3]]))
    report = analyze_dataset(load_deadly, path, tmp_path / "out", engine="ray", replicas=1)
    assert report.counts == {"analysed": 3, "failed": 1}
    assert "line 3, id 't2': its worker died 3 times on this trace" in report.table


def test_without_ray_the_command_is_named(make_dataset, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"pip install .stepflow-tl\[ray\]"):
        analyze_dataset(partial(load_tiny), make_dataset(1), tmp_path / "out", engine="ray")
