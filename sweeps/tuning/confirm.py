"""What a search found, confirmed: its best trials and the preset trained again with fresh seeds.

The best of many noisy values is partly the luckiest one, twice: the search picks one among all trials, the
confirmation one among those it trained again. Only values of seeds that played no part in a choice say how
good it is. They say nothing of another bias: all is judged on the same validation images.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from optuna.trial import FrozenTrial

from cosa.config import Config, override
from sweeps.planning.folder import read_result
from sweeps.planning.plan import Plan, make_plan
from sweeps.reporting.results import LEAST_PAIRS, VALUES, FilledTable
from sweeps.tables import Arm, Table
from sweeps.tables.metrics import SEG_MIOU, SEG_MIOU_LABELLED
from sweeps.tuning.study import PRESET, SearchStudy, finished, is_preset, label, last_value, origin

_CHANCE = 0.05


@dataclass(frozen=True)
class ConfirmResult:
    """What was run to confirm a search."""

    best: tuple[FrozenTrial, ...] = ()
    """Trials that were trained again."""
    plan: Plan | None = None
    """The plan of that; None without any."""
    failures: Mapping[str, str] | None = None
    """Runs that did not finish, by name, with the reason in one line."""


def best_of(study: SearchStudy, most: int) -> tuple[FrozenTrial, ...]:
    """The best finished trials, each setting once and the preset itself apart, the best one first."""
    distinct: dict[tuple[object, ...], FrozenTrial] = {}
    for trial in finished(study.trials):
        if not is_preset(trial):
            distinct.setdefault(tuple(sorted(study.changes(trial).items())), trial)
    return tuple(distinct.values())[:most]


def plan_confirmation(study: SearchStudy, best: Sequence[FrozenTrial], base: Config, seeds: int) -> Plan:
    """The table of the best trials' settings and the preset, with seeds that the search did not use."""
    arms = (Arm(PRESET), *(Arm(_arm(trial), study.changes(trial)) for trial in best))
    metrics = (SEG_MIOU, SEG_MIOU_LABELLED)
    table = Table(name="confirm", title="The best trials with fresh seeds", arms=arms, metrics=metrics)
    first = base.train.seed + 1
    return make_plan(base, [table], range(first, first + seeds))


@dataclass(frozen=True)
class Confirmation:
    """What fresh seeds say; fractions of label-free mIoU but for the columns that say otherwise."""

    table: pd.DataFrame
    """A row for each setting with a finished run, `full` or `trial-12`, the highest mean first.

    Columns of `FilledTable.numbers`, differences being to the preset, and `searched`, in the search with its
    one seed; `lost`, searched less mean; `labelled` and `labelled_std` of the labelled mIoU.
    """
    held_out: pd.Series
    """By fresh seed, the gain over the preset of the settings that all other seeds would choose."""

    @property
    def seeds(self) -> int:
        """Fresh seeds that a setting has, at most."""
        return int(self.table["count"].max()) if len(self.table) else 0


def read_confirmation(study: SearchStudy, result: ConfirmResult, out: Path) -> Confirmation:
    """What the runs of a confirmation left in the search's folder `out`."""
    values = pd.DataFrame(_values(result.plan, out) if result.plan else (), columns=VALUES)
    if result.plan is None or values.empty:
        return Confirmation(pd.DataFrame(), pd.Series(dtype=float))
    numbers = FilledTable(result.plan.tables[0], (), values).numbers
    table = numbers.xs(SEG_MIOU, level="metric").sort_values("mean", ascending=False)
    table = table[table["count"] > 0].copy()
    tried = {_arm(trial): last_value(trial) for trial in result.best}
    tried |= {origin(trial): last_value(trial) for trial in finished(study.trials) if is_preset(trial)}
    table["searched"] = pd.Series(tried, dtype=float)
    table.loc[table.index == PRESET, ["difference", "difference_std", "p"]] = math.nan  # to itself
    table["lost"] = table["searched"] - table["mean"]
    table[["labelled", "labelled_std"]] = numbers.xs(SEG_MIOU_LABELLED, level="metric")[["mean", "std"]]
    free = values[values["metric"] == SEG_MIOU].pivot(index="seed", columns="arm", values="value")
    return Confirmation(table, held_out_gain(free))


