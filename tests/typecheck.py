"""The type checker that conftest has jaxtyping apply to every function, method and dataclass of cosa."""

from __future__ import annotations

import ast
import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeDecorHintPep673Exception

_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int where a float is asked for is fine


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """beartype, but for methods that speak of `Self`.

    jaxtyping decorates methods one by one, and beartype knows `Self` only where it decorates the class. What
    a module imports for mypy alone, because its import takes long, may be anything.
    """
    for name in _imported_for_mypy(function.__module__):
        vars(sys.modules[function.__module__]).setdefault(name, Any)
    try:
        return _beartype(function)
    except BeartypeDecorHintPep673Exception:
        return function


@functools.cache
def _imported_for_mypy(module: str) -> list[str]:
    """Names that a module imports under `if TYPE_CHECKING:`."""
    blocks = [
        node
        for node in ast.parse(inspect.getsource(sys.modules[module])).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    imports = [line for block in blocks for line in block.body if isinstance(line, ast.ImportFrom)]
    return [alias.asname or alias.name for line in imports for alias in line.names]
