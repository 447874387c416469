"""`StoredResult`: what every result with a file of its own shares, and the head of such a file.

1. A result is a frozen dataclass that has `layers`, `n_layers` and `provenance`. These three are its head:
   the same keys in every kind of file, readable without the rest (`read_head`).
2. Saving: the document is the head and the subclass' `_facts`; the tensors are the fields that `_specs` names
   for that document. `files` writes both.
3. Loading: `_specs` says what each tensor must be before one is read; `_fields` turns the facts back into
   constructor arguments; the constructor's own checks have the last word.
4. `table` is the result as text, for terminals and logs. Nothing here draws: see `rendering.show`.

Two kinds: `TracedResult` has a trace whose steps label its axes; another, like `StepPatching`, has not.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stepflow_tl.results.files import (
    Schema,
    TensorSpec,
    load_result,
    read_document,
    save_result,
    whole_number,
    whole_numbers,
)
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

    def to_json(self) -> dict[str, Any]:
        """Its part of a file's document."""
        return {
            "layers": list(self.layers),
            "n_layers": self.n_layers,
            "provenance": self.provenance.to_json(),
        }

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> ResultHead:
        """Read `to_json`'s keys, whatever else the document holds.

        Raises:
            KeyError: If one is missing.
            TypeError: If one has the wrong type.
        """
        return cls(
            layers=whole_numbers(document["layers"]),
            n_layers=whole_number(document["n_layers"]),
            provenance=Provenance.from_json(document["provenance"]),
        )


class StoredResult(ABC):
    """A result that is saved, loaded and printed; subclasses are frozen dataclasses."""

    schema: ClassVar[Schema]
    layers: tuple[int, ...]
    n_layers: int
    provenance: Provenance

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file to `path` and return the path.

        It is atomic: a reader sees the old file or the whole new one.

        Raises:
            ResultFileError: If the folder does not exist or the disk refuses; `path` is then as it was.
        """
        document = self._document()
        tensors = {name: getattr(self, name) for name in self._specs(document)}
        return save_result(path, self.schema, tensors, document)

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

    @abstractmethod
    def _facts(self) -> dict[str, Any]:
        """What the document holds beside the head: plain JSON values."""

    @classmethod
    @abstractmethod
    def _specs(cls, document: dict[str, Any]) -> dict[str, TensorSpec]:
        """The tensor fields, and what each must be by this document."""

    @classmethod
    @abstractmethod
    def _fields(cls, document: dict[str, Any]) -> dict[str, Any]:
        """Constructor arguments read from what `_facts` wrote; any error means a damaged file."""

    @abstractmethod
    def _table(self, n: int) -> tuple[str, list[str], list[list[str]], list[str]]:
        """Title, header, at most `n` rows and footer of `table`."""

    def _document(self) -> dict[str, Any]:
        head = ResultHead(self.layers, self.n_layers, self.provenance)
        return {**head.to_json(), **self._facts()}

    @classmethod
    def _build(cls: type[Kind], document: dict[str, Any], tensors: dict[str, Tensor]) -> Kind:
        head = ResultHead.from_json(document)
        make: Any = cls  # the dataclass' constructor, which this base does not know
        return make(**vars(head), **tensors, **cls._fields(document))

    def _check_layers(self) -> None:
        """Refuse layers that are named twice or that the model does not have."""
        if len(set(self.layers)) != len(self.layers):
            raise ValueError(f"layers {self.layers} must be distinct")
        if any(not 0 <= layer < self.n_layers for layer in self.layers):
            raise ValueError(f"layers {self.layers} lie outside the model's 0..{self.n_layers - 1}")


class TracedResult(StoredResult):
    """A result on one trace, whose steps label its axes."""

    trace: ReasoningTrace

    @property
    def step_lengths(self) -> Int[Tensor, " step"]:
        """Tokens per step."""
        return self.trace.step_lengths

    @property
    def labels(self) -> list[str]:
        """Short step names in order: Q, T1, T2, ..., S1, ..."""
        return [step.label for step in self.trace.steps]

    def _document(self) -> dict[str, Any]:
        return {**super()._document(), "trace": self.trace.to_json()}

    @classmethod
    def _fields(cls, document: dict[str, Any]) -> dict[str, Any]:
        return {"trace": ReasoningTrace.from_json(document["trace"])}

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
    return read_document(path, kind.schema, ResultHead.from_json)
