"""The manifest of a run: its settings, then what became of each trace, one JSON line each.

`{"schema": 1, "kind": "header", "settings": {...}, "stepflow_tl": version}`
`{"kind": "done", "id", "line", "file", "n_tokens", ..., "sha256", "metrics": {name: [number or null, ...]},
...}` `{"kind": "failed", "id", "line", "reason", "error", ...}`

This module alone knows what stands in those lines, both ways: `Done` and `Failed` are written by the run that
appends them and read back by a run that goes on and by `summarize`. How lines reach the disk, and what
becomes of torn and damaged ones, is `results.journal`'s business.

1. The last line for an id counts. Over several manifests of a folder (one per shard), done counts before
   failed, and of two that are done the one of the manifest that was written last.
2. Every field is checked for its type and range before it is believed: what fails is a damaged line, which
   costs that trace only.
3. Keys unknown here are passed over. A metric that is not in a line, because it was added to the diagnosis
   later, is NaN there. A change that older readers would get wrong raises `SCHEMA_VERSION`.

`seconds` is wall-clock time and the only field that differs between two equal runs. Each line is parsed once;
what is kept of it is some 6 kB for a trace of 28 layers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from stepflow_tl.causal.agreement import MEASURES, TraceAgreement
from stepflow_tl.diagnosis import LAYER_METRICS, Diagnosis
from stepflow_tl.results.journal import Journal
from stepflow_tl.results.journal_lines import JournalKind, read_journals, read_settings
from stepflow_tl.results.plain_data import check_numbers, count, number, text, text_or_none
from stepflow_tl.runs.options import Shard
from stepflow_tl.trace.steps import whole_numbers

SCHEMA_VERSION = 1

_DIAGNOSIS = {"schema": "stepflow_tl.Diagnosis", "version": 1}  # not repeated in every line


@dataclass(frozen=True)
class RunSettings:
    """What all traces of a folder have in common; None where a header does not say.

    Attributes:
        model_name: The model's own name.
        objective: What is differentiated.
        dtype: Of the model's weights.
        layers: Layers that are kept.
        n_layers: Layers of the model.
        splitter: How segments are cut into steps.
        format: Name of the reasoning format.
        stepflow: The repair that the analysis runs under, as `repr` writes it; None for none.
    """

    model_name: str
    objective: str
    dtype: str
    layers: tuple[int, ...] | None = None
    n_layers: int | None = None
    splitter: str | None = None
    format: str | None = None
    stepflow: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data, without what is None."""
        data = {**asdict(self), "layers": None if self.layers is None else list(self.layers)}
        return {name: value for name, value in data.items() if value is not None}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> RunSettings:
        """Read a header's settings.

        Raises:
            KeyError: If one that every header has is missing.
            TypeError: If one is of the wrong type; or `ValueError`, for what it holds.
        """
        return cls(
            **{name: text(data, name) for name in ("model_name", "objective", "dtype")},
            layers=None if data.get("layers") is None else whole_numbers(data["layers"]),
            n_layers=None if data.get("n_layers") is None else count(data, "n_layers"),
            splitter=text_or_none(data, "splitter"),
            format=text_or_none(data, "format"),
            stepflow=text_or_none(data, "stepflow"),
        )


