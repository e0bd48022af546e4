"""One number over several seeds: its mean, its deviation, its difference to another."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Cell:
    """One metric of one arm over its seeds."""

    values: Mapping[int, float]
    """By seed; fractions, or differences of fractions."""

    @property
    def mean(self) -> float:
        """Over seeds; NaN without any."""
        return statistics.fmean(self.values.values()) if self.values else math.nan

    @property
    def deviation(self) -> float:
        """Sample standard deviation over seeds; NaN below two."""
        return statistics.stdev(self.values.values()) if len(self.values) > 1 else math.nan

    def minus(self, other: Cell) -> Cell:
        """Differences seed by seed, where both have one."""
        return Cell({seed: v - other.values[seed] for seed, v in self.values.items() if seed in other.values})
