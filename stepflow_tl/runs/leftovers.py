"""Temporary files of a run that was killed while it wrote one.

`write_atomically` writes `.NAME.xxxxxxxx.tmp` and renames it to NAME. They are looked for once, when a run
begins, and removed when the run that may write NAME comes to it: another shard's are another run's business,
perhaps at this moment.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

_TEMPORARY = re.compile(r"\.(.+)\.[a-z0-9_]{8}\.tmp")


class Leftovers:
    """What an earlier run left in these folders."""

    def __init__(self, *folders: Path) -> None:
        """Look once."""
        self._of: dict[str, list[Path]] = {}
        for folder in folders:
            if folder.is_dir():
                for path in folder.iterdir():
                    if found := _TEMPORARY.fullmatch(path.name):
                        self._of.setdefault(found[1], []).append(path)

    def remove(self, name: str) -> None:
        """Remove what was to become the file `name`."""
        for path in self._of.pop(name, ()):
            with contextlib.suppress(OSError):
                path.unlink()
