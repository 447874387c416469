"""Lazy faces: packages whose public names are imported on first use (PEP 562).

A face names each of them once, for type checkers and editors: `from home import name as name` below
`if TYPE_CHECKING:`. What is imported on first use is read off the same lines, so the two cannot differ:

    __getattr__, __dir__, __all__ = lazy_face(__name__)

Cost: the face is parsed when it is imported, some milliseconds with `ast`. It needs the face's source.
"""

import ast
import importlib
import sys
from collections.abc import Callable
from typing import Any


def lazy_face(package: str) -> tuple[Callable[[str], object], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a face, called while it is imported.

    Args:
        package: Its `__name__`.
    """
    face: Any = sys.modules[package]
    tree = ast.parse(face.__spec__.loader.get_data(face.__file__))
    blocks = [node for node in tree.body if isinstance(node, ast.If)]
    imports = [node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom)]
    homes = {alias.name: str(node.module) for node in imports for alias in node.names}
    public = sorted(homes)

    def resolve(name: str) -> object:
        if name not in homes:
            listed = ", ".join(public)
            raise AttributeError(f"module {package!r} has no attribute {name!r}; public names: {listed}")
        value = getattr(importlib.import_module(homes[name]), name)
        setattr(face, name, value)
        return value

    return resolve, lambda: sorted({*vars(face), *public}), public
