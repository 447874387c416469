"""Result files: safetensors, nothing unpickled, versioned, written atomically.

1. Tensors, bit for bit.
2. Metadata: one JSON document under the schema's name, with the version and whatever the result needs. One
   key, because safetensors writes several in no fixed order and equal results should be equal files.
3. Writing goes to a temporary file in the same folder, is flushed to disk and renamed over the target,
   so a crash leaves the old file or none, never half a one.
4. Reading checks the schema before anything else and turns every defect into a `ResultFileError`.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from stepflow_tl.errors import DiskFullError, ResultFileError, StepflowError

Result = TypeVar("Result")


@dataclass(frozen=True)
class Schema:
    """A kind of result file.

    Attributes:
        name: Key of the metadata, such as "stepflow_tl.StepSaliency".
        version: Highest version that can be read, and the one that is written.
        what: The kind in words, for messages: "a step-saliency result".
        writer: What writes such files, for messages: "StepSaliency.save".
    """

    name: str
    version: int
    what: str
    writer: str


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
    text = json.dumps({"version": schema.version, **document}, sort_keys=True)
    write_atomically(target, save(held, metadata={schema.name: text}))
    return target


def load_result(
    path: str | Path,
    schema: Schema,
    tensor_names: Sequence[str],
    build: Callable[[dict[str, Any], dict[str, Tensor]], Result],
) -> Result:
    """Read a file written by `save_result` and build the result of it.

    Args:
        path: The file.
        schema: The kind it must be.
        tensor_names: The tensors to read.
        build: Makes the result of document and tensors. What it raises means that the file is damaged.

    Raises:
        ResultFileError: If the file is missing, truncated, foreign or of an unknown version; the message
            says which.
    """
    from safetensors import SafetensorError, safe_open

    source = Path(path)
    if not source.is_file():
        raise ResultFileError(f"no result file at {source}: expected a file written by {schema.writer}")
    try:
        with safe_open(source, framework="pt", device="cpu") as file:
            document = _read_document(file.metadata() or {}, source, schema)
            tensors = {name: file.get_tensor(name) for name in tensor_names}
        return build(document, tensors)
    except ResultFileError:
        raise
    except SafetensorError as error:
        raise ResultFileError(
            f"{source} is not a whole safetensors file ({error}): it was cut off or is something else. Run "
            "the analysis of this trace again."
        ) from error
    except (KeyError, TypeError, ValueError, RecursionError, StepflowError) as error:
        raise ResultFileError(
            f"{source} calls itself {schema.name} version {schema.version} but its content does not hold "
            f"together ({error!r}). Run the analysis of this trace again."
        ) from error


def floating(tensor: Tensor, ndim: int) -> Tensor:
    """The tensor, if it is a floating one with that many axes.

    Raises:
        ValueError: If it is not.
    """
    if tensor.ndim != ndim or not tensor.is_floating_point():
        raise ValueError(
            f"expected a floating tensor of {ndim} axes, found {tensor.dtype} {tuple(tensor.shape)}"
        )
    return tensor


def write_atomically(target: Path, data: bytes) -> None:
    """Write bytes so that `target` is either untouched or complete.

    Raises:
        DiskFullError: If there is no room for it; no temporary file is left behind.
        ResultFileError: If the folder is missing or the disk refuses; no temporary file is left behind.
    """
    temporary: str | None = None
    try:
        descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
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
    if not isinstance(version, int) or version > schema.version:
        raise ResultFileError(
            f"{source} has schema version {version!r}; this stepflow_tl reads up to {schema.version}: "
            "upgrade stepflow-tl to read it"
        )
    return document
