"""The plan of the house: which room stands on which storey, and whether the code keeps to it.

    python scripts/house.py [DIR ...] [--faults]

prints the measures of one or several checkouts side by side, and with `--faults` what each does against the
plan. `tests/test_storeys.py` holds the package to the same rules.

1. A *module* is a file, a *face* is an `__init__.py`, a *room* is what stands right below `stepflow_tl`.
2. Every import of the package's own modules counts, wherever it stands: at the top, inside a function, under
   TYPE_CHECKING. `from a import b` is an import of the module `a.b` where there is one, and else of `a`. The
   module strings by which a face resolves names lazily count like imports; what `lazy.lazy_face` resolves
   stands below TYPE_CHECKING.
   What Python runs on the way (importing `a.b` runs the face `a`) does not count: every room with a face
   would be a circle. So a module may not import the face of a folder it stands in, only its siblings.
3. A module imports lower storeys, its own room, or the neighbours that its room may name.
4. A circle is a set of modules that all reach one another; there must be none.
5. Only faces resolve names lazily. Only faces and the command line import their own package inside
   functions; anybody may so import a module that needs an optional package when it is imported.
"""

from __future__ import annotations

import argparse
import ast
import io
import tokenize
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "stepflow_tl"
#: Rooms by storey, the lowest first. The room called like the package is its face.
STOREYS = (
    ("errors", "lazy", "version", "trace", "results", "statistics"),
    ("models", "testbed"),
    ("stepflow", "saliency"),
    ("causal", "diagnosis", "evaluation"),
    ("rendering",),
    ("runs",),
    ("engines",),
    (PACKAGE, "cli", "__main__"),
)
#: Rooms of the same storey that a room may import.
NEIGHBOURS = {
    "trace": {"errors"},
    "results": {"errors", "version", "trace"},
    "statistics": {"errors"},
    "testbed": {"models"},
    "saliency": {"stepflow"},
    "cli": {PACKAGE},
    "__main__": {"cli"},
}
#: Third-party packages that a working installation may lack.
OPTIONAL = {"triton", "lm_eval", "inspect_ai"}
STOREY_OF = {room: storey for storey, rooms in enumerate(STOREYS) for room in rooms}
Graph = dict[str, set[str]]


@dataclass(frozen=True)
class Import:
    """One import of a module of the package, by a module of the package.

    Attributes:
        module: Dotted name of the module that imports.
        target: Dotted name of the module that is imported.
        line: Where.
        in_function: Whether it stands inside a function.
        at_import: Whether it runs when the module is imported: not in a function nor under TYPE_CHECKING.
    """

    module: str
    target: str
    line: int
    in_function: bool = False
    at_import: bool = True

    def __str__(self) -> str:
        """The beginning of a sentence about it."""
        return f"{self.module}:{self.line} imports {self.target}"


@dataclass(frozen=True)
class House:
    """A checkout of the package.

    Attributes:
        files: The file of each module, by dotted name.
        imports: All imports of one module by another.
        optional: Modules that need an optional package when they are imported.
        faults: What is wrong with single statements.
    """

    files: dict[str, Path]
    imports: tuple[Import, ...]
    optional: frozenset[str]
    faults: tuple[str, ...]

    def is_face(self, module: str) -> bool:
        """Whether the module is an `__init__.py`."""
        return self.files[module].name == "__init__.py"


def room(module: str) -> str:
    """The room of a module: what stands right below the package; the package's own face is a room too."""
    return module.split(".")[1] if "." in module else module


def read_house(root: Path) -> House:
    """Parse every module of the package in the checkout `root`."""
    files = {_name(path.relative_to(root)): path for path in sorted((root / PACKAGE).rglob("*.py"))}
    readers = [_Reader(module, path, files) for module, path in files.items()]
    return House(
        files,
        imports=tuple(entry for reader in readers for entry in reader.imports),
        optional=frozenset(reader.module for reader in readers if reader.needs_optional),
        faults=tuple(fault for reader in readers for fault in reader.faults),
    )


