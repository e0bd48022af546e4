"""What a table of the paper is: arms, each a handful of changed settings, with their published values.

Published values are percent, exactly as printed; a cell that cannot be read in the paper is left out.
"""

from __future__ import annotations

import types
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

WITHOUT: Mapping[str, Mapping[str, Any]] = types.MappingProxyType(
    {
        "GC": {"s2c.weight": 0.0},
        "SA": {"cam.source": "online"},
        "RAW": {"raw.enabled": False},
        "CSC": {"csc.weight": 0.0},
        "DT": {"threshold.mode": "fixed"},
    }
)
"""What takes one component out of the full model, in the paper's order of the components."""


def without(*components: str) -> dict[str, Any]:
    """The changes that take `components` out of the full model.

    Both c2s terms of Eq. 11 belong to no component, so every arm keeps `c2s.aux` and the weights as its
    preset has them; the fixed threshold of an arm without DT is the preset's `threshold.xi`.
    """
    return {name: value for component in components for name, value in WITHOUT[component].items()}


@dataclass(frozen=True)
class Arm:
    """One row: the full model with some settings changed."""

    name: str
    """Short name without spaces; unique in its table."""
    changes: Mapping[str, Any]
    """Settings by dotted name; they win over the preset and over `--set`."""
    paper: Mapping[str, float]
    """Published values in percent, by column."""

    def has(self, component: str) -> bool:
        """Whether the row has a check mark under `component`."""
        return any(self.changes.get(name) != value for name, value in WITHOUT[component].items())


@dataclass(frozen=True)
class Table:
    """One table of the paper, its rows in the paper's order."""

    name: str
    """The paper's number, `3a`."""
    title: str
    """What the table shows."""
    metric: str
    """The metric that the published values are to be held against."""
    columns: tuple[str, ...]
    """Columns of published values."""
    components: tuple[str, ...]
    """Columns of check marks; keys of WITHOUT."""
    reference: str
    """The arm that differences are taken to."""
    arms: tuple[Arm, ...]

    def __post_init__(self) -> None:
        counts = Counter(arm.name for arm in self.arms)
        twice = [name for name, count in counts.items() if count > 1]
        if twice:
            raise ValueError(f"table {self.name} must name each arm once, got {twice[0]!r} twice; rename one")
        spaced = [name for name in counts if not name or any(c in name for c in " /")]
        if spaced:
            raise ValueError(
                f"arm of table {self.name} must have a name without ' ' and '/', got {spaced[0]!r}"
            )
        if self.reference not in counts:
            raise ValueError(f"table {self.name} must hold its reference arm, got {self.reference!r}; add it")
        for arm in self.arms:
            extra = set(arm.paper) - set(self.columns)
            if extra:
                raise ValueError(
                    f"published values of {self.name}/{arm.name} must stand under {self.columns}, got {extra}"
                )

    def arm(self, name: str) -> Arm:
        """The arm called `name`."""
        return next(arm for arm in self.arms if arm.name == name)
