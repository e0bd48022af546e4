"""How far the order of trials on their way agrees with that at the end: whether a rung can judge at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LEAST = 10
"""Finished trials; the rank correlation of fewer says nothing."""


@dataclass(frozen=True)
class Agreement:
    """What an evaluation on the way says of the end, over finished trials."""

    step: int
    count: int
    """Trials."""
    correlation: float
    """Spearman's, of the metric there with the metric at the end: 1 for the same order, 0 for chance."""
    among_best: float | None
    """The same among the better half at the end; None where these are fewer than LEAST."""


def agreements(trials: Sequence[tuple[Mapping[int, float], float]]) -> list[Agreement]:
    """How far each evaluation on the way agrees with the end; nothing of one that too few trials have.

    Args:
        trials: Of each finished trial the metric by step on the way, and at its end.
    """
    found = []
    for step in sorted({step for values, _ in trials for step in values}):
        pairs = [(values[step], end) for values, end in trials if step in values]
        best = sorted(pairs, key=lambda pair: -pair[1])[: len(pairs) // 2]
        if len(pairs) >= LEAST:
            among_best = _correlation(best) if len(best) >= LEAST else None
            found.append(Agreement(step, len(pairs), _correlation(pairs), among_best))
    return found


def _correlation(pairs: Sequence[tuple[float, float]]) -> float:
    """Spearman's; 0 where one side does not vary."""
    from scipy.stats import rankdata  # a second of imports

    before, after = (rankdata(side) for side in zip(*pairs, strict=True))
    before, after = before - before.mean(), after - after.mean()
    scale = float((before @ before) * (after @ after)) ** 0.5
    return float(before @ after) / scale if scale else 0.0


def told(found: Sequence[Agreement], last: int, rungs: Sequence[int]) -> list[str]:
    """In sentences, rungs named as such."""
    return [
        f"At {'the rung of ' if one.step in rungs else ''}{one.step:,} of {last:,} iterations the order of "
        f"{one.count} finished trials agrees with their last one by {one.correlation:.2f}"
        + (f", among the better half of them by {one.among_best:.2f}" if one.among_best is not None else "")
        + " (Spearman's rank correlation: 1 is the same order, 0 is chance)."
        for one in found
    ]
