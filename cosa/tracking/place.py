"""Where a store is: tracking URIs, their passwords masked, and the one line for a store that fails."""

from __future__ import annotations

import shlex
from pathlib import Path

from cosa.storage.files import mask

DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
"""The databases that MLflow writes to directly, with the port each listens on where the URI names none."""


class TrackingError(RuntimeError):
    """The tracking store cannot be used; the message is one line that says where and what to do."""


class RunGoneError(TrackingError):
    """The store answers but has the run no more."""


def resolve_uri(uri: str) -> str:
    """`uri` with a relative SQLite path made absolute, since workers run in folders of their own.

    Raises:
        ValueError: The URI names no kind of store that MLflow 3 still writes to.
    """
    scheme, separator, rest = uri.partition(":")
    dialect = scheme.partition("+")[0]
    if not separator or dialect not in {"sqlite", "http", "https", "databricks", *DATABASE_PORTS}:
        raise ValueError(
            f"tracking URI must start with sqlite:///, http:// or https:// (or name another database), "
            f"got {mask(uri)!r}; a file works as 'sqlite:///runs/mlflow.db'"
        )
    if dialect != "sqlite":
        return uri
    path = rest.removeprefix("///")
    if not rest.startswith("///") or not path:
        raise ValueError(
            f"tracking URI must name a file, got {uri!r}; write sqlite:///relative.db or sqlite:////full/path.db"
        )
    return f"{scheme}:///{Path(path).expanduser().absolute()}"


def sqlite_path(uri: str) -> Path:
    """The file of a SQLite store."""
    return Path(uri.partition(":///")[2].partition("?")[0])


def ui_hint(uri: str) -> str:
    """How to look at the runs: the command for a store in a file or database, the address of a server."""
    resolved = mask(resolve_uri(uri))
    if resolved.startswith("http"):
        return resolved
    return f"mlflow ui --backend-store-uri {shlex.quote(resolved)}"


def require_name(what: str, name: str) -> None:
    """Refuse a name that cannot be shown in one line, or that would steer the terminal that shows it.

    Raises:
        ValueError: It holds a line's end, or another character without a picture.
    """
    if not name.isprintable():
        raise ValueError(f"{what} must be one line of visible characters, got {name!r}; choose another name")
