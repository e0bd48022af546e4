"""What a setting may be: types with a range, the section that checks them, and how a refusal reads."""

from __future__ import annotations

import difflib
import math
import typing
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Pixels = Annotated[int, Field(gt=0), "be > 0 pixels"]
OrOwn = Annotated[int, Field(ge=0), "be >= 0 (0: own)"]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, lt=math.inf)]
Weight = Annotated[float, Field(ge=0, lt=math.inf)]
Scales = Annotated[
    tuple[Annotated[float, Field(gt=0, le=4)], ...], Field(min_length=1), "hold one or more scales in (0, 4]"
]
"""Types with a range; a text behind it is the law as an error tells it, where the bounds alone do not."""


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


def _refusal(section: type[Section], values: Mapping[str, Any], error: ValidationError) -> Exception:
    """What pydantic found first, as a ValueError or TypeError in the house's form."""
    found = error.errors(include_url=False)[0]
    if found["type"] == "value_error":  # a check of our own, told in its words
        return typing.cast(ValueError, found["ctx"]["error"])
    item, got = str(found["loc"][0]), found["input"]
    prefix = section.__name__.removesuffix("Config").lower()
    known = {field: f"{prefix}.{field}" if prefix else field for field in section.model_fields}
    if item not in known:
        name = f"{prefix}.{item}" if prefix else item
        return ValueError(must("setting", "be one that exists", name) + nearest(name, known.values()))
    name = known[item]
    kind = typing.get_type_hints(section)[item]
    if found["type"] == "literal_error":
        choices = typing.get_args(kind)
        return ValueError(must(name, f"be one of {', '.join(choices)}", got) + nearest(str(got), choices))
    if found["type"] == "tuple_type":
        return TypeError(must(name, f"be a list of {typing.get_args(kind)[0].__name__}", got))
    if found["type"].endswith("_type") or str(got) == "nan":  # a float, but no number
        kind = typing.get_args(kind)[0] if typing.get_origin(kind) is tuple else kind
        return TypeError(must(name, f"be {_KIND_NAMES.get(kind) or f'a {kind.__name__}'}", got))
    return ValueError(must(name, _law(section.model_fields[item].metadata), values[item]))


_KIND_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def _law(metadata: Iterable[Any]) -> str:
    """What a type asks of its values: its own text, else its bounds, as in `lie in (0, 1]`."""
    bounds: dict[str, Any] = {}
    for item in metadata:
        if isinstance(item, str):
            return item
        bounds |= {sign: getattr(item, sign) for sign in _SIGNS if hasattr(item, sign)}
    one_sided = " and ".join(f"{_SIGNS[sign]} {bound}" for sign, bound in bounds.items() if bound != math.inf)
    if math.inf in bounds.values():
        return f"be finite and {one_sided}"
    if len(bounds) == 1:
        return f"be {one_sided}"
    (low, least), (high, most) = sorted(bounds.items(), key=lambda sign: sign[0].startswith("l"))
    return f"lie in {'(' if low == 'gt' else '['}{least}, {most}{')' if high == 'lt' else ']'}"


_SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
