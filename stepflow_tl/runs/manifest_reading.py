"""Reading the manifests of a run: what became of each trace, and its numbers.

`dataset.entries` says what a line holds, and reads its own lines when a run goes on. Here they are read to be
believed as numbers. A run folder holds `manifest.jsonl`, or one `manifest-<i>-of-<n>.jsonl` a shard. Each is
taken for hostile:

1. The first line is a header with the schema's version and the settings; a resumed run may add another with
   the same settings.
2. Every other line is one trace, "done" with its numbers or "failed" with its reason. The last line of an id
   counts. Lines of any other kind, and keys unknown here, are a later minor version's and are passed over.
3. A last line that is cut off (the run was killed as it wrote, or is writing now) is passed over. Any other
   line that cannot be read is reported with its number, and counts as if it were not there: `analyze` treats
   it so too, and does the trace again. Without a first header that can be read the manifest is an error.
4. Over several manifests, done counts before failed, and of two that are done the one of the manifest that
   was written last.

Each line is parsed once. What is kept is its numbers, some 4 kB a trace of 28 layers.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from stepflow_tl.diagnosis.diagnosis import LAYER_METRICS
from stepflow_tl.errors import ResultFileError
from stepflow_tl.results.files import whole_numbers
from stepflow_tl.runs.entries import SCHEMA_VERSION

MAX_LINE_BYTES = 64 * 2**20
_NAME = re.compile(r"manifest(?:-\d{1,6}-of-\d{1,6})?\.jsonl", re.ASCII)
_SETTINGS = ("model_name", "objective", "dtype")


@dataclass(frozen=True)
class Done:
    """A trace with a result.

    Attributes:
        id: Its name.
        line: Its line in the run's input.
        file: Name of its result file, as written: not checked here.
        n_tokens: Tokens of the trace.
        n_question: Question steps.
        n_thinking: Thinking steps.
        n_summary: Summary steps.
        seconds: Wall-clock time of the analysis.
        group: Its group, if it had one when the run was made.
        pair: Its problem, likewise.
        sha256: Hex digest of the result file, or None.
        layers: Model layers of the metrics.
        metrics: One row for each of `LAYER_METRICS`; NaN where it has no value.
        decay_slope: See `Diagnosis`; NaN where it has none.
        backend: Backend that ran, where the manifest says so.
        window: Window of lock_in.
        recent: Number of last thinking steps in recency.
        pooling: Pooling behind the shares.
    """

    id: str
    line: int
    file: str
    n_tokens: int
    n_question: int
    n_thinking: int
    n_summary: int
    seconds: float
    group: bool | None
    pair: str | None
    sha256: str | None
    layers: tuple[int, ...]
    metrics: Float[np.ndarray, "metric layer"]
    decay_slope: float
    backend: str | None
    window: int
    recent: int
    pooling: str


@dataclass(frozen=True)
class Failed:
    """A trace without a result: why, and the class of the error."""

    id: str
    line: int
    reason: str
    error: str


@dataclass(frozen=True)
class RunSettings:
    """What the header says of the whole run; None where it does not say."""

    model_name: str
    objective: str
    dtype: str
    layers: tuple[int, ...] | None
    n_layers: int | None
    backend: str | None
    group_by: str | None


@dataclass(frozen=True)
class ManifestIndex:
    """The traces of a run.

    Attributes:
        settings: The settings of the run, or None where there is no manifest.
        done: Traces whose last word is a result, in the order of the input.
        failed: Traces whose last word is a failure, in the order of the input.
        files: Every file name that any line ever named.
        damaged: Lines that cannot be read: where, and why.
    """

    settings: RunSettings | None
    done: tuple[Done, ...]
    failed: tuple[Failed, ...]
    files: frozenset[str]
    damaged: tuple[str, ...]


class _DamagedLineError(ResultFileError):
    """A line that cannot be read."""


def read_manifests(folder: Path) -> ManifestIndex:
    """What the manifests of a folder say of each trace in the end.

    Raises:
        ResultFileError: If a manifest cannot be read, has no header, is of a later schema, or two headers are
            of different settings.
    """
    paths = [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_file()]
    manifests = sorted(paths, key=lambda path: (path.stat().st_mtime_ns, path.name))
    settings: RunSettings | None = None
    done: dict[str, Done] = {}
    failed: dict[str, Failed] = {}
    files: set[str] = set()
    damaged: list[str] = []
    for path in manifests:
        words: dict[str, Done | Failed] = {}
        for entry in _entries(path):
            if isinstance(entry, RunSettings):
                if settings is not None and settings != entry:
                    raise ResultFileError(_mixed(path, settings, entry))
                settings = entry
            elif isinstance(entry, str):
                damaged.append(entry)
            elif entry is not None:
                words[entry.id] = entry
                if isinstance(entry, Done):
                    files.add(entry.file)
        for name, word in words.items():
            if isinstance(word, Done):
                done[name] = word
            else:
                failed[name] = word
    return ManifestIndex(
        settings,
        done=tuple(sorted(done.values(), key=lambda entry: (entry.line, entry.id))),
        failed=tuple(
            sorted(
                (entry for name, entry in failed.items() if name not in done),
                key=lambda entry: (entry.line, entry.id),
            )
        ),
        files=frozenset(files),
        damaged=tuple(damaged),
    )


def _entries(path: Path) -> Iterator[RunSettings | Done | Failed | str | None]:
    """What each line says; a string says why it cannot be read."""
    with _open(path) as file:
        number, has_header = 0, False
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                raise ResultFileError(f"{path}, line {number}: longer than {MAX_LINE_BYTES} bytes")
            if line.strip():
                try:
                    entry = _parse(line, f"{path}, line {number}")
                except _DamagedLineError as error:
                    if not has_header:
                        raise
                    if not line.endswith(b"\n"):
                        return  # cut off in the middle of a write
                    entry = str(error)
                has_header = has_header or isinstance(entry, RunSettings)
                if not has_header:
                    raise ResultFileError(
                        f"{path} does not begin with a header: expected a manifest that `analyze` wrote"
                    )
                yield entry


def _open(path: Path) -> Any:
    try:
        return path.open("rb")
    except OSError as error:
        raise ResultFileError(f"cannot read {path}: {error.strerror or error}") from error


def _parse(line: bytes, place: str) -> RunSettings | Done | Failed | None:
    try:
        data = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant)
        kind = data["kind"]
        if kind == "header":
            version = data["schema"]
            if type(version) is int and version > SCHEMA_VERSION:
                raise ResultFileError(
                    f"{place}: manifest schema {version}; this stepflow_tl reads up to {SCHEMA_VERSION}: "
                    "upgrade stepflow-tl to read it"
                )
            if type(version) is not int or version < 1:
                raise ValueError(f"schema is {version!r}")
            return _settings(data["settings"])
        return _done(data) if kind == "done" else _failed(data) if kind == "failed" else None
    except ResultFileError:
        raise
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise _DamagedLineError(f"{place} is no line of a manifest that can be read ({what})") from error


def _settings(data: Any) -> RunSettings:
    if not isinstance(data, dict):
        raise TypeError(f"settings is a {type(data).__name__}, expected an object")
    layers, n_layers = data.get("layers"), data.get("n_layers")
    return RunSettings(
        **{name: _text(data, name) for name in _SETTINGS},
        layers=None if layers is None else whole_numbers(layers),
        n_layers=None if n_layers is None else _count(data, "n_layers"),
        backend=_text_or_none(data, "backend"),
        group_by=_text_or_none(data, "group_by"),
    )


def _done(data: dict[str, Any]) -> Done:
    layers = whole_numbers(data["layers"])
    if not layers or len(set(layers)) != len(layers) or min(layers) < 0:
        raise ValueError(f"layers {str(layers)[:60]} must be distinct, from 0 on, and at least one")
    for name in LAYER_METRICS:
        if len(data["metrics"][name]) != len(layers):
            raise ValueError(f"{name} has {len(data['metrics'][name])} values for {len(layers)} layers")
    group, sha256 = data.get("group"), _text_or_none(data, "sha256")
    if group is not None and not isinstance(group, bool):
        raise TypeError(f"group is a {type(group).__name__}, expected true, false or null")
    if sha256 is not None and not re.fullmatch("[0-9a-f]{64}", sha256):
        raise ValueError("sha256 is no SHA-256 in hex")
    return Done(
        id=_text(data, "id"),
        file=_text(data, "file"),
        seconds=_number(data["seconds"]),
        group=group,
        pair=_text_or_none(data, "pair"),
        sha256=sha256,
        layers=layers,
        metrics=np.stack([_numbers(data["metrics"][name]) for name in LAYER_METRICS]),
        decay_slope=_number(data["decay_slope"]),
        backend=_text_or_none(data, "backend"),
        # What `diagnose` takes by default, where the line does not say.
        window=_count({"window": 0, **data}, "window"),
        recent=_count({"recent": 1, **data}, "recent"),
        pooling=_text({"pooling": "mean", **data}, "pooling"),
        **{
            name: _count(data, name) for name in ("line", "n_tokens", "n_question", "n_thinking", "n_summary")
        },
    )


def _failed(data: dict[str, Any]) -> Failed:
    return Failed(_text(data, "id"), _count(data, "line"), _text(data, "reason"), _text(data, "error"))


def _text(data: dict[str, Any], name: str) -> str:
    value = data[name]
    if not isinstance(value, str):
        raise TypeError(f"{name} is a {type(value).__name__}, expected a string")
    value.encode()  # half a character is refused here, with a ValueError
    return value


def _text_or_none(data: dict[str, Any], name: str) -> str | None:
    return None if data.get(name) is None else _text(data, name)


def _count(data: dict[str, Any], name: str) -> int:
    value = data[name]
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{name} is {str(value)[:40]}, expected a count")
    return value


def _number(value: Any) -> float:
    return float(_numbers([value])[0])


def _numbers(values: list[Any]) -> Float[np.ndarray, " layer"]:
    """The list as floats; null, and nothing else, is NaN."""
    if not isinstance(values, list) or not set(map(type, values)) <= {int, float, type(None)}:
        raise TypeError(f"{str(values)[:60]}: expected numbers and null only")
    # A constant such as NaN is refused before; 1e999 is infinite all the same.
    numbers = np.array([math.nan if value is None else value for value in values], dtype=np.float64)
    if np.isinf(numbers).any():
        raise ValueError("a number is beyond what a float can hold")
    return numbers


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _mixed(path: Path, first: RunSettings, other: RunSettings) -> str:
    name = next(name for name in vars(first) if getattr(first, name) != getattr(other, name))
    return (
        f"{path}: a header with {name} {getattr(other, name)!r}, another header of this folder has "
        f"{getattr(first, name)!r}: summarise one run at a time"
    )
