import pytest
from made_maps import make_saliency

from stepflow_tl.errors import ResultFileError
from stepflow_tl.rendering import save_figure, step_map_figure

MAGIC = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}


@pytest.fixture
def figure():
    return step_map_figure(make_saliency(5, 1))


@pytest.mark.parametrize("kind", sorted(MAGIC))
def test_each_format_is_written_whole_and_the_same_twice(figure, kind, tmp_path):
    first = save_figure(figure, tmp_path / f"a.{kind}", dpi=50)
    second = save_figure(figure, str(tmp_path / f"b.{kind.upper()}"), dpi=50)
    assert first.read_bytes().startswith(MAGIC[kind])
    assert first.read_bytes() == second.read_bytes()


def test_dpi_sets_the_pixels_of_a_png(figure, tmp_path):
    for dpi, width in ((50, 350), (100, 700)):
        header = save_figure(figure, tmp_path / "a.png", dpi=dpi).read_bytes()
        assert int.from_bytes(header[16:20], "big") == width


@pytest.mark.parametrize("name", ["map.jpg", "map", "map.html"])
def test_another_ending_is_refused_by_name(figure, name, tmp_path):
    with pytest.raises(ResultFileError, match=f"'{name}': expected a name that ends in .png, .svg or .pdf"):
        save_figure(figure, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_drawing_leaves_the_old_file_and_nothing_else(figure, tmp_path, monkeypatch):
    target = tmp_path / "map.png"
    target.write_bytes(b"old")

    def fail(*args, **kwargs):
        raise RuntimeError("no ink")

    monkeypatch.setattr(figure, "savefig", fail)
    with pytest.raises(RuntimeError, match="no ink"):
        save_figure(figure, target)
    assert [path.name for path in tmp_path.iterdir()] == ["map.png"]
    assert target.read_bytes() == b"old"


def test_a_missing_folder_is_named(figure, tmp_path):
    with pytest.raises(ResultFileError, match="absent"):
        save_figure(figure, tmp_path / "absent" / "map.png")
