"""Traces with known edges: indices of the trace, by every kind of source, and what is not there is said."""

import json

import pytest
from edge_tasks import readings


def texts(reading, indices):
    return [reading.trace.steps[index].text.strip() for index in indices]


def test_chains_name_lines_and_steps_of_the_trace(tiny_tokenizer):
    found = readings("chains", tiny_tokenizer, 3, seed=0, steps=[4, 9])
    assert [sum(s.label[0] == "T" for s in reading.trace.steps) for reading in found] == [4, 9, 4]
    for reading in found:
        for row in reading.rows["premises"]:
            step = reading.trace.steps[row.query].text.strip()
            chosen = [key for key, needed in zip(row.candidates, row.needed, strict=True) if needed]
            rule, facts = step.split(" is ", 1)[1].split(", so "), texts(reading, chosen)
            concludes = [line for line in facts if line.startswith("Everything")]
            assert len(concludes) == 1 and concludes[0].startswith(f"Everything that is {rule[0]} is a ")
            assert all(
                line.split(" is ")[1].rstrip(".") in rule[0] for line in facts if line not in concludes
            )
        row = reading.onto_summary
        assert row is None or reading.trace.steps[row.query].label == "S1"


def test_the_testbed_has_carried_sources_too(tiny_tokenizer):
    (reading,) = readings("testbed", tiny_tokenizer, 1, seed=0, steps=[8])
    assert set(reading.rows) == {"premises", "steps", "carried"} and reading.rows["carried"]


def test_parc_edges_are_those_of_the_file(tiny_tokenizer, tmp_path):
    path = tmp_path / "parc.jsonl"
    steps = ["Step 1: a.\n\nb.", "Step 2.", "Step 3.", "Step 4.", "So 5."]
    edges = [[1, 0], [2, 1], [3, 1], [4, 3], [5, 4], [5, 0]]
    path.write_text(json.dumps({"question": "How many?", "steps": steps, "edges": edges}) + "\n")
    (reading,) = readings("parc", tiny_tokenizer, 5, seed=0, steps=[], parc=path)
    assert [step.label for step in reading.trace.steps] == ["Q", "T1", "T2", "T3", "T4", "S1"]
    rows = {
        row.query: dict(zip(row.candidates, row.needed.tolist(), strict=True))
        for row in reading.rows["steps"]
    }
    assert rows == {
        3: {1: True, 2: False},
        4: {1: False, 2: False, 3: True},
        5: {1: False, 2: False, 3: False, 4: True},
    }
    summary = reading.onto_summary
    assert summary is not None and summary.needed.tolist() == [True, False, True, True]
    with pytest.raises(SystemExit, match="gone.jsonl is not there: pass the PARC file with --data"):
        readings("parc", tiny_tokenizer, 5, seed=0, steps=[], parc=tmp_path / "gone.jsonl")