def _name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


class _Reader(ast.NodeVisitor):
    """The imports of one module."""

    def __init__(self, module: str, path: Path, files: dict[str, Path]) -> None:
        self.module, self.files = module, files
        self.imports: list[Import] = []
        self.faults: list[str] = []
        self.is_face = path.name == "__init__.py"
        self.needs_optional = False
        self.function_depth = self.typing_depth = 0
        tree = ast.parse(path.read_text(encoding="utf-8"))
        defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assigned = [node for top in tree.body if isinstance(top, ast.Assign) for node in ast.walk(top)]
        defined |= {node.id for node in assigned if isinstance(node, ast.Name)}
        if "__getattr__" in defined and not self.is_face:
            self.faults.append(f"{module} resolves names lazily (__getattr__), which only faces may")
        self.resolves_lazily = self.is_face and "__getattr__" in defined
        self.visit(tree)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._add(alias.name, node.lineno)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.level:
            self.faults.append(f"{self.module}:{node.lineno} is a relative import; name the module in full")
            return
        names = [f"{node.module}.{alias.name}" for alias in node.names]
        for target in dict.fromkeys(name if name in self.files else str(node.module) for name in names):
            self._add(target, node.lineno)

    def visit_Call(self, node: ast.Call) -> None:
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        first = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else None
        if called in ("import_module", "__import__") and str(first).split(".")[0] == PACKAGE:
            self._add(str(first), node.lineno)
            if not self.is_face:
                self.faults.append(f"{self.module}:{node.lineno} imports {first} by {called}")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if self.resolves_lazily and isinstance(node.value, str) and node.value in self.files:
            self.imports.append(Import(self.module, node.value, node.lineno, at_import=False))

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self.function_depth += 1
        self.generic_visit(node)
        self.function_depth -= 1

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_If(self, node: ast.If) -> None:
        is_typing = ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        self.visit(node.test)
        self.typing_depth += is_typing
        for child in node.body:
            self.visit(child)
        self.typing_depth -= is_typing
        for child in node.orelse:
            self.visit(child)

    def _add(self, target: str, line: int) -> None:
        at_import = not self.function_depth and not self.typing_depth
        package = target.split(".")[0]
        if package != PACKAGE:
            self.needs_optional |= at_import and package in OPTIONAL
        elif target in self.files:
            self.imports.append(Import(self.module, target, line, bool(self.function_depth), at_import))
        else:
            self.faults.append(f"{self.module}:{line} imports {target}, which does not exist")


def faults(house: House) -> list[str]:
    """Everything in the house that is against the plan, one sentence each."""
    found = list(house.faults)
    rooms = dict.fromkeys(room(module) for module in house.files)
    found += [f"room {name!r} stands on no storey" for name in rooms if name not in STOREY_OF]
    for entry in upward_imports(house, STOREY_OF, NEIGHBOURS):
        own, other = room(entry.module), room(entry.target)
        found.append(
            f"{entry}: {own} stands on storey {STOREY_OF[own]}, {other} on storey {STOREY_OF[other]}"
        )
    for entry in house.imports:
        is_own_face = house.is_face(entry.target) and entry.module.startswith(f"{entry.target}.")
        if is_own_face and entry.target != PACKAGE:  # that one is an upward import already
            found.append(f"{entry}, the face of a folder it stands in; name the sibling")
        may_be_lazy = house.is_face(entry.module) or room(entry.module) == "cli"
        if entry.in_function and not may_be_lazy and entry.target not in house.optional:
            found.append(f"{entry} inside a function; imports of our own modules stand at the top")
    return found + [f"circle: {', '.join(sorted(circle))}" for circle in circles(module_graph(house))]


