"""The lines of a manifest: a header, then what became of each trace, one JSON object a line.

`{"schema": 1, "kind": "header", "settings": {...}, "stepflow_tl": version}`
`{"kind": "done", "id", "line", "file", "n_tokens", ..., "sha256", "metrics": {name: [number or null, ...]},
...}` `{"kind": "failed", "id", "line", "reason", "error", ...}`

The last line for an id wins. Readers ignore keys they do not know; a change that older readers would get
wrong raises `SCHEMA_VERSION`. `seconds` is wall-clock time and the only field that differs between two equal
runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from stepflow_tl.causal.agreement import TraceAgreement
from stepflow_tl.diagnosis import LAYER_METRICS, Diagnosis
from stepflow_tl.errors import ResultFileError

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class RunSettings:
    """What all traces of a folder have in common.

    Attributes:
        model_name: The model's own name.
        objective: What is differentiated.
        dtype: Of the model's weights.
        layers: Layers that are kept.
        n_layers: Layers of the model.
        splitter: How segments are cut into steps.
        format: Name of the reasoning format.
    """

    model_name: str
    objective: str
    dtype: str
    layers: tuple[int, ...]
    n_layers: int
    splitter: str
    format: str

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "layers": list(self.layers)}


@dataclass(frozen=True)
class Done:
    """A trace that has a result.

    Attributes:
        id: Its id.
        line: Line or row in the input.
        file: Name of the result file.
        n_tokens: Tokens of the trace.
        seconds: Wall-clock time of the analysis; 0 where a result was found whose line was lost.
        group: Value of the grouping field, if there is one.
        pair: Value of the pairing field, if there is one.
        sha256: Of the result file.
        diagnosis: Measures of the map, as `Diagnosis.to_json` writes them, without the reasons.
        agreement: Agreement with its knockout, as `TraceAgreement.to_json` writes it, or None.
    """

    id: str
    line: int
    file: str
    n_tokens: int
    seconds: float
    group: bool | None
    pair: str | None
    sha256: str
    diagnosis: Mapping[str, Any]
    agreement: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """The line; the diagnosis is spread over it, its measures under `metrics`."""
        own = {
            f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("diagnosis", "agreement")
        }
        rest = {
            k: v
            for k, v in self.diagnosis.items()
            if k not in (*LAYER_METRICS, "reasons", "schema", "version")
        }
        metrics = {name: [_finite(value) for value in self.diagnosis[name]] for name in LAYER_METRICS}
        return {"kind": "done", **own, **rest, "metrics": metrics, "agreement": self.agreement}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Done:
        """Read `to_json`'s data.

        Raises:
            ResultFileError: If a field is missing.
        """
        try:
            own = {f.name: data[f.name] for f in fields(cls) if f.name != "diagnosis"}
            known = (*own, "kind", "metrics")
            rest = {name: value for name, value in data.items() if name not in known}
            return cls(**own, diagnosis={**rest, **data["metrics"]})
        except (KeyError, TypeError, AttributeError) as error:
            raise ResultFileError(f"a manifest line that does not hold together ({error!r})") from error

    def read_diagnosis(self) -> Diagnosis:
        """The measures as a `Diagnosis`; why one is missing is not kept in a manifest.

        Raises:
            ResultFileError: If they do not hold together.
        """
        return Diagnosis.from_json({**_DIAGNOSIS_SCHEMA, **self.diagnosis, "reasons": {}})

    def read_agreement(self) -> TraceAgreement | None:
        """The agreement, if there is one."""
        return None if self.agreement is None else TraceAgreement.from_json(self.agreement)


@dataclass(frozen=True)
class Failed:
    """A trace, or a row, that has no result.

    Attributes:
        id: Its id; "line-<number>" where the row names none.
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

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Failed:
        """Read `to_json`'s data.

        Raises:
            ResultFileError: If a field is missing.
        """
        try:
            return cls(data["id"], data["line"], data["reason"], data["error"], data.get("input", ""))
        except KeyError as error:
            raise ResultFileError(f"a manifest line lacks {error}") from error


Entry = Done | Failed

_DIAGNOSIS_SCHEMA = {"schema": "stepflow_tl.Diagnosis", "version": 1}


def entry_of(data: Mapping[str, Any]) -> Entry:
    """The entry of a line.

    Raises:
        ResultFileError: If it is none.
    """
    kind = data.get("kind")
    if kind not in ("done", "failed"):
        raise ResultFileError(f"a manifest line of kind {kind!r}: expected done or failed")
    return Done.from_json(data) if kind == "done" else Failed.from_json(data)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
