"""The threshold search, one activation after the other, straight from Eq. (6) in its logarithmic reading."""

from __future__ import annotations

import math
from collections.abc import Sequence


def slow_log_likelihood(
    xi: float,
    activations: Sequence[float],
    background: tuple[float, float, float],
    foreground: tuple[float, float, float],
) -> float:
    """log-likelihood of splitting the activations at xi; a Gaussian is (pi, mu, var)."""
    return sum(_log_joint(x, foreground if x >= xi else background) for x in activations)


def slow_search(
    activations: Sequence[float],
    background: tuple[float, float, float],
    foreground: tuple[float, float, float],
    candidates: Sequence[float],
) -> float:
    """The candidate of the highest likelihood."""
    return max(candidates, key=lambda xi: slow_log_likelihood(xi, activations, background, foreground))


def _log_joint(x: float, gaussian: tuple[float, float, float]) -> float:
    pi, mu, var = gaussian
    return math.log(pi) - (x - mu) ** 2 / (2 * var) - math.log(2 * math.pi * var) / 2
