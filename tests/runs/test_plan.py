"""The plan: a partition by shards, names that do not depend on them, long traces first."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepflow_tl.errors import InputFileError
from stepflow_tl.runs import plan as module
from stepflow_tl.runs.plan import Plan, Rejected, Shard, Task
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
    rejected = [task for task in Plan(rows, 3) if isinstance(task, Rejected)]
    assert [(r.id, r.trace_id) for r in rejected] == [("line-2", "a"), ("line-3", "")]
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


@pytest.mark.parametrize("text", ["2/2", "-1/2", "1", "a/b", "0/0", "1/2/3", ""])
def test_a_shard_that_does_not_exist_is_refused(text):
    with pytest.raises(InputFileError, match="0/n|0/8 for the first"):
        Shard.parse(text)


def test_a_shard_reads_as_it_is_written():
    assert str(Shard.parse("2/8")) == "2/8"
    assert (Shard.parse("2/8").suffix, Shard().suffix) == ("-2-of-8", "")
