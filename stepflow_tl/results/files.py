"""Result files: safetensors, nothing unpickled, versioned, written atomically.

1. Tensors, bit for bit.
2. Metadata: one JSON document under the schema's name, with the version and whatever the result needs. One
   key, because safetensors writes several in no fixed order and equal results should be equal files.
3. Writing goes to a temporary file in the same folder, is flushed to disk and renamed over the target,
   so a crash leaves the old file or none, never half a one. A symbolic link at the target is replaced, not
   followed.
4. Reading checks, in this order: that the header's sizes add up to the file's (safetensors does), the schema,
   and the kind and shape of every tensor against the document. Only then is a tensor read, so what is
   allocated is never more than the file holds, nor anything that the document does not account for.
   Every defect is a `ResultFileError`.

Versions: `version` is the major one. A reader takes all majors up to its own and refuses later ones. `minor`
counts additions, keys of the document or tensors that an older reader may pass over: a reader takes any
minor, and ignores what it does not know.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

from torch import Tensor

from stepflow_tl.errors import DiskFullError, ResultFileError, StepflowError
from stepflow_tl.results.plain_data import DAMAGE

Result = TypeVar("Result")


@dataclass(frozen=True)
class Schema:
    """A kind of result file.

    Attributes:
        name: Key of the metadata, such as "stepflow_tl.StepSaliency".
        version: Highest major version that can be read, and the one that is written.
        what: The kind in words, for messages: "a step-saliency result".
        minor: Minor version that is written; see the module.
    """

    name: str
    version: int
    what: str
    minor: int = 0


class TensorSpec(NamedTuple):
    """What a tensor of a file must be: jaxtyping's name of its kind, and its shape.

    A size of None is any size of at least 1.
    """

    kind: str
    shape: tuple[int | None, ...]


# safetensors' names. Nothing here writes eight-bit floats or computes with them.
_DTYPES = {"Float": ("F16", "BF16", "F32", "F64"), "Bool": ("BOOL",)}


def save_result(
    path: str | Path, schema: Schema, tensors: Mapping[str, Tensor], document: Mapping[str, Any]
) -> Path:
    """Write a result to `path` atomically and return the path.

    Raises:
        ResultFileError: If the folder does not exist or the disk refuses the write; `path` is then as it was.
    """
    from safetensors.torch import save

    target = Path(path)
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps({"version": schema.version, "minor": schema.minor, **document}, sort_keys=True)
    write_atomically(target, save(held, metadata={schema.name: text}))
    return target


def load_result(
    path: str | Path,
    schema: Schema,
    expected: Callable[[dict[str, Any]], dict[str, TensorSpec]],
    build: Callable[[dict[str, Any], dict[str, Tensor]], Result],
) -> Result:
    """Read a file written by `save_result` and build the result of it.

    `expected` says from the document what each tensor must be, and is asked before any of them is read;
    `build` makes the result of document and tensors. What either raises means that the file is damaged.

    Raises:
        ResultFileError: If the file is missing, truncated, foreign, of an unknown version, or its tensors are
            not what the document says; the message says which.
    """
    source = Path(path)
    with _opened(source, schema) as (file, document):
        specs = expected(document)
        _check_tensors(file, specs)
        return build(document, {name: file.get_tensor(name) for name in specs})


def read_document(path: str | Path, schema: Schema, read: Callable[[dict[str, Any]], Result]) -> Result:
    """What `read` makes of a file's JSON document, its tensors unread.

    What `read` raises means that the file is damaged. The file's length is compared with what its header
    declares, so a file that was cut off is refused.

    Raises:
        ResultFileError: As `load_result`, the tensors' shapes apart.
    """
    with _opened(Path(path), schema) as (_, document):
        return read(document)


@contextlib.contextmanager
def _opened(source: Path, schema: Schema) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The open safetensors file and its document; whatever goes wrong inside becomes a `ResultFileError`."""
    from safetensors import SafetensorError, safe_open

    if not source.is_file():
        writer = schema.name.removeprefix("stepflow_tl.")
        raise ResultFileError(f"no result file at {source}: expected a file written by {writer}.save")
    try:
        with safe_open(source, framework="pt", device="cpu") as file:
            yield file, _read_document(file.metadata() or {}, source, schema)
    except ResultFileError:
        raise
    except OSError as error:
        raise ResultFileError(f"cannot read {source} ({error.strerror or error})") from error
    except SafetensorError as error:
        raise ResultFileError(
            f"{source} is not a whole safetensors file ({error}): it was cut off or is something else. Run "
            "the analysis of this trace again."
        ) from error
    except (*DAMAGE, StepflowError) as error:
        raise ResultFileError(
            f"{source} calls itself {schema.name} version {schema.version} but its content is inconsistent "
            f"({error!r}). Run the analysis of this trace again."
        ) from error


def _check_tensors(file: Any, specs: Mapping[str, TensorSpec]) -> None:
    present = set(file.keys())
    for name, (kind, shape) in specs.items():
        if name not in present:
            raise ValueError(f"there is no tensor {name!r}")
        found = file.get_slice(name)
        dtype, sizes = found.get_dtype(), tuple(found.get_shape())
        fits = len(sizes) == len(shape) and all(
            size == wanted if wanted is not None else size > 0
            for size, wanted in zip(sizes, shape, strict=True)
        )
        if dtype not in _DTYPES[kind] or not fits:
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise ValueError(
                f"tensor {name!r} is {dtype} {sizes}, but the document asks for {kind} ({wanted})"
            )


def write_atomically(target: Path, data: bytes) -> None:
    """Write bytes so that `target` is either untouched or complete.

    Raises:
        DiskFullError: If there is no room for it; no temporary file is left behind.
        ResultFileError: If the folder is missing or the disk refuses; no temporary file is left behind.
    """
    with atomic_file(target) as file:
        file.write(data)


@contextlib.contextmanager
def atomic_file(target: Path) -> Iterator[BinaryIO]:
    """A file to write to piece by piece; `target` is untouched until the block ends well, then complete.

    Raises:
        DiskFullError: If there is no room for it.
        ResultFileError: If the folder is missing or the disk refuses. No temporary file is left behind,
            whatever the block raises.
    """
    temporary: str | None = None
    try:
        descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes files that only their owner can read
        os.replace(temporary, target)
        temporary = None
    except OSError as error:
        if is_disk_full(error):
            raise DiskFullError(
                f"no room to write {target} ({error.strerror}): nothing was changed there"
            ) from error
        raise ResultFileError(
            f"cannot write {target} ({error.strerror or error}): nothing was changed there. Make the folder, "
            "or free some space, and save again."
        ) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hex digits; read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def is_disk_full(error: OSError) -> bool:
    """Whether the disk, a quota or a limit on file sizes has no room."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _read_document(metadata: dict[str, str], source: Path, schema: Schema) -> dict[str, Any]:
    if schema.name not in metadata:
        raise ResultFileError(
            f"{source} is a safetensors file, but not {schema.what} (no {schema.name!r} in its metadata)"
        )
    document = json.loads(metadata[schema.name])
    if not isinstance(document, dict):
        raise TypeError(f"the metadata is a JSON {type(document).__name__}, expected an object")
    version = document.get("version")
    if type(version) is not int or version < 1:
        raise ValueError(f"the schema version is {version!r}, expected a whole number from 1 on")
    if version > schema.version:
        raise ResultFileError(
            f"{source} has schema version {version}; this stepflow_tl reads up to {schema.version}: "
            "upgrade stepflow-tl to read it"
        )
    return document
