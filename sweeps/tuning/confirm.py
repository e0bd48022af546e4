"""What a search found, confirmed: its best trials and the preset trained again with fresh seeds.

The best of many noisy values is partly the luckiest one. Only values of seeds that played no part in the
choice say how good the chosen settings are. They say nothing of another bias: all is judged on the same
validation images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cosa.config import Config
from sweeps.planning.plan import Plan, Trial, make_plan
from sweeps.reporting.cells import Cell
from sweeps.tables import Arm, Table
from sweeps.tables.metrics import SEG_MIOU, SEG_MIOU_LABELLED
from sweeps.tuning.record import PRESET, Record

TABLE = "confirm"
"""Name of the table of confirmations."""


@dataclass(frozen=True)
class Outcome:
    """What was run."""

    best: tuple[Record, ...]
    """Trials to be confirmed."""
    plan: Plan | None
    """Their confirmation; None without one."""
    failures: Mapping[str, str]
    """Runs of the confirmation that did not finish, by name, with the reason in one line."""
    spent: str
    """What the search has cost, in words."""


@dataclass(frozen=True)
class Confirmed:
    """A trial of the search and what fresh seeds make of its settings."""

    record: Record | None
    """None for a preset that the search itself did not finish."""
    changes: Mapping[str, Any]
    """The settings that it changes in the preset."""
    free: Cell
    """The search's metric, by fresh seed."""
    labelled: Cell
    """The labelled mIoU, by fresh seed."""

    @property
    def is_preset(self) -> bool:
        """Whether it is what all others are held against."""
        return self.record is None or self.record.origin == PRESET

    @property
    def label(self) -> str:
        """`trial 12`, or `preset`."""
        return "preset" if self.record is None or self.is_preset else f"trial {self.record.label}"

    @property
    def searched(self) -> float:
        """The metric in the search; NaN where it was not finished there."""
        return math.nan if self.record is None else self.record.value

    @property
    def excess(self) -> float:
        """How far the search's value is above the confirmed mean."""
        return self.searched - self.free.mean


def best_of(records: Sequence[Record], most: int) -> list[Record]:
    """The best finished trials, the preset itself apart, the best one first."""
    finished = [r for r in records if r.state == "complete" and r.origin != PRESET]
    ranked = sorted(finished, key=lambda record: (-record.value, record.number))
    distinct = {tuple(sorted(record.changes.items())): record for record in reversed(ranked)}
    return sorted(distinct.values(), key=lambda record: (-record.value, record.number))[:most]


def plan_confirmation(best: Sequence[Record], base: Config, seeds: int) -> Plan:
    """Runs of the best trials' settings, and of the preset, with seeds that the search did not use."""
    arms = (Arm(PRESET), *(Arm(_arm(record), dict(record.changes)) for record in best))
    table = Table(
        name=TABLE, title="The best trials with fresh seeds", arms=arms, metrics=(SEG_MIOU, SEG_MIOU_LABELLED)
    )
    first = base.train.seed + 1
    return make_plan(base, [table], range(first, first + seeds))


def confirmed(
    records: Sequence[Record],
    best: Sequence[Record],
    plan: Plan,
    read: Callable[[Trial], Mapping[str, Any] | None],
) -> list[Confirmed]:
    """What fresh seeds make of the preset and the best trials, in the order of their confirmed means.

    Args:
        records: Of the search.
        best: Trials that were to be confirmed.
        plan: Their confirmation.
        read: A trial's result, or None where it is not finished.
    """
    values: dict[str, dict[int, Mapping[str, float]]] = {}
    for trial in plan.trials:
        result = read(trial) if trial.kind == "trial" else None
        if result is not None:
            for row in trial.arms:
                values.setdefault(row.partition("/")[2], {})[trial.seed] = result["metrics"]
    preset = next((r for r in records if r.origin == PRESET and r.state == "complete"), None)
    found = []
    for name, record in ((PRESET, preset), *((_arm(record), record) for record in best)):
        cells = [
            Cell({seed: metrics[key] for seed, metrics in values.get(name, {}).items() if key in metrics})
            for key in (SEG_MIOU, SEG_MIOU_LABELLED)
        ]
        changes = dict(record.changes) if record and name != PRESET else {}
        found.append(Confirmed(record, changes, *cells))
    return sorted(found, key=lambda one: -one.free.mean if one.free.values else math.inf)


def _arm(record: Record) -> str:
    return f"trial-{record.number}"
