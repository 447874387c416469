"""The table of a run, long form: one row per trace and layer, as Parquet, written row group by row group.

Columns: `id`, `group`, `pair`, `n_tokens`, `n_question`, `n_thinking`, `n_summary`, `layer`, `n_layers`,
every one of `LAYER_METRICS` (a null where a definition does not apply), `decay_slope` (of the trace, the same
in all its rows), `model`, `objective`, `dtype`, `backend`. What repeats costs next to nothing: Parquet writes
it once per row group. Memory: the rows of `_TRACES_A_GROUP` traces. The target appears when it is whole.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from stepflow_tl.diagnosis.diagnosis import LAYER_METRICS
from stepflow_tl.errors import require
from stepflow_tl.results.files import atomic_file
from stepflow_tl.runs.outcomes import Outcome

_TRACES_A_GROUP = 256
_METADATA = {b"stepflow_tl.LayerTable": json.dumps({"version": 1, "minor": 0}).encode()}


@contextlib.contextmanager
def layer_table(target: Path) -> Iterator[LayerTable]:
    """A table to add traces to; `target` is untouched until the block ends well.

    Raises:
        MissingExtraError: If pyarrow is not installed.
        ResultFileError: If the folder is missing or the disk refuses.
    """
    arrow, parquet = _arrow()
    schema = _schema(arrow)
    with atomic_file(target) as file, parquet.ParquetWriter(file, schema, compression="zstd") as writer:
        table = LayerTable(arrow, writer, schema)
        yield table
        table.flush()


class LayerTable:
    """Collects the rows of some traces and writes them as one row group."""

    def __init__(self, arrow: ModuleType, writer: Any, schema: Any) -> None:
        """Start without rows."""
        self._arrow, self._writer, self._schema = arrow, writer, schema
        self._traces: list[Outcome] = []

    def add(self, trace: Outcome) -> None:
        """One trace that has numbers: as many rows as it has layers."""
        self._traces.append(trace)
        if len(self._traces) >= _TRACES_A_GROUP:
            self.flush()

    def flush(self) -> None:
        """Write what has been collected."""
        if self._traces:
            columns = _columns(self._arrow, self._traces)
            self._writer.write_table(self._arrow.table(columns, schema=self._schema))
            self._traces.clear()


def _columns(arrow: ModuleType, traces: list[Outcome]) -> dict[str, Any]:
    done = [trace.done for trace in traces if trace.done is not None]
    found = [each.diagnosis for each in done]
    repeats = [len(diagnosis.layers) for diagnosis in found]
    rows = np.repeat(np.arange(len(traces)), repeats)

    def spread(values: list[Any], kind: Any) -> Any:
        return arrow.array(values, type=kind).take(arrow.array(rows))

    columns = {
        **{name: spread([getattr(each, name) for each in done], arrow.string()) for name in ("id", "pair")},
        "group": spread([each.group for each in done], arrow.bool_()),
        "n_tokens": spread([each.n_tokens for each in done], arrow.int64()),
        "layer": arrow.array([layer for d in found for layer in d.layers], type=arrow.int64()),
        "decay_slope": _numbers(arrow, np.repeat([d.decay_slope for d in found], repeats)),
        "model": spread([d.model_name for d in found], arrow.string()),
        "objective": spread([d.objective for d in found], arrow.string()),
        **{name: spread([getattr(t, name) for t in traces], arrow.string()) for name in ("dtype", "backend")},
    }
    for name in ("n_question", "n_thinking", "n_summary", "n_layers"):
        columns[name] = spread([getattr(d, name) for d in found], arrow.int64())
    for name in LAYER_METRICS:
        columns[name] = _numbers(arrow, np.concatenate([getattr(d, name).numpy() for d in found]))
    return columns


def _numbers(arrow: ModuleType, values: np.ndarray) -> Any:
    return arrow.array(values, type=arrow.float64(), mask=np.isnan(values))


def _schema(arrow: ModuleType) -> Any:
    text, count, number = arrow.string(), arrow.int64(), arrow.float64()
    fields = [("id", text), ("group", arrow.bool_()), ("pair", text), ("n_tokens", arrow.int64())]
    fields += [(name, count) for name in ("n_question", "n_thinking", "n_summary", "layer", "n_layers")]
    fields += [(name, number) for name in (*LAYER_METRICS, "decay_slope")]
    fields += [(name, text) for name in ("model", "objective", "dtype", "backend")]
    return arrow.schema(fields, metadata=_METADATA)


def _arrow() -> tuple[ModuleType, ModuleType]:
    wanted = partial(require, purpose="A Parquet table", extra="datasets")
    return wanted("pyarrow"), wanted("pyarrow.parquet")
