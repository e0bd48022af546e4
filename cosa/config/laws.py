"""What a setting may be: a law in its type, the section that checks it, and how a refusal reads."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError


def law(text: str, holds: Callable[[Any], bool]) -> AfterValidator:
    """Part of a setting's type: what must hold of its value, and how an error tells it (`lie in (0, 1]`)."""

    def check(value: Any) -> Any:
        if not holds(value):
            raise ValueError(text)
        return value

    return AfterValidator(check)


def must(name: str, law: str, got: object) -> str:
    """The house's one form of error; what to do follows behind a semicolon."""
    return f"{name} must {law}, got {got!r}"


class Section(BaseModel):
    """Frozen settings; what breaks a law is refused in the house's form, never in pydantic's."""

    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", str_strip_whitespace=True, use_attribute_docstrings=True
    )

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _refusal(type(self), values, error) from None

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, all checks passed again."""
        return type(self)(**{**dict(self), **changes})


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` with the known name closest to `name`, or the empty string."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if not close:  # `weigth` alone: look for the setting whose last part is meant
        by_tail = {full.rpartition(".")[2]: full for full in names}
        close = [by_tail[tail] for tail in difflib.get_close_matches(name, by_tail, n=1, cutoff=0.6)]
    return f"; did you mean {close[0]!r}?" if close else ""


_KIND_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def _refusal(section: type[Section], values: Mapping[str, Any], error: ValidationError) -> Exception:
    """What pydantic found first, as a ValueError or TypeError in the house's form."""
    found = error.errors(include_url=False)[0]
    if not found["loc"]:  # a check of the whole section, told in its words
        return typing.cast(ValueError, found["ctx"]["error"])
    prefix = section.__name__.removesuffix("Config").lower()

    def dotted(item: str) -> str:
        return f"{prefix}.{item}".removeprefix(".")

    item, got = str(found["loc"][0]), found["input"]
    name, kind = dotted(item), typing.get_type_hints(section).get(item)
    if kind is None:
        known = map(dotted, section.model_fields)
        return ValueError(must("setting", "be one that exists", name) + nearest(name, known))
    if found["type"] == "literal_error":
        choices = typing.get_args(kind)
        return ValueError(must(name, f"be one of {', '.join(choices)}", got) + nearest(str(got), choices))
    if found["type"] == "tuple_type":
        return TypeError(must(name, f"be a list of {typing.get_args(kind)[0].__name__}", got))
    if found["type"].endswith("_type") or str(got) == "nan":  # a float, but no number
        kind = typing.get_args(kind)[0] if typing.get_origin(kind) is tuple else kind
        return TypeError(must(name, f"be {_KIND_NAMES.get(kind) or f'a {kind.__name__}'}", got))
    return ValueError(must(name, str(found["ctx"]["error"]), values[item]))
