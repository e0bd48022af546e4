"""The tables by name: every file of `paper` holds one, and so does a file of yours here or anywhere."""

from __future__ import annotations

import functools
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TypeVar

from cosa.config import nearest
from sweeps.tables.table import Arm, Table, memory_times, opposite, plus, times, without

__all__ = ["Arm", "Table", "memory_times", "opposite", "plus", "times", "without"]

Kind = TypeVar("Kind")


@functools.cache
def tables() -> Mapping[str, Table]:
    """Every table of this folder and of `paper` by name, in the names' order.

    Raises:
        ValueError: A file holds no valid table, or two hold one of the same name.
    """
    files = (path for folder in __path__ for path in Path(folder).rglob("*.py"))
    found = [read_table(path) for path in files if path.stem not in {"__init__", "metrics", "table"}]
    return types.MappingProxyType(_by_name(sorted(found, key=lambda table: table.name)))


def get_table(name: str) -> Table:
    """The table called `name`.

    Raises:
        ValueError: There is none of that name; the nearest one is suggested.
    """
    if name not in tables():
        raise ValueError(
            f"table must be one of {', '.join(tables())}, all, or a file of your own such as my_table.py, "
            f"got {name!r}{nearest(name, [*tables(), 'all'])}"
        )
    return tables()[name]


def get_tables(names: Sequence[str]) -> list[Table]:
    """Tables by name, by file (`my_table.py`), or `all` of this folder; each once, in this order.

    Raises:
        ValueError: An unknown name, a file without a valid table, or two tables of one name.
        FileNotFoundError: A file that is not there.
    """
    found: list[Table] = []
    for name in dict.fromkeys(names):
        if name == "all":
            found += tables().values()
        else:
            found.append(read_table(Path(name)) if name.endswith(".py") else get_table(name))
    return list(_by_name(found).values())


def _by_name(found: Iterable[Table]) -> dict[str, Table]:
    named: dict[str, Table] = {}
    for table in found:
        if named.setdefault(table.name, table) != table:
            raise ValueError(
                f"tables must have names of their own, got two called {table.name!r}; rename one"
            )
    return named


def read_table(path: Path) -> Table:
    """The TABLE of a Python file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It does not run, or holds no valid table.
    """
    if not path.is_file():
        raise FileNotFoundError(f"table file must exist, got {str(path)!r}")
    return read_file(path.resolve(), Table)


@functools.cache
def _run(path: Path, kind: str) -> Mapping[str, object]:
    """What a user's file holds: run once, so that a table is the same one however often it is named."""
    content: dict[str, object] = {"__name__": path.stem, "__file__": str(path)}
    try:
        exec(compile(path.read_bytes(), path, "exec", dont_inherit=True), content)  # noqa: S102 (the user's own file)
    except Exception as error:
        raise ValueError(
            f"{kind} file must run, got {_explained(error, content)} in {str(path)!r}"
        ) from error
    return content


def read_file(path: Path, kind: type[Kind]) -> Kind:
    """The `TABLE = Table(...)` of the Python file `path`, or what else it is, called as its class is.

    Raises:
        ValueError: It does not run, or holds nothing of the kind.
    """
    name = kind.__name__
    found = _run(path, name.lower()).get(name.upper())
    if not isinstance(found, kind):
        raise ValueError(
            f"{name.lower()} file must hold {name.upper()} = {name}(...), got {type(found).__name__} in "
            f"{str(path)!r}"
        )
    return found


def _explained(error: Exception, content: Mapping[str, object]) -> str:
    """What is wrong in one line; a keyword that a class does not have is told the nearest one."""
    word = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    known = [item.name for value in content.values() if is_dataclass(value) for item in fields(value)]
    hint = nearest(word[1], known) if word and "Did you mean" not in str(error) else ""
    return f"{type(error).__name__}: {error}{hint}"