def upward_imports(
    house: House, storey_of: Mapping[str, int], neighbours: Mapping[str, Collection[str]]
) -> list[Import]:
    """Imports of a room that stands no lower and is no neighbour; rooms without a storey are passed over."""
    found = []
    for entry in house.imports:
        own, other = room(entry.module), room(entry.target)
        if own != other and own in storey_of and other in storey_of:
            if storey_of[other] >= storey_of[own] and other not in neighbours.get(own, ()):
                found.append(entry)
    return found


def module_graph(house: House) -> Graph:
    """What each module imports."""
    graph: Graph = {module: set() for module in house.files}
    for entry in house.imports:
        graph[entry.module].add(entry.target)
    return graph


def circles(graph: Graph) -> list[frozenset[str]]:
    """The sets of nodes that all reach one another; a node that imports itself is one too."""
    reached: Graph = {}
    for start in graph:
        reached[start], waiting = set(), [start]
        while waiting:
            new = graph[waiting.pop()] - reached[start]
            reached[start] |= new
            waiting += new
    found = (
        frozenset(other for other in reached[node] if node in reached[other])
        for node in graph
        if node in reached[node]
    )
    return list(dict.fromkeys(found))


def measures(root: Path) -> dict[str, int]:
    """The numbers of the table for one checkout.

    An upward import is a module and a room that it reaches. Where the plan knows every room, storeys are
    those of the plan. Older checkouts had none: there a room's storey is the length of the longest chain of
    imports below it, of those that run when modules are imported, so that what goes upward is lazy or for
    typing; the package's own face, which resolves everything lazily, may reach all rooms.
    """
    house = read_house(root)
    sources = [path.read_text(encoding="utf-8") for path in house.files.values()]
    storey_of, neighbours = STOREY_OF, NEIGHBOURS
    if not all(room(module) in STOREY_OF for module in house.files):
        storey_of = _heights(house)
        neighbours = {PACKAGE: set(storey_of)}
    upward = upward_imports(house, storey_of, neighbours)
    return {
        "lines": sum(len(source.splitlines()) for source in sources),
        "code lines": sum(map(code_lines, sources)),
        "files": len(sources),
        "storeys": len(set(storey_of.values())),
        "circles": len(circles(module_graph(house))),
        "upward imports": len({(entry.module, room(entry.target)) for entry in upward}),
    }


def _heights(house: House) -> dict[str, int]:
    graph: Graph = {room(module): set() for module in house.files}
    for entry in house.imports:
        if entry.at_import and room(entry.module) != room(entry.target):
            graph[room(entry.module)].add(room(entry.target))
    together = {name: circle for circle in circles(graph) for name in circle}

    def height(name: str) -> int:
        members = together.get(name, frozenset({name}))
        below = set().union(*(graph[member] for member in members)) - members
        return 1 + max(map(height, below), default=0)

    return {name: height(name) for name in graph}


def code_lines(source: str) -> int:
    """Lines that hold code: blank lines, comments and docstrings left out."""
    layout = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in (*layout, tokenize.ENDMARKER):
            lines.update(range(token.start[0], token.end[0] + 1))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            lines.difference_update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return len(lines)


def main() -> None:
    """Print the measures of the checkouts named on the command line."""
    parser = argparse.ArgumentParser(description="Lines, files, storeys and circles of checkouts.")
    own = Path(__file__).resolve().parents[1]
    parser.add_argument("folders", nargs="*", type=Path, default=[own], metavar="DIR")
    parser.add_argument("--faults", action="store_true", help="what each checkout does against the plan")
    arguments = parser.parse_args()
    for folder in arguments.folders:
        if not (folder / PACKAGE).is_dir():
            parser.error(f"no folder {PACKAGE} in {folder}: name the root of a checkout")
    columns = [measures(folder) for folder in arguments.folders]
    for name in columns[0]:
        print(f"{name:<16}" + "".join(f"{column[name]:>10,}" for column in columns))
    if arguments.faults:
        for folder in arguments.folders:
            found = faults(read_house(folder))
            print(f"\n{folder}: {len(found)} faults", *found, sep="\n  ")


if __name__ == "__main__":
    main()
