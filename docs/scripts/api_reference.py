"""Write the API reference in docs/api/ from the package's own source.

    python docs/scripts/api_reference.py [--check]

1. The public names of a package are those of its `__all__`; without one, those that its `__init__` imports as
   `x as x`.
2. Each name is followed through re-exports to the module that defines it.
3. Signature and docstring are read off that module's syntax tree. Nothing is imported, so the page depends on
   the source alone: not on the Python, the torch or the run-time type checks at hand.
4. A page a package, and an index. `--check` writes nothing and fails if a page is not what it should be.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "docs" / "api"
PACKAGES = (
    "stepflow_tl",
    "stepflow_tl.causal",
    "stepflow_tl.runs",
    "stepflow_tl.diagnosis",
    "stepflow_tl.evaluation",
    "stepflow_tl.rendering",
    "stepflow_tl.stepflow",
    "stepflow_tl.testbed",
    "stepflow_tl.trace.formats",
    "stepflow_tl.trace.splitting",
)
SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises")
#: A docstring may leave its arguments to another one, which must then list them.
ELSEWHERE = re.compile(r"[Aa]rguments[^.`]*\bas\s+in\s+`(\w+)`|`(\w+)`: the same arguments")
NOTE = "<!-- Written by docs/scripts/api_reference.py from the docstrings; change those. -->"

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Definition:
    """A public name and where it is defined.

    Attributes:
        name: The public name.
        module: Dotted name of the defining module.
        node: Its syntax tree: a function, a class or an assignment.
        source: Text of the module.
    """

    name: str
    module: str
    node: ast.stmt
    source: str

    def text(self, node: ast.AST) -> str:
        """A part of the definition as it is written, on one line."""
        return re.sub(r"\s+", " ", segment(self.source, node)).strip()


def main() -> None:
    """Write the pages, or check them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail if a page is out of date; write nothing")
    check = parser.parse_args().check
    pages = all_pages()
    stale = [path for path, text in pages.items() if not path.is_file() or path.read_text("utf-8") != text]
    stale += [path for path in PAGES.glob("*.md") if path not in pages]
    if not check:
        PAGES.mkdir(parents=True, exist_ok=True)
        for path in stale:
            path.write_text(pages[path], "utf-8") if path in pages else path.unlink()
    elif stale:
        names = ", ".join(path.name for path in stale)
        sys.exit(f"{names}: out of date, run `python docs/scripts/api_reference.py`")


def all_pages() -> dict[Path, str]:
    """Every page's path and text."""
    pages = {PAGES / f"{package}.md": package_page(package) for package in PACKAGES}
    lines = [NOTE, "# API reference", "", "Import each name from the package whose page it is on.", ""]
    for package in PACKAGES:
        names = (f"[`{name}`]({package}.md#{anchor})" for name, anchor in anchors(package).items())
        lines += [f"- **[`{package}`]({package}.md)**: {', '.join(names)}"]
    pages[PAGES / "README.md"] = "\n".join(lines) + "\n"
    return pages


def package_page(package: str) -> str:
    """The page of one package."""
    first, *rest = paragraphs(ast.get_docstring(parse(package)[0]) or "")
    lines = [NOTE, f"# `{package}`", "", first, *(line for text in rest for line in ("", text))]
    for definition in public_definitions(package):
        lines += ["", *entry(definition)]
    return "\n".join(lines) + "\n"


def public_names(package: str) -> dict[str, str]:
    """Public name to the module it is imported from, in alphabetical order without regard to case."""
    tree, _ = parse(package)
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    homes = {
        alias.name: (node.module or "", alias.asname)
        for node in imports
        for alias in node.names
        if (node.module or "").startswith("stepflow_tl")
    }
    listed = next((names for names in map(_listed_names, tree.body) if names is not None), None)
    public = [name for name, (_, asname) in homes.items() if asname == name and not name.startswith("__")]
    names = public if listed is None else listed
    return {name: homes[name][0] for name in sorted(names, key=str.lower)}


def public_definitions(package: str) -> list[Definition]:
    """Where each public name of a package is defined."""
    return [find(name, module) for name, module in public_names(package).items()]


