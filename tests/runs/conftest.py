"""Runs over small data sets, on a tiny random model."""

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def make_dataset(write_lines, make_record) -> Callable[..., Any]:
    """`make_dataset(n)`: a file of n traces that differ in text and length, ids t0, t1, ..."""

    def make(n: int, name: str = "traces.jsonl", **fields: Any):
        records = [
            make_record(
                f"t{i}", thinking=f"{i}*4 is {4 * i}.\n\n{'So it is. ' * (i % 4)}\n\nThen {4 * i}.", **fields
            )
            for i in range(n)
        ]
        return write_lines(*records, name=name)

    return make


@pytest.fixture
def remembered_saliency(monkeypatch) -> None:
    """The worker's `step_saliency` returns what it returned before for an equal trace.

    A run in a forked process then needs no thread of torch's, which a fork does not take along.
    """
    from stepflow_tl.runs import worker

    original, known = worker.step_saliency, {}

    def compute(model, trace, **options):
        key = (trace.text, repr(options))
        if key not in known:
            known[key] = original(model, trace, **options)
        return known[key]

    monkeypatch.setattr(worker, "step_saliency", compute)
