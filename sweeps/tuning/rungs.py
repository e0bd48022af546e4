"""When a trial of a search is judged on its way, and which trials go on: asynchronous successive halving.

Pure. A rung is a step of co-training at which every trial is evaluated. A trial goes on where it is among the
better two thirds of all that have reached the same rung so far; nobody waits for the others.

Why so late and so few: a rung tells who is far off, not who is best. Over runs of whole length Spearman's
rank correlation between label-free mIoU on the way and at the end was, on `shapes`, 0.61 at two thirds of
co-training over 28 rows of all tables, but 0.07 over the better 15 of them; 0.38 at half over eight arms of
Table 3; on `voc_tiny` -0.64 at half over seven arms, which ended within 0.6 points. Every search measures it
anew (`search_agreement.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cosa.config import TrainConfig

FRACTIONS = (1 / 2,)
"""Of co-training, where the rungs are. At half or a little later the presets' own evaluations serve."""
REDUCTION = 3
"""One of so many is stopped. With a rank correlation of 0.38, the best of 30 is in the worse half at a rung
one time in five, in the worst third one in ten."""
LEAST = 4
"""Trials that must have reached a rung before any is stopped there."""
_SLACK = 1 / 5
"""Of co-training: how much later than its fraction a rung may be, so that evaluations stay where they are."""


@dataclass(frozen=True)
class Rungs:
    """Where trials are judged on their way."""

    steps: tuple[int, ...]
    """Rising, before the last step of all; none where co-training is too short to be judged on its way."""
    every: int
    """What `evaluation.every` must be, so that every rung is evaluated."""


def choose_rungs(train: TrainConfig, every: int) -> Rungs:
    """Rungs at the FRACTIONS of co-training, or a little later.

    Args:
        train: The schedule; its warm-up must end before it does.
        every: The preset's `evaluation.every`. It is kept where its evaluations serve, else the next smaller
            divisor of the iterations is taken that does.
    """
    cotraining = train.iterations - train.warmup
    if cotraining < 1:
        raise ValueError(
            f"train.warmup must end before train.iterations = {train.iterations}, got {train.warmup}; "
            f"a search is over what co-training does"
        )
    wanted = [train.warmup + math.ceil(cotraining * fraction) for fraction in FRACTIONS]
    divisors = [d for d in range(min(every, train.iterations), 0, -1) if train.iterations % d == 0]
    for spacing in [every, *divisors]:
        steps = tuple(math.ceil(step / spacing) * spacing for step in wanted)
        late = max(step - asked for step, asked in zip(steps, wanted, strict=True))
        if len(set(steps)) == len(steps) and steps[-1] < train.iterations and late <= cotraining * _SLACK:
            return Rungs(steps, spacing)
    return Rungs((), every)


@dataclass(frozen=True)
class Decision:
    """What became of a trial at a rung."""

    step: int
    value: float
    rank: int
    """Its place among those at the rung by then, 1 being the best."""
    of: int
    """How many those were, itself among them."""
    kept: bool


def decide(step: int, value: float, others: Sequence[float], *, protected: bool = False) -> Decision:
    """Whether a trial goes on beyond a rung.

    Args:
        step: The rung.
        value: Its metric there, higher being better; NaN is worse than everything.
        others: The metric of all others that were at the rung before it.
        protected: It goes on in any case: the preset itself, which all are held against.
    """
    mark = -math.inf if math.isnan(value) else value
    rank = 1 + sum(other > mark for other in others)
    count = len(others) + 1
    kept = protected or count < LEAST or rank <= count - count // REDUCTION
    return Decision(step, value, rank, count, kept)
