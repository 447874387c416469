"""The plan: a partition by shards, names that do not depend on them, long traces first.

File names: no id leaves its folder, no two ids share a file.
"""

from pathlib import Path, PurePosixPath, PureWindowsPath

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepflow_tl.runs import plan as module
from stepflow_tl.runs.options import Shard
from stepflow_tl.runs.plan import FileNames, Plan, Task, hashed_stem
from stepflow_tl.runs.records import Record, Unreadable


def records(sizes, ids=None):
    ids = ids or [f"t{i}" for i in range(len(sizes))]
    return [Record(i + 1, ids[i], "x" * size, "", "", None) for i, size in enumerate(sizes)]


def names(tasks):
    return {task.record.id: task.file for task in tasks if isinstance(task, Task)}


@given(st.lists(st.sampled_from(["a", "A", "b", "../a", "c"]), max_size=12), st.integers(1, 4))
def test_shards_are_a_partition_and_names_do_not_depend_on_them(ids, count):
    rows = records([3] * len(ids), ids)
    whole = list(Plan(rows, len(rows)))
    parts = [list(Plan(rows, len(rows), shard=Shard(i, count))) for i in range(count)]
    assert sorted(map(repr, whole)) == sorted(repr(task) for part in parts for task in part)
    assert sum(Plan(rows, len(rows), shard=Shard(i, count)).total for i in range(count)) == len(rows)
    files = list(names(whole).values())
    assert len({file.casefold() for file in files}) == len(files)


@given(st.lists(st.integers(0, 50), max_size=30))
def test_inside_a_window_long_traces_come_first_and_equal_ones_in_file_order(sizes):
    tasks = list(Plan(records(sizes), len(sizes)))
    assert [(-t.record.size, t.record.line) for t in tasks] == sorted(
        (-t.record.size, t.record.line) for t in tasks
    )


def test_no_trace_waits_longer_than_a_window(monkeypatch):
    monkeypatch.setattr(module, "WINDOW_RECORDS", 3)
    lines = [task.record.line for task in Plan(records([1, 2, 3, 9, 8, 7, 5]), 7)]
    assert lines == [3, 2, 1, 4, 5, 6, 7]


def test_a_row_without_trace_and_a_second_id_are_rejected_in_their_place():
    rows = [*records([1, 1], ["a", "a"]), Unreadable(3, "not JSON")]
    rejected = [task for task in Plan(rows, 3) if isinstance(task, Unreadable)]
    assert [(r.stand_in, r.id) for r in rejected] == [("line-2", "a"), ("line-3", "")]
    assert rejected[0].reason == "duplicate id, first on line 1: ids must differ"


def test_the_size_of_what_is_not_read_yet_is_estimated_by_what_is(monkeypatch):
    monkeypatch.setattr(module, "WINDOW_RECORDS", 2)
    plan = Plan(records([10, 20, 600, 600]), 4)
    assert plan.estimated_size == 0.0
    tasks = iter(plan)
    next(tasks)
    assert plan.estimated_size == 60.0
    list(tasks)
    assert plan.estimated_size == 1230.0


HOSTILE = [
    "../x", "..", ".", "", "/etc/passwd", "a/b", "a\\b", "C:\\x", "a\x00b", "x" * 5000, "CON", "nul.txt",
    "con.x/y", "com1", ".hidden", "a b", "a\nb", "trailing.", "ä", "😀", "$(rm)", "-", "\ud800",
]  # fmt: skip


@pytest.mark.parametrize("trace_id", ["a", "gsm8k-test-265-175b_verification", "Q1.2", "0", "x" * 100])
def test_an_ordinary_id_is_its_own_name(trace_id):
    assert FileNames().stem(trace_id) == trace_id


@pytest.mark.parametrize("trace_id", HOSTILE)
def test_a_hostile_id_becomes_one_plain_component(trace_id, tmp_path: Path):
    name = FileNames().stem(trace_id) + ".safetensors"
    assert PurePosixPath(name).name == PureWindowsPath(name).name == name
    assert not PureWindowsPath(name).is_reserved()
    assert len(name) < 130 and name.isascii() and name.isprintable() and not name.startswith(".")
    (tmp_path / name).touch()
    assert [path.name for path in tmp_path.iterdir()] == [name]


@settings(max_examples=300)
@given(
    st.lists(st.one_of(st.text(), st.sampled_from([*HOSTILE, "A", "a", hashed_stem("A"), hashed_stem("a")])))
)
def test_different_ids_have_names_that_differ_even_without_case(ids):
    names = FileNames()
    stems = {trace_id: names.stem(trace_id) for trace_id in ids}
    assert len({stem.casefold() for stem in stems.values()}) == len(stems)
    assert {trace_id: names.stem(trace_id) for trace_id in ids} == stems


def test_ids_that_differ_only_in_case_get_a_suffix():
    names = FileNames()
    assert names.stem("Trace") == "Trace"
    assert names.stem("trace") == hashed_stem("trace")
    assert names.stem("TRACE") == hashed_stem("TRACE")


def test_an_id_that_spells_the_suffix_of_another_gets_its_own():
    names = FileNames()
    assert names.stem("a") == "a"
    assert names.stem("A") == hashed_stem("A")
    spelled = names.stem(hashed_stem("A"))
    assert spelled.casefold() != hashed_stem("A").casefold()