def find(name: str, module: str) -> Definition:
    """Follow a name to its definition.

    Raises:
        LookupError: If the module neither defines nor imports it.
    """
    tree, source = parse(module)
    for node in tree.body:
        if isinstance(node, (*Function.__args__, ast.ClassDef)) and node.name == name:
            return Definition(name, module, node, source)
        if name in _assigned_names(node):
            return Definition(name, module, node, source)
    for node in ast.walk(tree):  # a lazy face imports below TYPE_CHECKING
        if isinstance(node, ast.ImportFrom) and name in (alias.name for alias in node.names):
            if not (node.module or "").startswith("stepflow_tl"):
                break
            return find(name, node.module or "")
    raise LookupError(f"{module} neither defines nor imports {name}")


@cache
def parse(module: str) -> tuple[ast.Module, str]:
    """Syntax tree and text of a module of the package."""
    path = ROOT / module.replace(".", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    source = path.read_text("utf-8")
    return ast.parse(source), source


def segment(source: str, node: ast.AST) -> str:
    """The text of a node. `ast.get_source_segment` cuts the whole file into lines each time."""
    place: Any = node
    lines = _lines(source)[place.lineno - 1 : place.end_lineno]
    lines[-1] = lines[-1][: place.end_col_offset]
    lines[0] = lines[0][place.col_offset :]
    return b"".join(lines).decode()


@cache
def _lines(source: str) -> list[bytes]:
    return source.encode().splitlines(keepends=True)  # columns count bytes


def entry(definition: Definition) -> list[str]:
    """One name's part of the page."""
    link = f"../../{definition.module.replace('.', '/')}"
    path = f"{link}/__init__.py" if (ROOT / definition.module.replace(".", "/")).is_dir() else f"{link}.py"
    lines = [f"## `{definition.name}`", "", f"Defined in [`{definition.module}`]({path}).", ""]
    node = definition.node
    if isinstance(node, ast.ClassDef):
        return lines + class_entry(definition, node)
    if isinstance(node, Function):
        return lines + function_entry(definition, node, definition.name)
    return [*lines, "```python", segment(definition.source, node), "```"]


def class_entry(definition: Definition, node: ast.ClassDef) -> list[str]:
    """Signature, docstring, then every public method and property, inherited ones last."""
    members = enum_members(definition, node)
    signature = " | ".join(members) if members else parameters(definition, node)
    lines = [*code(f"class {node.name}", signature, "", not members), *docstring_lines(node)]
    for member in public_methods(definition):
        method: Any = member.node
        decorators = [member.text(decorator) for decorator in method.decorator_list]
        kind = "property" if "property" in decorators else ""
        kind = "classmethod" if "classmethod" in decorators else kind
        title = f"`{node.name}.{method.name}`" + (f" ({kind})" if kind else "")
        lines += ["", f"### {title}", ""]
        if kind == "property":
            returns = member.text(method.returns) if method.returns else "Any"
            lines += ["```python", f"{method.name}: {returns}", "```", "", *docstring_lines(method)]
        else:
            lines += function_entry(member, method, method.name)
    return lines


def function_entry(definition: Definition, node: Function, name: str) -> list[str]:
    """Signature and docstring."""
    returns = f" -> {definition.text(node.returns)}" if node.returns else ""
    return [*code(name, parameters(definition, node), returns, True), *docstring_lines(node)]


def code(name: str, inside: list[str] | str, after: str, call: bool) -> list[str]:
    """A signature as a code block, on one line if it fits."""
    if not call:
        return ["```python", f"{name}: {inside}", "```", ""]
    line = f"{name}({', '.join(inside)}){after}"
    if len(line) <= 100:
        return ["```python", line, "```", ""]
    return ["```python", f"{name}(", *(f"    {each}," for each in inside), f"){after}", "```", ""]


def parameters(definition: Definition, node: Function | ast.ClassDef) -> list[str]:
    """Parameters as they are written, `self` and `cls` left out."""
    if isinstance(node, ast.ClassDef):
        made = next((f for f in node.body if isinstance(f, Function) and f.name == "__init__"), None)
        return parameters(definition, made) if made else [definition.text(f) for f in fields(node)]
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + arguments.defaults
    written = [
        _parameter(definition, argument, default)
        for argument, default in zip(positional, defaults, strict=True)
        if argument.arg not in ("self", "cls")
    ]
    if arguments.vararg:
        written.append("*" + _parameter(definition, arguments.vararg, None))
    elif arguments.kwonlyargs:
        written.append("*")
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        written.append(_parameter(definition, argument, default))
    if arguments.kwarg:
        written.append("**" + _parameter(definition, arguments.kwarg, None))
    return written


def fields(node: ast.ClassDef) -> list[ast.AnnAssign]:
    """Public fields of a dataclass, in the order of its constructor."""
    return [
        statement
        for statement in node.body
        if isinstance(statement, ast.AnnAssign)
        and isinstance(statement.target, ast.Name)
        and not statement.target.id.startswith("_")
        and "ClassVar" not in ast.unparse(statement.annotation)
    ]


def enum_members(definition: Definition, node: ast.ClassDef) -> list[str]:
    """Members of an enumeration, none of another class."""
    if not any("Enum" in definition.text(base) for base in node.bases):
        return []
    return [definition.text(each) for each in node.body if isinstance(each, ast.Assign)]


def public_methods(definition: Definition) -> list[Definition]:
    """Methods and properties without a leading underscore: own ones, then those of this package's bases."""
    node = definition.node
    if not isinstance(node, ast.ClassDef):
        return []
    own = [f for f in node.body if isinstance(f, Function) and not f.name.startswith("_")]
    methods = {f.name: Definition(f.name, definition.module, f, definition.source) for f in own}
    for base in (base.id for base in node.bases if isinstance(base, ast.Name)):
        try:
            inherited = public_methods(find(base, definition.module))
        except LookupError:  # a base from elsewhere
            continue
        methods = {**{method.name: method for method in inherited}, **methods}
    return sorted(methods.values(), key=lambda method: method.node not in own)


def docstring_lines(node: Function | ast.ClassDef) -> list[str]:
    """A Google docstring as Markdown: sections become lists, `<` and `*` outside code are escaped."""
    lines: list[str] = []
    for text in paragraphs(ast.get_docstring(node) or ""):
        head, _, body = text.partition("\n")
        if head.rstrip(":") in SECTIONS and head.endswith(":") and body:
            lines += [f"**{head.rstrip(':')}**", "", *_list_items(body), ""]
        else:
            lines += [escaped(text), ""]
    return lines[:-1]


def paragraphs(docstring: str) -> list[str]:
    """Stretches between blank lines."""
    return [part.rstrip() for part in re.split(r"\n\s*\n", docstring.strip())]


def escaped(text: str) -> str:
    """Markdown in which nothing outside backticks is taken for HTML or emphasis."""
    parts = re.split(r"(``.*?``|`[^`]*`)", text, flags=re.DOTALL)
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"(?m)(?<!^)\*|\*(?! )", r"\\*", parts[i].replace("<", "&lt;"))
    return "".join(parts)


