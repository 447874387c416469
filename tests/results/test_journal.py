"""The journal: append-only, mended after a kill, locked, and refused where it is something else."""

import errno
import json
import os

import pytest

from stepflow_tl.errors import DiskFullError, ResultFileError
from stepflow_tl.results.journal import Journal
from stepflow_tl.results.journal_lines import JournalKind, read_journal


def as_number(data):
    return int(data["n"])


KIND = JournalKind("list", "count", 1, ("counted",), as_number)
SETTINGS = {"of": "sheep", "layers": [0, 1]}


def entry(name, n):
    return {"kind": "counted", "id": name, "n": n}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "list.jsonl"


def open_journal(path, **options):
    notes = []
    return Journal(path, KIND, options.pop("settings", SETTINGS), note=notes.append, **options), notes


@pytest.fixture
def written(path):
    journal, _ = open_journal(path)
    with journal:
        journal.append(entry("a", 1))
        journal.append(entry("b", 2))
    return path


def test_the_first_line_is_the_header_and_the_others_are_the_entries(written):
    header, *entries = map(json.loads, written.read_text().splitlines())
    assert (header["schema"], header["kind"], header["settings"]) == (1, "header", SETTINGS)
    assert entries == [entry("a", 1), entry("b", 2)]


def test_the_last_line_of_an_id_counts_across_openings(written):
    journal, _ = open_journal(written)
    with journal:
        assert journal.last("b") == 2 and journal.last("c") is None
        journal.append(entry("b", 7))
        assert journal.last("b") == 7
    journal, notes = open_journal(written)
    with journal:
        assert len(journal) == 2 and list(journal) == [1, 7]
    assert notes == []


def test_reading_needs_no_lock_and_yields_every_line(written):
    journal, _ = open_journal(written)
    with journal:
        lines = list(read_journal(written, KIND))
    assert lines[0].settings == SETTINGS
    assert [(line.id, line.entry, line.damage) for line in lines[1:]] == [("a", 1, ""), ("b", 2, "")]


def test_a_journal_cut_anywhere_is_mended_and_keeps_every_whole_line(written):
    """Every prefix is what a kill in the middle of a write can leave."""
    whole = written.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    for size in range(len(whole) + 1):
        written.write_bytes(whole[:size])
        journal, notes = open_journal(written)
        with journal:
            n_lines = sum(end <= size for end in ends)
            assert len(journal) == max(0, n_lines - 1)
            journal.append(entry("c", 3))
        assert bool(notes) == (size not in (0, *ends))
        kept = ends[n_lines - 1] if n_lines else 0
        assert written.read_bytes().startswith(whole[:kept])
        assert [json.loads(line)["kind"] for line in written.read_text().splitlines()][0] == "header"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"\x00" * 40, "line 2 is not a list line that can be read"),
        (b'{"kind": "counted", "id": "a"}', "lacks 'n'"),
        (b'{"kind": "counted", "id": "a", "n": "x"}', "invalid literal"),
        (b'{"kind": "counted", "id": "a", "n": NaN}', "NaN is not JSON"),
        (b'{"kind": "counted", "id": 1, "n": 1}', "id is a int, expected a string"),
        (b'{"kind": "counted", "id": "\\ud800", "n": 1}', "surrogates not allowed"),
        (b'["counted"]', "a JSON list, expected an object"),
        (b"[" * 100_000, "recursion"),
    ],
)
def test_a_damaged_line_costs_that_line(written, line, said):
    header, first, second = written.read_bytes().splitlines(keepends=True)
    written.write_bytes(header + line + b"\n" + second)
    journal, notes = open_journal(written)
    with journal:
        assert journal.last("a") is None and journal.last("b") == 2
    assert "ignored a line that is damaged" in notes[0] and said in notes[0]
    damaged, last = list(read_journal(written, KIND))[1:]
    assert said in damaged.damage and last.entry == 2


def test_lines_of_an_unknown_kind_and_blank_ones_are_passed_over(written):
    with written.open("a") as file:
        file.write('\n{"kind": "of tomorrow"}\n')
    journal, notes = open_journal(written)
    with journal:
        assert len(journal) == 2 and notes == []


