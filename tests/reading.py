"""The source as the tests of the house read it: its modules, what they import, what they say."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
COSA = sorted((ROOT / "cosa").rglob("*.py"))
SWEEPS = sorted((ROOT / "sweeps").rglob("*.py"))


def module_name(path: Path) -> str:
    """Dotted name of a source file."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path) for path in COSA + SWEEPS}


def imports(source: str) -> Iterator[str]:
    """Dotted names a module imports, at its top or late, inside functions or for type checkers alone."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=str(module), names=names):
                for alias in names:
                    full = f"{module}.{alias.name}"
                    yield full if full in MODULES else module
            case ast.Call(
                func=ast.Name(id="import_module") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield name


def packages(path: Path) -> set[str]:
    """Top-level packages a file imports."""
    return {name.partition(".")[0] for name in imports(path.read_text())}


def docstrings(path: Path) -> Iterator[str]:
    """Docstrings of a file, of its classes and functions, each as one line."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            yield " ".join((ast.get_docstring(node) or "").split())
