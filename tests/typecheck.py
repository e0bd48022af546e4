"""The type checker that conftest has jaxtyping apply to every function, method and dataclass of cosa."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeDecorHintPep673Exception

_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int where a float is asked for is fine


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """beartype, but for methods that speak of `Self`.

    jaxtyping decorates methods one by one, and beartype knows `Self` only where it decorates the class.
    """
    try:
        return _beartype(function)
    except BeartypeDecorHintPep673Exception:
        return function
