"""From a trace's id to a file name that stays in its folder, on every file system.

1. An id of ASCII letters, digits, ".", "_" and "-", short, without a leading dot, that no system
   reserves, is its own name.
2. Any other id becomes what is left of it, readable, and 12 hex digits of its SHA-256: `../x` becomes
   `x-` and the digits. So no path separator, NUL or device name gets through, and different ids keep
   different names.
3. Two ids that differ only in case would share a file on some systems: the later one gets the digits too.
"""

import hashlib
import re

_PLAIN = re.compile(r"[A-Za-z0-9_-](?:[A-Za-z0-9._-]{0,98}[A-Za-z0-9_-])?", re.ASCII)
# Windows devices, with any ending.
_RESERVED = re.compile(r"(?:con|prn|aux|nul|com\d|lpt\d)(?:\..*)?", re.ASCII | re.IGNORECASE)
_READABLE = 80


class FileNames:
    """Gives each id of a run its file stem."""

    def __init__(self) -> None:
        """No name is taken yet."""
        self._id_of: dict[str, str] = {}

    def stem(self, trace_id: str) -> str:
        """File name without ending; the same id gives the same name, another id another one."""
        is_plain = _PLAIN.fullmatch(trace_id) and not _RESERVED.fullmatch(trace_id)
        name = trace_id if is_plain else hashed_stem(trace_id)
        if self._id_of.setdefault(name.casefold(), trace_id) == trace_id:
            return name
        name = hashed_stem(trace_id)
        if self._id_of.setdefault(name.casefold(), trace_id) != trace_id:
            # An id that spells another one's digits.
            name = hashed_stem(trace_id, digits=64)
            self._id_of[name.casefold()] = trace_id
        return name


def hashed_stem(trace_id: str, digits: int = 12) -> str:
    """The readable part of an id and the first hex digits of its SHA-256."""
    readable = re.sub(r"[^A-Za-z0-9._-]+", "_", trace_id, flags=re.ASCII).strip("._-")[:_READABLE]
    if _RESERVED.fullmatch(readable):  # Windows looks at what stands before the first dot
        readable = f"trace-{readable}"
    digest = hashlib.sha256(trace_id.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{readable or 'trace'}-{digest[:digits]}"