def documented_arguments(docstring: str) -> set[str]:
    """Names that stand as entries under Args or Attributes."""
    names: set[str] = set()
    for text in paragraphs(docstring):
        head, _, body = text.partition("\n")
        if head in ("Args:", "Attributes:"):
            names |= set(re.findall(r"(?m)^ {4}\*{0,2}(\w+)(?: \([^)]*\))?:", body))
    return names


def gaps(definition: Definition) -> list[str]:
    """What a definition's docstrings leave out: the docstring itself, or arguments that it should name.

    Functions and dataclasses must list them. A method, a class, and a function that leaves the others to a
    second one may name them in the text, in backticks.
    """
    node = definition.node
    if isinstance(node, Function):
        listed = _listed_arguments(definition, node)
        text = ast.get_docstring(node) or ""
        listed |= {name for name in _arguments(node) if ELSEWHERE.search(text) and _named(name, text)}
        return _missing(definition.name, node, [name for name in _arguments(node) if name not in listed])
    if not isinstance(node, ast.ClassDef):
        return []
    docstring, wanted = ast.get_docstring(node) or "", []
    if any("dataclass" in definition.text(each) for each in node.decorator_list):
        wanted = [definition.text(field.target) for field in fields(node)]
    for made in (f for f in node.body if isinstance(f, Function) and f.name == "__init__"):
        wanted, docstring = _arguments(made), docstring + "\n\n" + (ast.get_docstring(made) or "")
    found = _missing(definition.name, node, [name for name in wanted if not _named(name, docstring)])
    for member in public_methods(definition):
        method: Any = member.node
        listed = _listed_arguments(definition, method)
        text = ast.get_docstring(method) or ""
        unnamed = [a for a in _arguments(method) if a not in listed and not _named(a, text)]
        found += _missing(f"{node.name}.{method.name}", method, unnamed)
    return found