def test_an_entry_without_an_id_or_of_another_kind_is_refused_before_it_is_written(written):
    before = written.read_bytes()
    journal, _ = open_journal(written)
    with journal:
        for wrong in ({"kind": "counted"}, {"kind": "other", "id": "a"}, {"kind": "counted", "id": 3}):
            with pytest.raises(ValueError, match="needs a string id and a kind of"):
                journal.append(wrong)
    assert written.read_bytes() == before


def test_a_second_writer_is_refused(written):
    first, _ = open_journal(written)
    with first:
        for _ in range(2):  # reading and a failed second opening give no lock back
            first.last("a")
            with pytest.raises(ResultFileError, match="another run works in this folder. Wait for it"):
                open_journal(written)
    again, _ = open_journal(written)
    again.close()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"hello\n", "is not a list of stepflow-tl"),
        (b"[1]\n", "is not a list of stepflow-tl"),
        (b'{"kind": "counted", "id": "a", "n": 1}\n', "is not a list of stepflow-tl"),
        (b'{"schema": "1", "kind": "header", "settings": {}}\n', "schema is '1'"),
        (b'{"schema": 1, "kind": "header", "settings": []}\n', "settings is a list, expected an object"),
        (b'{"schema": 2, "kind": "header", "settings": {}}\n', "reads up to 1: upgrade"),
    ],
)
def test_a_file_of_something_else_is_refused_and_left_alone(content, said, path):
    path.write_bytes(content)
    with pytest.raises(ResultFileError, match=said):
        open_journal(path)
    with pytest.raises(ResultFileError, match=said):
        list(read_journal(path, KIND))
    assert path.read_bytes() == content


def test_other_settings_are_refused_or_begin_anew_and_new_ones_are_welcome(written):
    other = {**SETTINGS, "layers": [1]}
    with pytest.raises(
        ResultFileError, match=r"holds another count, with layers \[0, 1\], this one has \[1\]"
    ):
        open_journal(written, settings=other)
    journal, _ = open_journal(written, settings={**SETTINGS, "mood": "good"})
    with journal:
        assert len(journal) == 2
    journal, _ = open_journal(written, settings=other, overwrite=True)
    with journal:
        assert len(journal) == 0
    assert len(written.read_text().splitlines()) == 1


@pytest.mark.parametrize("room", [0, 1, 20])
def test_a_full_disk_leaves_whole_lines_only(room, written, monkeypatch):
    before, write = written.read_bytes(), os.write

    def full(descriptor, data):
        left = room - (os.fstat(descriptor).st_size - len(before))
        if left <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data[:left])

    journal, _ = open_journal(written)
    with journal:
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(DiskFullError, match="No space left on device"):
            journal.append(entry("c", 3))
        monkeypatch.undo()
        assert written.read_bytes() == before and journal.last("c") is None
        journal.append(entry("c", 3))
    assert written.read_bytes().startswith(before)


def test_entries_added_together_are_one_write_and_each_is_found(written, monkeypatch):
    writes, write = [], os.write
    monkeypatch.setattr(os, "write", lambda file, data: writes.append(data) or write(file, data))
    journal, _ = open_journal(written)
    with journal:
        journal.append_all([entry("c", 3), entry("a", 4), entry("d", 5)])
        journal.append_all([])
        assert len(writes) == 2 and writes[0].count(b"\n") == 3 and writes[1] == b""
        assert [journal.last(name) for name in "abcd"] == [4, 2, 3, 5]
        assert "d" in journal and "e" not in journal
        with pytest.raises(ValueError, match="needs a string id"):
            journal.append_all([entry("e", 6), {"kind": "counted"}])
    assert len(writes) == 2, "nothing of a list is written if one of it may not be"
    # A kill in the middle of it leaves whole lines.
    whole, together = written.read_bytes(), len(writes[0])
    for left in range(together):
        written.write_bytes(whole[: len(whole) - together + left])
        journal, _ = open_journal(written)
        with journal:
            held = [journal.last(name) for name in "abcd"]
        n_whole = writes[0][:left].count(b"\n")
        assert held == [[1, 2, None, None], [1, 2, 3, None], [4, 2, 3, None]][n_whole]


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ResultFileError, match="cannot open .*nowhere"):
        open_journal(tmp_path / "nowhere" / "list.jsonl")
    with pytest.raises(ResultFileError, match="cannot read .*nowhere"):
        list(read_journal(tmp_path / "nowhere" / "list.jsonl", KIND))
