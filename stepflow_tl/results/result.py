"""`StoredResult`: what every result with a file of its own shares, and the head of such a file.

1. A result is a frozen dataclass that has `layers`, `n_layers` and `provenance`. These three are its head:
   the same keys in every kind of file, readable without the rest (`read_head`).
2. Fields annotated as jaxtyping arrays are the tensors of the file; all others are its document, written and
   checked by `results.plain_data`. The annotations say all there is to say about either.
3. A tensor's axes have names, and `axes` tells which field has one entry for each of their places. So an
   annotation gives the shape, of a tensor in a file before it is read as of one that a constructor is given.
4. `table` is the result as text, for terminals and logs. Nothing here draws: see `rendering.show`.

Two kinds: `TracedResult` has a trace whose steps label its axes; another, like `StepPatching`, has not.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial, reduce
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_type_hints

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stepflow_tl.results.files import Schema, TensorSpec, load_result, read_document, save_result
from stepflow_tl.results.plain_data import from_plain, to_plain
from stepflow_tl.results.provenance import Provenance
from stepflow_tl.results.tables import number, shortened, text_table
from stepflow_tl.trace import ReasoningTrace

Kind = TypeVar("Kind", bound="StoredResult")


@dataclass(frozen=True)
class ResultHead:
    """What a file says of its analysis, without its tensors and its trace.

    Attributes:
        layers: Model layers that the result covers.
        n_layers: Number of layers of the whole model.
        provenance: Model, objective, backend, versions.
    """

    layers: tuple[int, ...]
    n_layers: int
    provenance: Provenance


class StoredResult(ABC):
    """A result that is saved, loaded and printed; subclasses are frozen dataclasses."""

    schema: ClassVar[Schema]
    #: Where the entries of an axis are: a field, or the field of a field. Other axes have any length.
    axes: ClassVar[Mapping[str, str]]
    layers: tuple[int, ...]
    n_layers: int
    provenance: Provenance

    def __post_init__(self) -> None:
        """Refuse layers that the model does not have, tensors of other shapes, and values not finite."""
        if len(set(self.layers)) != len(self.layers):
            raise ValueError(f"layers {self.layers} must be distinct")
        if any(not 0 <= layer < self.n_layers for layer in self.layers):
            raise ValueError(f"layers {self.layers} lie outside the model's 0..{self.n_layers - 1}")
        sizes = self._sizes(self)
        for name, (kind, axes) in self._tensor_axes().items():
            tensor = getattr(self, name)
            if not (tensor.is_floating_point() if kind == "Float" else tensor.dtype == torch.bool):
                raise ValueError(f"{name} is {tensor.dtype}, expected {kind}")
            for axis, size in zip(axes, tensor.shape, strict=False):
                sizes.setdefault(axis, size)
            shape, expected = tuple(tensor.shape), tuple(sizes.get(axis) for axis in axes)
            if shape != expected:
                raise ValueError(f"{name} has shape {shape}, expected {expected} ({', '.join(axes)})")
            if not torch.isfinite(tensor).all():
                place = (~torch.isfinite(tensor)).nonzero()[0].tolist()
                at = ", ".join(map(self._place, axes, place))
                raise ValueError(
                    f"{name} must be finite, but is not at {at}: run the model in float32, and check the "
                    "metric and any attached hook for NaN"
                )

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file to `path` and return the path.

        It is atomic: a reader sees the old file or the whole new one.

        Raises:
            ResultFileError: If the folder does not exist or the disk refuses; `path` is then as it was.
        """
        tensors = {name: getattr(self, name) for name in self._tensor_axes()}
        return save_result(path, self.schema, tensors, self._document())

    @classmethod
    def load(cls: type[Kind], path: str | Path) -> Kind:
        """Read the file at `path` that `save` wrote.

        Raises:
            ResultFileError: If the file is missing, truncated, foreign or of an unknown version; the message
                says which.
        """
        return load_result(path, cls.schema, cls._specs, cls._build)

    def table(self, n: int = 10) -> str:
        """The `n` largest entries, by size, as a text table."""
        return text_table(*self._table(n))

    @property
    @abstractmethod
    def labels(self) -> list[str]:
        """Short names of the steps on the axes, in order."""

    @abstractmethod
    def _table(self, n: int) -> tuple[str, list[str], list[list[str]], list[str]]:
        """Title, header, at most `n` rows and footer of `table`."""

    def _document(self) -> dict[str, Any]:
        tensors = self._tensor_axes()
        names = [field.name for field in fields(self) if field.name not in tensors]  # pyright: ignore
        return {name: to_plain(getattr(self, name)) for name in names}

    @classmethod
    def _build(cls: type[Kind], document: dict[str, Any], tensors: dict[str, Tensor]) -> Kind:
        return from_plain(cls, document, **tensors)

    @classmethod
    def _specs(cls, document: dict[str, Any]) -> dict[str, TensorSpec]:
        """What each tensor must be by this document."""
        sizes = cls._sizes(document)
        tensors = cls._tensor_axes().items()
        return {name: TensorSpec(kind, tuple(map(sizes.get, axes))) for name, (kind, axes) in tensors}

    @classmethod
    def _sizes(cls, source: Any) -> dict[str, int]:
        """The lengths of `axes`, of a result or of its document."""
        return {axis: len(reduce(_field, path.split("."), source)) for axis, path in cls.axes.items()}

    @classmethod
    def _tensor_axes(cls) -> dict[str, tuple[str, list[str]]]:
        """Kind ("Float" or "Bool") and axes of each tensor, by its annotation."""
        arrays = {name: hint for name, hint in get_type_hints(cls).items() if hasattr(hint, "dim_str")}
        return {name: (hint.dtype.__name__, hint.dim_str.split()) for name, hint in arrays.items()}

    def _place(self, axis: str, index: int) -> str:
        """A place on an axis in words: "layer 3", "step T2", "head 0"."""
        if axis not in self.axes:
            return f"{axis} {index}"
        return f"{axis} {self.layers[index] if axis == 'layer' else self.labels[index]}"