def _values(plan: Plan, out: Path) -> Iterator[tuple[str, str, int, str, float, str]]:
    """A tuple of VALUES for each number of a finished run."""
    for trial in plan.trials:
        result = read_result(out, trial) if trial.kind == "trial" else None
        for row in trial.arms if result else ():
            table, _, arm = row.partition("/")
            for metric, value in (result or {})["metrics"].items():
                if metric in plan.tables[0].metrics:
                    yield table, arm, trial.seed, metric, value, ""


def held_out_gain(free: pd.DataFrame) -> pd.Series:
    """By seed, the gain over the preset of the settings that all other seeds would choose.

    Args:
        free: The metric by seed (rows) and setting (columns); seeds that not all settings have are left out.

    Returns:
        Empty with fewer than two seeds, or without the preset.
    """
    whole = free.dropna()
    if len(whole) < 2 or PRESET not in whole:
        return pd.Series(dtype=float)
    chosen = {seed: whole.drop(index=seed).mean().idxmax() for seed in whole.index}
    return pd.Series({seed: whole.loc[seed, arm] - whole.loc[seed, PRESET] for seed, arm in chosen.items()})


def summary(found: Confirmation) -> dict[str, str]:
    """The numbers that decide which settings to go on with, by what they are; percent points."""
    table, tried = found.table, found.table.drop(index=PRESET, errors="ignore")
    if tried.empty or PRESET not in table.index:
        return {}
    preset, top, first = table.loc[PRESET], tried.iloc[0], tried.loc[tried["searched"].idxmax()]
    if not top["pairs"]:
        return {}
    n = f"n = {top['pairs']:.0f}"
    p = "p < 0.01" if top["p"] < 0.01 else f"p {top['p']:.2f}"
    test = n if math.isnan(top["p"]) else f"{p}, paired t-test, {n}"
    gain = over_seeds(top["difference"], top["difference_std"], signed=True)
    lines = {
        "gain over the preset": f"{gain} ({name(top.name)}, the highest of {len(tried)}; {test})",
        "advice": _advice(top),
    }
    if len(found.held_out):
        gain = over_seeds(found.held_out.mean(), found.held_out.std(), signed=True)
        lines["gain on seeds without a say in the choice"] = f"{gain} (n = {len(found.held_out)})"
    price = first["lost"] - preset["lost"]
    if math.isfinite(price):
        lines["price of choosing the search's maximum"] = (
            f"{points(max(0.0, price))} ({name(first.name)} lost {points(first['lost'])} with fresh seeds, "
            f"the preset, which nobody chose, {points(preset['lost'])})"
        )
    return lines


def _advice(top: pd.Series) -> str:
    if not top["difference"] > 0:
        return "keep the preset: no confirmed settings are better"
    if math.isnan(top["p"]):
        return f"not to be told from chance: --confirm-seeds {LEAST_PAIRS} or more before relying on it"
    if top["p"] < _CHANCE:
        return "more than chance would explain"
    return "may be chance: more seeds before relying on it"


def best_config(study: SearchStudy, found: Confirmation, base: Config) -> tuple[Config, str]:
    """The settings to go on with, and why these.

    Of what was confirmed the highest mean, the preset included; without confirmation the search's maximum.

    Raises:
        ValueError: No trial is finished.
    """
    trials = finished(study.trials)
    if len(found.table):
        top = found.table.iloc[0]
        arm = str(top.name)
        seeds = f"{top['count']:.0f} fresh {'seed' if top['count'] == 1 else 'seeds'}"
        changes = {} if arm == PRESET else study.changes(study.trial(int(arm.removeprefix("trial-"))))
        return override(base, changes), f"{name(arm)}, the highest of {len(found.table)} with {seeds}"
    if not trials:
        raise ValueError("search must have a finished trial to name the best one, got none; see its failures")
    why = f"trial {label(trials[0])}, the search's maximum, not confirmed"
    return override(base, study.changes(trials[0])), why


def name(arm: object) -> str:
    """`preset`, or `trial 12`."""
    return "preset" if arm == PRESET else str(arm).replace("-", " ")


def points(value: float, *, signed: bool = False) -> str:
    """A fraction as percent with two decimals, a dash where there is none."""
    if math.isnan(value):
        return "–"
    return f"{100 * value:{'+' if signed else ''}.2f}".replace("-", "−")


def over_seeds(mean: float, deviation: float, *, signed: bool = False) -> str:
    """`43.00 ± 1.20`; the mean alone of one seed, since one has no deviation."""
    return points(mean, signed=signed) + ("" if math.isnan(deviation) else f" ± {points(deviation)}")


def _arm(trial: FrozenTrial) -> str:
    return f"trial-{trial.number}"
