"""What a table is: arms, each a handful of changed settings, and the metrics to show beside published values.

Published values are percent, exactly as printed; a cell that cannot be read in the paper is left out.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cosa.config import Config, fields, flatten, nearest
from sweeps.tables.metrics import METRICS, STANDARD

WITHOUT: Mapping[str, Mapping[str, Any]] = types.MappingProxyType(
    {
        "GC": {"s2c.source": "none"},
        "SA": {"cam.source": "online"},
        "RAW": {"raw.enabled": False},
        "CSC": {"csc.weight": 0.0},
        "DT": {"threshold.mode": "fixed"},
    }
)
"""What takes one component out of the full model, in the paper's order of the components."""


_NAME = re.compile(r"[^\W_][\w.+=-]*")
"""Names go into file names, MLflow searches and terminals: nothing in them means anything there."""


def without(*components: str) -> dict[str, Any]:
    """The changes that take `components` out of the full model.

    Both c2s terms of Eq. 11 belong to no component, so every arm keeps `c2s.aux` and the weights as its
    preset has them; the fixed threshold of an arm without DT is the preset's `threshold.xi`.
    """
    return {name: value for component in components for name, value in WITHOUT[component].items()}


@dataclass(frozen=True)
class Relative:
    """A value that an arm takes from the preset's own, so that its row makes sense on every preset."""

    law: Callable[[float], float]

    def of(self, value: float) -> float:
        """0.3 of 0.45 less 0.15, where their difference is 0.30000000000000004."""
        found = self.law(value)
        return found if isinstance(found, bool) else round(found, 9)  # what is infinite stays so


def times(factor: float) -> Relative:
    """The preset's own value times `factor`."""
    return Relative(lambda value: value * factor)


def plus(amount: float) -> Relative:
    """The preset's own value plus `amount`."""
    return Relative(lambda value: value + amount)


def opposite() -> Relative:
    """True where the preset's own value is false, and the other way round."""
    return Relative(lambda value: not value)


def memory_times(factor: float) -> Relative:
    """The momentum whose average reaches `factor` times as far back as the preset's own.

    An exponential moving average of momentum m reaches back about 1 / (1 - m) steps, so what a momentum does
    depends on how long a run is; the factor does not. An infinite one freezes the average: m = 1.
    """
    return Relative(lambda value: 1 - (1 - value) / factor)


@dataclass(frozen=True)
class Arm:
    """One row: the full model with some settings changed."""

    name: str
    """Short name of letters, digits and . _ + - =; unique in its table."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Settings by dotted name, their values plain or relative; they win over the preset and over `--set`."""
    paper: Mapping[str, float] = field(default_factory=dict)
    """Published values in percent, by column."""

    def has(self, component: str) -> bool:
        """Whether the row has a check mark under `component`."""
        return any(self.changes.get(name) != value for name, value in WITHOUT[component].items())


@dataclass(frozen=True, kw_only=True)
class Table:
    """One table or figure, its rows in the paper's order."""

    name: str
    """The paper's number, `3a` or `fig1`, or a name of your own."""
    title: str
    """What the table shows."""
    arms: tuple[Arm, ...]
    reference: str = "full"
    """The arm that differences are taken to."""
    metrics: tuple[str, ...] = STANDARD
    """Metrics of ours, by key; the first two have their difference to the reference beside them."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Columns of published values, each with the metric of ours that it is to be held against."""
    protocol: str = ""
    """What the published values were measured on, and how."""
    components: tuple[str, ...] = ()
    """Columns of check marks; keys of WITHOUT."""
    settings: tuple[str, ...] = ()
    """Settings whose values are columns: what each row was trained with."""
    note: str = ""
    """What a reader must know about the rows, such as one that is illegible in the paper."""

    def __post_init__(self) -> None:
        counts = Counter(arm.name for arm in self.arms)
        for what, own_names in (("table", [self.name]), (f"arm of table {self.name!r}", [*counts])):
            for name in own_names:
                if not _NAME.fullmatch(name):
                    raise ValueError(
                        f"{what} must have a name of letters, digits and . _ + - = that begins with a letter "
                        f"or digit, got {name!r}; rename it"
                    )
        for name, count in counts.items():
            if count > 1:
                raise ValueError(f"table {self.name} must name each arm once, got {name!r} twice; rename one")
        if self.reference not in counts:
            raise ValueError(
                f"table {self.name} must hold its reference arm, got {self.reference!r}"
                f"{nearest(self.reference, counts) or '; add it'}"
            )
        if not self.metrics:
            raise ValueError(f"table {self.name} must show a metric, got none; {STANDARD[0]!r} is one")
        known: list[tuple[str, Iterable[str], Collection[str]]] = [
            ("metric", self.metrics, METRICS),
            ("component", self.components, WITHOUT),
            ("setting", self.settings, fields()),
            ("metric of a published column", self.columns.values(), self.metrics),
            *((f"setting of arm {arm.name}", arm.changes, fields()) for arm in self.arms),
        ]
        for what, names, all_names in known:
            for name in names:
                if name not in all_names:
                    raise ValueError(
                        f"{what} in table {self.name} must be one that exists, got {name!r}"
                        f"{nearest(name, all_names)}"
                    )
        for arm in self.arms:
            if extra := set(arm.paper) - set(self.columns):
                raise ValueError(
                    f"published values of {self.name}/{arm.name} must stand under {tuple(self.columns)}, "
                    f"got {extra}"
                )

    @property
    def heading(self) -> str:
        """`Table 3a: ...` or `Fig. 9: ...`."""
        figure = self.name.removeprefix("fig")
        number = f"Fig. {figure}" if figure != self.name and figure.isdigit() else f"Table {self.name}"
        return f"{number}: {self.title}"

    def arm(self, name: str) -> Arm:
        """The arm called `name`."""
        return next(arm for arm in self.arms if arm.name == name)

    def resolved(self, base: Config) -> Table:
        """The table with every relative value worked out for `base`."""
        own = flatten(base)
        arms = []
        for arm in self.arms:
            changes = {n: v.of(own[n]) if isinstance(v, Relative) else v for n, v in arm.changes.items()}
            arms.append(dataclasses.replace(arm, changes=changes))
        return dataclasses.replace(self, arms=tuple(arms))

    def to_dict(self) -> dict[str, Any]:
        """A resolved table as what JSON can hold; `from_dict` reads it back."""
        content = dataclasses.asdict(self)
        for arm in content["arms"]:  # JSON has no infinity; settings are parsed from text as well
            infinite = [name for name, value in arm["changes"].items() if value == math.inf]
            arm["changes"] = {**arm["changes"], **dict.fromkeys(infinite, "inf")}
        return content


def from_dict(content: Mapping[str, Any]) -> Table:
    """The table that `to_dict` wrote."""
    tuples = {name: tuple(content[name]) for name in ("metrics", "components", "settings")}
    return Table(**{**content, **tuples, "arms": tuple(Arm(**arm) for arm in content["arms"])})