def _field(source: Any, name: str) -> Any:
    return source[name] if isinstance(source, dict) else getattr(source, name)


class TracedResult(StoredResult):
    """A result on one trace, whose steps label its axes."""

    axes = {"layer": "layers", "query_step": "trace.steps", "key_step": "trace.steps"}
    trace: ReasoningTrace

    @property
    def step_lengths(self) -> Int[Tensor, " step"]:
        """Tokens per step."""
        return self.trace.step_lengths

    @property
    def labels(self) -> list[str]:
        """Short step names in order: Q, T1, T2, ..., S1, ..."""
        return [step.label for step in self.trace.steps]

    def _pair_rows(
        self, values: Float[Tensor, "query_step key_step"], shown: Bool[Tensor, "query_step key_step"], n: int
    ) -> list[list[str]]:
        """A table's rows for the `n` largest values by size: both labels, value, beginnings of both texts."""
        queries, keys = shown.nonzero(as_tuple=True)
        order = values[queries, keys].abs().argsort(descending=True, stable=True)[:n]
        rows = []
        for query, key in torch.stack([queries, keys], dim=1)[order].tolist():
            reader, source = self.trace.steps[query], self.trace.steps[key]
            texts = [shortened(reader.text), shortened(source.text)]
            rows.append([reader.label, source.label, number(float(values[query, key])), *texts])
        return rows


def read_head(path: str | Path, kind: type[StoredResult]) -> ResultHead:
    """Layers and provenance of a file of this kind; trace and tensors are left unread.

    Cost: reading the file's header, under a millisecond for a trace of a thousand tokens.

    Raises:
        ResultFileError: As `StoredResult.load`.
    """
    return read_document(path, kind.schema, partial(from_plain, ResultHead))
