"""What a search found, confirmed: its best trials and the preset with fresh seeds, and the maximum's bias.

The best of many noisy values is partly the luckiest one. Only values of seeds that played no part in the
choice say how good the chosen settings are. They say nothing of another bias: all is judged on the same
validation images.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cosa.config import Config, flatten, override
from sweeps.cells import Cell
from sweeps.plan import Plan, Trial, make_plan
from sweeps.search_record import PRESET, Record
from sweeps.tables import Arm, Table
from sweeps.tables.metrics import FREE, LABELLED

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
    def label(self) -> str:
        """`trial 12`, or `preset`."""
        preset = self.record is None or self.record.origin == PRESET
        return "preset" if preset or self.record is None else f"trial {self.record.label}"

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
    table = Table(name=TABLE, title="The best trials with fresh seeds", arms=arms, metrics=(FREE, LABELLED))
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
            for key in (FREE, LABELLED)
        ]
        changes = dict(record.changes) if record and name != PRESET else {}
        found.append(Confirmed(record, changes, *cells))
    return sorted(found, key=lambda one: -one.free.mean if one.free.values else math.inf)


def _arm(record: Record) -> str:
    return f"trial-{record.number}"


def verdict(found: Sequence[Confirmed]) -> list[str]:
    """What the confirmation says, in sentences with numbers; nothing where nothing was confirmed."""
    whole = [one for one in found if one.free.values]
    tried = [one for one in whole if one.label != "preset"]
    preset = next((one for one in whole if one.label == "preset"), None)
    if not tried:
        return []
    first = max(tried, key=lambda one: one.searched)
    seeds = len(first.free.values)
    top = preset is None or not preset.searched > first.searched
    maximum = (
        f"The search's maximum{'' if top else ' besides the preset'}, {first.label}, had "
        f"{_percent(first.searched)} and has {_mean(first.free)} "
        f"over {seeds} fresh {'seed' if seeds == 1 else 'seeds'}: the maximum was {_points(first.excess)} "
        f"points {'above' if first.excess >= 0 else 'below'} its confirmation."
    )
    lines = [maximum]
    if preset is None:
        return lines
    best = max(tried, key=lambda one: one.free.mean)
    gain = best.free.minus(preset.free)
    promised = first.searched - preset.searched
    lines.append(
        f"Over the preset, {_mean(preset.free)}, the best confirmed settings, {best.label}, gain "
        f"{_signed(gain.mean)} points"
        + (f" (± {100 * gain.deviation:.2f} over the seeds)" if len(gain.values) > 1 else "")
        + (f"; the search alone promised {_signed(promised)}." if math.isfinite(promised) else ".")
    )
    if gain.mean <= 0:
        lines.append("No confirmed settings are better than the preset: keep it.")
    elif not gain.deviation < gain.mean:
        lines.append("That is no more than the seeds' own deviation: take more seeds before relying on it.")
    return lines


def best_config(found: Sequence[Confirmed], records: Sequence[Record], base: Config) -> tuple[Config, str]:
    """The settings to go on with, and why these.

    Of what was confirmed the highest mean, the preset included; without confirmation the search's maximum.
    """
    whole = [one for one in found if one.free.values]
    if whole:
        one = max(whole, key=lambda one: one.free.mean)
        return override(base, one.changes), f"{one.label}, the highest mean over fresh seeds"
    finished = [record for record in records if record.state == "complete"]
    if not finished:
        raise ValueError("search must have a finished trial to name the best one, got none; see its failures")
    top = max(finished, key=lambda record: record.value)
    return override(base, dict(top.changes)), f"trial {top.label}, the search's maximum, not confirmed"


def command(preset: str, start: Config, best: Config) -> str:
    """The command line that trains `best`, from the preset's own settings `start`."""
    own, wanted = flatten(start), flatten(best)
    changed = [name for name in own if own[name] != wanted[name] and not _same_place(own[name], wanted[name])]
    flags = [part for name in changed for part in (f"--{name}", _as_text(wanted[name]))]
    return shlex.join(["cosa-train", preset, *flags])


def _same_place(relative: object, absolute: object) -> bool:
    """Whether a path is the preset's own, which sweeps make absolute."""
    return isinstance(absolute, str) and absolute.startswith("/") and absolute.endswith(f"/{relative}")


def _as_text(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _percent(value: float) -> str:
    return f"{100 * value:.2f}"


def _points(value: float) -> str:
    return f"{abs(100 * value):.2f}"


def _signed(value: float) -> str:
    return f"{100 * value:+.2f}".replace("-", "−")


def _mean(cell: Cell) -> str:
    deviation = f" ± {100 * cell.deviation:.2f}" if len(cell.values) > 1 else ""
    return f"{100 * cell.mean:.2f}{deviation}"
