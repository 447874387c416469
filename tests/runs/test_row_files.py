"""Parquet and saved data sets: the same records, rules and messages as JSON lines, with row numbers."""

import json
import sys

import pytest

from stepflow_tl.errors import InputFileError, MissingExtraError
from stepflow_tl.runs import analyze_dataset, row_files
from stepflow_tl.runs.records import Record, read_records
from stepflow_tl.runs.row_files import open_source

pyarrow = pytest.importorskip("pyarrow")


@pytest.fixture
def rows(make_record):
    return [
        make_record("a", is_correct=True, problem_id=4, more=[1, 2]),
        make_record("b", summary=None, is_correct=False, problem_id=None, more=None),
        make_record(None, is_correct=None, problem_id=7, more=[]),
    ]


def write_parquet(path, rows, **options):
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)
    return path


def save_dataset(path, rows):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows).save_to_disk(str(path))
    return path


def written(kind, folder, rows):
    if kind == "parquet":
        return write_parquet(folder / "rows.parquet", rows)
    if kind == "folder":
        (folder / "parts").mkdir()
        write_parquet(folder / "parts" / "0.parquet", rows[:1])
        write_parquet(folder / "parts" / "1.parquet", rows[1:])
        return folder / "parts"
    return save_dataset(folder / "saved", rows)


@pytest.mark.parametrize("kind", ["parquet", "folder", "saved"])
def test_the_records_are_those_of_json_lines(kind, tmp_path, rows, write_lines):
    options = {"group_by": "is_correct", "pair_by": "problem_id"}
    path = written(kind, tmp_path, rows)
    found = list(read_records(path, **options))
    expected = list(read_records(write_lines(*map(json.dumps, rows)), **options))
    assert [record.unit for record in found] == ["row"] * 3 and found[2].id == "row-3"
    fields = ("line", "question", "thinking", "summary", "text", "group", "pair")
    for record, other in zip(found, expected, strict=True):
        assert [getattr(record, name) for name in fields] == [getattr(other, name) for name in fields]
    assert open_source(path).count() == 3 and open_source(path).count(2) == 2
    assert [record.line for record in read_records(path, limit=2)] == [1, 2]


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_a_field_of_the_wrong_type_is_named_with_its_row(kind, tmp_path, rows):
    changed = [{**row, "thinking": [row["thinking"]]} for row in rows]
    found = list(read_records(written(kind, tmp_path, changed)))
    assert [(item.line, item.unit) for item in found] == [(1, "row"), (2, "row"), (3, "row")]
    assert found[0].reason == "field 'thinking' is a list, expected a string"


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_a_table_without_the_fields_says_which_are_missing(kind, tmp_path):
    found = list(read_records(written(kind, tmp_path, [{"prompt": "x"}, {"prompt": "y"}])))
    assert [item.reason.partition(":")[0] for item in found] == ["lacks 'question' and 'thinking'"] * 2


def test_a_text_that_is_not_utf_8_costs_its_row_only(tmp_path, rows):
    from pyarrow import parquet

    texts = [b"fine", b"\xff\xfe", b"fine too"]
    broken = pyarrow.array(texts, pyarrow.binary()).view(pyarrow.string())
    table = pyarrow.table({"question": broken, "thinking": ["a", "b", "c"]})
    parquet.write_table(table, tmp_path / "rows.parquet")
    first, second, third = read_records(tmp_path / "rows.parquet")
    assert isinstance(first, Record) and isinstance(third, Record)
    assert "holds a text that is not UTF-8" in second.reason


def test_a_large_file_is_streamed_by_row_group(tmp_path, rows, monkeypatch):
    path = write_parquet(tmp_path / "rows.parquet", rows[:2] * 500, row_group_size=10)
    monkeypatch.setattr(row_files, "_ROWS_PER_BATCH", 10)
    reader = read_records(path)
    for _ in range(25):
        next(reader)
    before = pyarrow.total_allocated_bytes()
    for _ in range(900):
        next(reader)
    assert pyarrow.total_allocated_bytes() < before + 100_000


@pytest.mark.parametrize("content", [b"", b"PAR1", b'{"question": "x"}\n' * 9])
def test_what_is_no_parquet_is_named(content, tmp_path):
    path = tmp_path / "rows.parquet"
    path.write_bytes(content)
    with pytest.raises(InputFileError, match="cannot read .*rows.parquet as Parquet"):
        open_source(path)


def test_splits_are_named_and_one_of_them_can_be_read(tmp_path, rows):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    table = datasets.Dataset.from_list(rows)
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(InputFileError, match="holds several splits: name one of them, .*train"):
        open_source(tmp_path / "saved")
    assert open_source(tmp_path / "saved" / "test").count() == 3


def test_a_saved_data_set_that_is_damaged_is_named(tmp_path, rows):
    path = save_dataset(tmp_path / "saved", rows)
    for file in path.glob("*.arrow"):
        file.write_bytes(b"no arrow")
    with pytest.raises(InputFileError, match="cannot be loaded as a saved data set"):
        open_source(path)


@pytest.mark.parametrize(("module", "kind"), [("pyarrow", "parquet"), ("datasets", "saved")])
def test_a_missing_package_is_named_with_the_command(module, kind, tmp_path, rows, monkeypatch):
    path = written(kind, tmp_path, rows)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=r"pip install .stepflow-tl\[datasets\]"):
        open_source(path)


def test_a_run_over_parquet_speaks_of_rows(tiny_model, tmp_path, rows):
    source = write_parquet(tmp_path / "rows.parquet", [*rows, {**rows[0], "question": None, "id": "d"}])
    report = analyze_dataset(tiny_model(), source, tmp_path / "out")
    assert report.counts == {"analysed": 3, "failed": 1}
    assert "row 4: lacks 'question'" in report.table
