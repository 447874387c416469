"""The GGUF container: metadata in full, tensors by place, and one tensor's values when they are asked for.

Layout of a file (little-endian, version 3): "GGUF", the version, the number of tensors and of key-value
pairs; the pairs (a string, a type tag, a value); one record per tensor (name, axes from the fastest on,
quantisation, offset); then, aligned, the tensors' bytes. The header is walked once, which takes half a second
for the 300 000 strings of a large vocabulary; the tensors' bytes are mapped and not touched.

Memory: the metadata. `dequantise` takes the tensor in the wanted dtype plus about 100 MB, whatever its size.
"""

import contextlib
import math
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from stepflow_tl.errors import ModelError

_File = TypeVar("_File", bound="GgufFile")

_MAGIC = b"GGUF"
_VERSION = 3
_STRING, _ARRAY = 8, 9
# GGUF value types of fixed size, by their number in the file, as struct formats.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_VALUES_AT_ONCE = 1 << 22  # dequantised in one piece: 16 MB of float32, and a few such temporaries


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: `shape` as torch has it, `offset` in bytes from the start of the tensor data."""

    name: str
    shape: tuple[int, ...]
    quantization: int
    offset: int

    @property
    def n_rows(self) -> int:
        """How many rows lie one after the other; a vector is one row."""
        return math.prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, quantised as it is."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        block_size, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(self.quantization)]
        return self.shape[-1] // block_size * block_bytes


@dataclass(frozen=True)
class GgufFile:
    """An opened GGUF file of any architecture."""

    path: Path
    metadata: dict[str, Any]
    tensors: tuple[TensorEntry, ...]
    data_start: int

    @classmethod
    def open(cls: type[_File], path: Path) -> _File:
        """Read the header.

        Raises:
            ModelError: If the file cannot be read, is not GGUF of version 3, is one part of a split model, or
                ends before its last tensor does.
        """
        with (
            read_from(path),
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            if data[:4] != _MAGIC:
                raise ModelError(
                    f"{path} is not a GGUF file: it starts with {data[:4]!r}, expected {_MAGIC!r}."
                )
            header = _Cursor(data, position=4)
            version, n_tensors, n_keys = header.unpack("<IQQ")
            if version != _VERSION:
                raise ModelError(f"{path} is GGUF version {version}; only version {_VERSION} is read.")
            # Counts need no check: each entry takes bytes, and the first one past the end is an error.
            metadata = {header.string(): header.value() for _ in range(n_keys)}
            tensors = tuple(header.tensor_entry() for _ in range(n_tensors))
            if metadata.get("split.count", 1) > 1:
                raise ModelError(split_message(path, metadata["split.no"] + 1, metadata["split.count"]))
            alignment = metadata.get("general.alignment", 32)
            data_start = -(-header.position // alignment) * alignment
            for entry in tensors:
                end = data_start + entry.offset + entry.n_rows * entry.row_bytes
                if end > len(data):
                    raise ModelError(
                        f"{path} ends inside tensor {entry.name}: it is {end - len(data)} bytes or more too "
                        "short. Fetch or install it again."
                    )
            return cls(path, metadata, tensors, data_start)

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture, such as "llama"."""
        return str(self.metadata.get("general.architecture"))

    @property
    def name(self) -> str:
        """What the file calls its model; the file's own name where it says nothing."""
        return str(self.metadata.get("general.name") or self.path.stem)

    @property
    def facts(self) -> dict[str, Any]:
        """The metadata of this architecture, without its prefix ("block_count", not "llama.block_count")."""
        prefix = f"{self.architecture}."
        return {
            key.removeprefix(prefix): value for key, value in self.metadata.items() if key.startswith(prefix)
        }

    def dequantise(self, entry: TensorEntry, dtype: torch.dtype) -> Tensor:
        """The values of one tensor, of shape `entry.shape`, on the CPU.

        Raises:
            ModelError: If a value is not finite, or the `gguf` package cannot decode the quantisation.
        """
        import numpy as np
        from gguf import GGMLQuantizationType, dequantize

        quantization = GGMLQuantizationType(entry.quantization)
        start = self.data_start + entry.offset
        data = np.memmap(self.path, mode="r")[start : start + entry.n_rows * entry.row_bytes]
        rows = data.reshape(entry.n_rows, entry.row_bytes)
        tensor = torch.empty(entry.n_rows, entry.shape[-1], dtype=dtype)
        step = max(1, _VALUES_AT_ONCE // entry.shape[-1])
        for first in range(0, entry.n_rows, step):
            try:
                with np.errstate(all="ignore"):  # what is not finite is refused below
                    values = dequantize(np.array(rows[first : first + step]), quantization)
            except NotImplementedError as error:
                raise ModelError(
                    f"{self.path} holds {entry.name} quantised as {quantization.name}, which the installed "
                    "gguf package cannot decode. Update it: pip install -U gguf"
                ) from error
            if not np.isfinite(values).all():
                raise ModelError(f"{self.path} holds values in {entry.name} that are not finite.")
            tensor[first : first + step] = torch.from_numpy(values)
        return tensor.reshape(entry.shape)


def split_message(path: Path, part: int, n_parts: int) -> str:
    """What to do about one part of a split model."""
    return (
        f"{path} is part {part} of {n_parts} of a split model. Join the parts first: "
        "llama-gguf-split --merge FIRST_PART WHOLE.gguf"
    )


@contextlib.contextmanager
def read_from(path: Path) -> Iterator[None]:
    """Whatever a damaged file provokes, here, in transformers, gguf or tokenizers, is a `ModelError`."""
    try:
        yield
    except (ModelError, MemoryError, ImportError):
        raise
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise ModelError(f"{path} is truncated or damaged; install it again. ({reason})") from error


class _Cursor:
    """Reads the header's little-endian values one after the other."""

    def __init__(self, data: mmap.mmap, position: int) -> None:
        self.data = data
        self.position = position

    def unpack(self, layout: str) -> tuple:
        values = struct.unpack_from(layout, self.data, self.position)
        self.position += struct.calcsize(layout)
        return values

    def string(self) -> str:
        (length,) = self.unpack("<Q")
        start, self.position = self.position, self.position + length
        if self.position > len(self.data):
            raise struct.error(f"a string of {length} bytes at byte {start} runs past the end")
        return self.data[start : self.position].decode("utf-8")

    def value(self, kind: int | None = None) -> Any:
        tag = self.unpack("<I")[0] if kind is None else kind
        if tag == _STRING:
            return self.string()
        if tag == _ARRAY:
            item_kind, length = self.unpack("<IQ")
            if item_kind in _SCALARS:
                return list(self.unpack(f"<{length}{_SCALARS[item_kind]}"))
            return [self.value(item_kind) for _ in range(length)]
        return self.unpack("<" + _SCALARS[tag])[0]

    def tensor_entry(self) -> TensorEntry:
        name = self.string()
        (n_axes,) = self.unpack("<I")
        axes = self.unpack(f"<{n_axes}Q")
        quantization, offset = self.unpack("<IQ")
        return TensorEntry(name, tuple(reversed(axes)), quantization, offset)