def _missing(name: str, node: Function | ast.ClassDef, arguments: list[str]) -> list[str]:
    if not ast.get_docstring(node):
        return [f"{name} has no docstring"]
    return [f"{name}: its docstring does not name {argument}" for argument in arguments]


def _arguments(node: Function) -> list[str]:
    every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return [each.arg for each in every if each.arg not in ("self", "cls") and not each.arg.startswith("_")]


def _named(argument: str, docstring: str) -> bool:
    return argument in documented_arguments(docstring) or f"`{argument}`" in docstring


def _listed_arguments(definition: Definition, node: Function) -> set[str]:
    """Arguments that a docstring lists, or the one it refers to: a method of the class, or a function."""
    docstring = ast.get_docstring(node) or ""
    listed = documented_arguments(docstring)
    for match in ELSEWHERE.finditer(docstring):
        name = match[1] or match[2]
        there: list[Any] = [member.node for member in public_methods(definition) if member.name == name]
        there += [d.node for package in PACKAGES for d in public_definitions(package) if d.name == name]
        if not there:
            raise LookupError(f"{definition.name} leaves its arguments to `{name}`, which is not public")
        listed |= documented_arguments(ast.get_docstring(there[0]) or "")
    return listed


def _parameter(definition: Definition, argument: ast.arg, default: ast.expr | None) -> str:
    annotation = f": {definition.text(argument.annotation)}" if argument.annotation else ""
    if default is None:
        return argument.arg + annotation
    equals = " = " if annotation else "="
    return argument.arg + annotation + equals + definition.text(default)


def _list_items(body: str) -> list[str]:
    """Entries of a section: a line at four columns begins one, deeper lines go on."""
    items: list[str] = []
    for line in body.splitlines():
        text = line.strip()
        named = re.match(r"(\*{0,2}\w+(?: \([^)]*\))?): (.*)", text)
        if line.startswith("     ") and items:
            items[-1] += f" {escaped(text)}"
        elif named:
            items.append(f"- `{named[1]}`: {escaped(named[2])}")
        elif items and not items[-1].startswith("- "):
            items[-1] += f" {escaped(text)}"
        else:
            items.append(escaped(text))
    return items


def _listed_names(node: ast.stmt) -> list[str] | None:
    if "__all__" not in _assigned_names(node) or not isinstance(node.value, ast.List):  # pyright: ignore
        return None  # one that is computed lists what a lazy face imports for type checkers
    return list(ast.literal_eval(node.value))  # pyright: ignore


def _assigned_names(node: ast.stmt) -> list[str]:
    targets = (
        node.targets
        if isinstance(node, ast.Assign)
        else [node.target]
        if isinstance(node, ast.AnnAssign)
        else []
    )
    return [target.id for target in targets if isinstance(target, ast.Name)]


def anchors(package: str) -> dict[str, str]:
    """GitHub's anchor of each name's heading: in small letters, numbered where `Search` meets `search`."""
    found: dict[str, str] = {}
    for name in public_names(package):
        before = sum(other.lower() == name.lower() for other in found)
        found[name] = name.lower() + (f"-{before}" if before else "")
    return found


if __name__ == "__main__":
    main()
