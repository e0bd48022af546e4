"""One number over several seeds: its mean, its deviation, its difference to another."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

LEAST_PAIRS = 3
"""Seeds that two arms must share before their difference is tested."""


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

    @property
    def p_value(self) -> float:
        """Of differences between pairs: how likely a mean this far from 0 is if there is none, two-sided.

        A paired t-test, since Wilcoxon's cannot fall below 0.05 with fewer than six pairs. It takes the
        differences to be normal. NaN below LEAST_PAIRS, where it could tell hardly anything.
        """
        count = len(self.values)
        if count < LEAST_PAIRS:
            return math.nan
        if self.deviation == 0:
            return 1.0 if self.mean == 0 else 0.0
        from scipy.special import stdtr

        t = self.mean / (self.deviation / math.sqrt(count))
        return float(2 * stdtr(count - 1, -abs(t)))

    def minus(self, other: Cell) -> Cell:
        """Differences seed by seed, where both have one."""
        return Cell({seed: v - other.values[seed] for seed, v in self.values.items() if seed in other.values})
