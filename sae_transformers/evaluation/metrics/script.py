"""A metric as one Python file that needs nothing of this library: its class and whatever that uses, as it is written.

The file is made of the sources: the class, the functions, classes and constants that it names, what these name, and
so on, each before what uses it, and the imports of other packages. So the mathematics is written in one place, and the
file does what the library does.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

LIBRARY = __name__.split(".")[0]


class Script(NamedTuple):
    """source: of the file. packages: that it imports and that do not come with Python, sorted."""

    source: str
    packages: tuple[str, ...]


class _Import(NamedTuple):
    """module: where a name is from, absolute. name: what it is called there; None for the module itself."""

    module: str
    name: str | None

    @property
    def package(self) -> str:
        return self.module.split(".")[0]

    @property
    def ours(self) -> bool:
        return self.package == LIBRARY


class _Module(NamedTuple):
    """lines: of its source. statements: name -> the statement that makes it. imports: name -> its source."""

    lines: list[str]
    statements: dict[str, ast.stmt]
    imports: dict[str, _Import]

    def has(self, name: str) -> bool:
        return name in self.statements or name in self.imports


def self_contained(kind: type, docstring: str, closing: str = "") -> Script:
    """The file of a class.

    Args:
        kind: a class at the top of a module.
        docstring: what the file says of itself.
        closing: its last lines.

    Raises:
        ValueError: two things of one name are needed under that name, or a whole module of the library is.
    """
    collected = _Collected()
    collected.add(kind.__module__, kind.__name__)
    packages = {one.package for one in collected.imports.values()} - set(sys.stdlib_module_names)
    parts = [f'"""{docstring}"""', "from __future__ import annotations", _lines(collected.imports), *collected.parts]
    return Script("\n\n".join([*parts, *([closing] if closing else [])]) + "\n", tuple(sorted(packages)))


class _Collected:
    """What a file is made of, in order."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.imports: dict[str, _Import] = {}
        self.told: set[str] = set()  # imported names that only annotations use
        self.made: dict[int, tuple[str, str]] = {}  # statements that are in the file: module and name
        self.owner: dict[str, str] = {}  # name in the file -> the module that it means
        self.by_name: set[tuple[str, str]] = set()  # what is used under its own name

    def add(self, module: str, name: str, alias: str = "") -> None:
        """A name of a module with all that it needs; under another name where it is imported so."""
        alias, read = alias or name, _read(module)
        if name in read.imports:
            source = read.imports[name]
            if not source.ours:
                self._import(alias, source)
            elif source.name is None or not _read(source.module).has(source.name):
                raise ValueError(
                    f"A file can hold what a module defines, and no module. Received: {alias!r} in {module}, "
                    f"which is {'.'.join(filter(None, source))}."
                )
            else:
                self.add(source.module, source.name, alias)
            return
        if name not in read.statements:  # of Python itself, or of a function
            return
        if alias == name:
            self.by_name.add((module, name))
        statement = read.statements[name]
        if id(statement) not in self.made:
            self.made[id(statement)] = module, name
            running, told = _names(statement)
            for used in sorted(running):
                if used != name:
                    self.add(module, used)
            for used in sorted(told - running):  # in annotations, which are not run: of other packages alone
                if used in read.imports and not read.imports[used].ours:
                    self._import(used, read.imports[used], told=True)
            for made in _made_by(statement):
                former = self.owner.setdefault(made, module)
                if former != module and (former, made) in self.by_name:
                    raise ValueError(
                        f"{made!r} of {former} and of {module} cannot be in one file. Rename one of them."
                    )
                self.owner[made] = module
            self.parts.append(_source(read, statement))
        if alias != name:
            self.parts.append(f"{alias} = {name}")

    def _import(self, alias: str, source: _Import, told: bool = False) -> None:
        former = self.imports.get(alias, source)
        if former != source and told:
            return
        if former != source and alias not in self.told:
            raise ValueError(f"{alias!r} of {former.module} and of {source.module} cannot be in one file. Rename one.")
        if not told:
            self.told.discard(alias)
        elif alias not in self.imports:
            self.told.add(alias)
        self.imports[alias] = source


@cache
def _read(module: str) -> _Module:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ValueError(f"A metric must be in a file of Python. Received: module {module!r}.")
    text = Path(spec.origin).read_text(encoding="utf-8")
    package = module if spec.submodule_search_locations is not None else module.rpartition(".")[0]
    statements: dict[str, ast.stmt] = {}
    imports: dict[str, _Import] = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.ImportFrom) and node.module != "__future__":
            source = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            imports.update({one.asname or one.name: _Import(source, one.name) for one in node.names})
        elif isinstance(node, ast.Import):
            imports.update({one.asname or one.name.split(".")[0]: _Import(one.name, None) for one in node.names})
        else:
            statements.update(dict.fromkeys(_made_by(node), node))
    return _Module(text.splitlines(), statements, imports)


def _made_by(node: ast.stmt) -> list[str]:
    """Names that a statement at the top of a module makes."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    targets = (
        node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    )
    return [one.id for target in targets for one in ast.walk(target) if isinstance(one, ast.Name)]


def _names(node: ast.AST) -> tuple[set[str], set[str]]:
    """Names that a statement reads when it runs, and those of its annotations."""
    running: set[str] = set()
    told: set[str] = set()

    def visit(one: ast.AST, annotates: bool) -> None:
        if isinstance(one, ast.Name):
            (told if annotates else running).add(one.id)
        for field, child in _children(one):
            visit(child, annotates or field in ("annotation", "returns"))

    visit(node, False)
    return running, told


def _children(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield field, child


def _source(module: _Module, node: ast.stmt) -> str:
    first = min([node.lineno, *(one.lineno for one in getattr(node, "decorator_list", []))])
    return "\n".join(module.lines[first - 1 : node.end_lineno])


def _lines(imports: Mapping[str, _Import]) -> str:
    """Lines of imports: those of Python itself, then the others."""
    whole, parts = [], {}
    for alias, one in sorted(imports.items()):
        own = one.package in sys.stdlib_module_names
        if one.name is None:
            renamed = f" as {alias}" if alias != one.module else ""
            whole.append((not own, one.module, f"import {one.module}{renamed}"))
        else:
            renamed = f" as {alias}" if alias != one.name else ""
            parts.setdefault((not own, one.module), []).append(one.name + renamed)
    whole += [(*key, f"from {key[1]} import {', '.join(names)}") for key, names in parts.items()]
    return "\n".join(line for _, _, line in sorted(whole))
