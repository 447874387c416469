"""File names: no id leaves its folder, no two ids share a file."""

from pathlib import Path, PurePosixPath, PureWindowsPath

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepflow_tl.runs.file_names import FileNames, hashed_stem

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