@dataclass(frozen=True, eq=False)
class Done:
    """A trace that has a result.

    Attributes:
        id: Its id.
        line: Line or row in the input.
        file: Name of the result file, as written: a reader must not trust it to stay in its folder.
        n_tokens: Tokens of the trace.
        seconds: Wall-clock time of the analysis; 0 where a result was found whose line was lost.
        group: Value of the grouping field, if there is one.
        pair: Value of the pairing field, if there is one.
        sha256: Of the result file; None where nobody wrote it down.
        diagnosis: Measures of the map, without the reasons for what is missing.
        agreement: Agreement with its knockout, or None.
        group_by: Name of the grouping field; None where there is none, or the line is of a version that did
            not write it.
        pair_by: Name of the pairing field, likewise.
    """

    id: str
    line: int
    file: str
    n_tokens: int
    seconds: float
    group: bool | None
    pair: str | None
    sha256: str | None
    diagnosis: Diagnosis
    agreement: TraceAgreement | None = None
    group_by: str | None = None
    pair_by: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The line; the diagnosis is spread over it, its measures under `metrics`."""
        own = {
            each.name: getattr(self, each.name)
            for each in fields(self)
            if each.name not in ("diagnosis", "agreement")
        }
        measured = self.diagnosis.to_json()
        metrics = {name: measured.pop(name) for name in LAYER_METRICS}
        rest = {name: value for name, value in measured.items() if name not in (*_DIAGNOSIS, *own, "reasons")}
        agreement = None if self.agreement is None else self.agreement.to_json()
        return {"kind": "done", **own, **rest, "metrics": metrics, "agreement": agreement}


@dataclass(frozen=True)
class Failed:
    """A trace that has no result.

    Attributes:
        id: Its id; for a row that names no trace, the row.
        line: Line or row in the input.
        reason: Why, in words.
        error: Class of the error.
        input: Digest of the row's text: a failure is remembered as long as the row stays what it was.
    """

    id: str
    line: int
    reason: str
    error: str
    input: str = ""

    def to_json(self) -> dict[str, Any]:
        """The line."""
        return {"kind": "failed", **asdict(self)}


Entry = Done | Failed


def entry_of(data: dict[str, Any]) -> Entry:
    """The entry of a line.

    Raises:
        KeyError: If a field is missing.
        TypeError: If a field is of the wrong type; or `ValueError`, for what it holds.
    """
    if data["kind"] == "failed":
        texts = {name: text({"input": "", **data}, name) for name in ("id", "reason", "error", "input")}
        return Failed(line=count(data, "line"), **texts)
    group, sha256 = data.get("group"), text_or_none(data, "sha256")
    if group is not None and not isinstance(group, bool):
        raise TypeError(f"group is a {type(group).__name__}, expected true, false or null")
    if sha256 is not None and not re.fullmatch("[0-9a-f]{64}", sha256):
        raise ValueError("sha256 is not a SHA-256 in hex")
    return Done(
        id=text(data, "id"),
        line=count(data, "line"),
        file=text(data, "file"),
        n_tokens=count(data, "n_tokens"),
        seconds=number(data, "seconds"),
        group=group,
        pair=text_or_none(data, "pair"),
        sha256=sha256,
        diagnosis=_diagnosis(data),
        agreement=_agreement(data.get("agreement")),
        group_by=text_or_none(data, "group_by"),
        pair_by=text_or_none(data, "pair_by"),
    )


MANIFEST = JournalKind(
    what="manifest",
    of="analysis",
    schema=SCHEMA_VERSION,
    entries=("done", "failed"),
    check=entry_of,
    stem="manifest",
    defaults={"stepflow": None},
)


def manifest_path(folder: Path, shard: Shard | None = None) -> Path:
    """Where the manifest of a run lies.

    Args:
        folder: The folder of the results.
        shard: Whose part; of a run that is not cut by default.
    """
    return folder / f"{MANIFEST.stem}{(shard or Shard()).suffix}.jsonl"


def open_manifest(
    path: Path,
    settings: RunSettings,
    *,
    overwrite: bool = False,
    note: Callable[[str], None] = lambda message: None,
) -> Journal:
    """The manifest of a run, locked, to append entries to and to look them up by id.

    Args:
        path: The file, made if it does not exist.
        settings: Of this run.
        overwrite: Begin anew where the settings differ, instead of refusing.
        note: Told what was mended.

    Raises:
        DiskFullError: If there is no room for the header.
        ResultFileError: If another run holds the lock, or the file is something else or of other settings.
    """
    return Journal(path, MANIFEST, settings.to_json(), overwrite=overwrite, note=note)


@dataclass(frozen=True)
class ManifestIndex:
    """The traces of a folder, as its manifests have them in the end.

    Attributes:
        settings: Of the run, or None where there is no manifest.
        entries: One per id, what failed first, both in the order of the input.
        files: Every file name that any line ever named.
        damaged: Lines that cannot be read: where, and why.
    """

    settings: RunSettings | None
    entries: tuple[Entry, ...]
    files: frozenset[str]
    damaged: tuple[str, ...]


def read_manifests(folder: Path) -> ManifestIndex:
    """What the manifests of a folder say of each trace in the end.

    Raises:
        ResultFileError: If a manifest cannot be read, has no header, is of a later schema, or two headers are
            of different settings.
    """
    paths = sorted(MANIFEST.files(folder), key=lambda path: (path.stat().st_mtime_ns, path.name))
    stated: dict[str, Any] = {}
    last: dict[tuple[str, Path], Entry] = {}
    files: set[str] = set()
    damaged: list[str] = []
    for path, line in read_journals(paths, MANIFEST):
        if line.damage:
            damaged.append(line.damage)
        elif line.settings is not None:
            stated |= read_settings(RunSettings.from_json, line.settings, path).to_json()
        else:
            last[line.id, path] = line.entry
            if isinstance(line.entry, Done):
                files.add(line.entry.file)
    found: dict[str, Entry] = {}
    for (name, _), entry in last.items():
        if isinstance(entry, Done) or not isinstance(found.get(name), Done):
            found[name] = entry
    return ManifestIndex(
        RunSettings.from_json(stated) if stated else None,
        tuple(sorted(found.values(), key=lambda entry: (isinstance(entry, Done), entry.line, entry.id))),
        frozenset(files),
        tuple(damaged),
    )


def _diagnosis(data: dict[str, Any]) -> Diagnosis:
    layers = whole_numbers(data["layers"])
    if not layers or len(set(layers)) != len(layers) or min(layers) < 0:
        raise ValueError(f"layers {str(layers)[:60]} must be distinct, from 0 on, and at least one")
    if not isinstance(data["metrics"], dict):
        raise TypeError(f"metrics is a {type(data['metrics']).__name__}, expected an object")
    nothing = [None] * len(layers)  # a metric that the diagnosis did not have when the line was written
    metrics = {name: data["metrics"].get(name, nothing) for name in LAYER_METRICS}
    for name, values in metrics.items():
        check_numbers(values)
        if len(values) != len(layers):
            raise ValueError(f"{name} has {len(values)} values for {len(layers)} layers")
    check_numbers([data["decay_slope"]])
    # What `diagnose` takes by default, where the line does not say.
    stated = {"window": 0, "recent": 1, "pooling": "mean", "rows_without_mass": [0] * len(layers), **data}
    counts = ("n_layers", "n_question", "n_thinking", "n_summary", "n_tokens", "window", "recent")
    return Diagnosis.from_json(
        {
            **_DIAGNOSIS,
            "layers": list(layers),
            **metrics,
            "rows_without_mass": whole_numbers(stated["rows_without_mass"]),
            "decay_slope": data["decay_slope"],
            **{name: count(stated, name) for name in counts},
            **{name: text(stated, name) for name in ("pooling", "model_name", "objective")},
            "reasons": {},
        }
    )


def _agreement(data: Any) -> TraceAgreement | None:
    if data is None:
        return None
    found = TraceAgreement.from_json(data)
    numbers = [values[measure] for values in found.values.values() for measure in MEASURES]
    if any(map(math.isinf, [found.top_k_chance, *numbers])):
        raise ValueError("a number of the agreement is beyond what a float can hold")
    for name in ("k", "n_pairs", "n_grouped"):
        count({"n_grouped": 0, **data}, name)
    return found
