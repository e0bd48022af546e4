"""What a search found, confirmed: its best trials and the preset trained again with fresh seeds.

The best of many noisy values is partly the luckiest one, twice: the search picks one among all trials, the
confirmation one among those it trained again. Only values of seeds that played no part in a choice say how
good it is. They say nothing of another bias: all is judged on the same validation images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from optuna.trial import FrozenTrial

from cosa.config import Config, override
from sweeps.planning.folder import read_result
from sweeps.planning.plan import Plan, make_plan
from sweeps.reporting.results import LEAST_PAIRS, VALUES, FilledTable
from sweeps.tables import Arm, Table
from sweeps.tables.metrics import SEG_MIOU, SEG_MIOU_LABELLED, judged_key
from sweeps.tuning.study import PRESET, SearchStudy, finished, label, last_value, origin

_CHANCE = 0.05
_METRICS = (SEG_MIOU, SEG_MIOU_LABELLED)


def best_of(study: SearchStudy, most: int) -> list[FrozenTrial]:
    """The best finished trials, each setting once and the preset itself apart, the best one first."""
    distinct: dict[tuple[object, ...], FrozenTrial] = {}
    for trial in finished(study.trials):
        if origin(trial) != PRESET:
            distinct.setdefault(tuple(sorted(study.changes(trial).items())), trial)
    return list(distinct.values())[:most]


def plan_confirmation(study: SearchStudy, best: Sequence[FrozenTrial], base: Config, seeds: int) -> Plan:
    """The table of the best trials' settings and the preset, with seeds that the search did not use.

    An empty plan where there is no best trial.
    """
    arms = (Arm(PRESET), *(Arm(_arm(trial), study.changes(trial)) for trial in best))
    table = Table(name="confirm", title="The best trials with fresh seeds", arms=arms, metrics=_METRICS)
    first = base.train.seed + 1
    return make_plan(base, [table] if best else [], range(first, first + seeds))


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


def read_confirmation(study: SearchStudy, plan: Plan, out: Path) -> Confirmation:
    """What the runs of a confirmation left in the search's folder `out`."""
    rows = [
        (*row.split("/"), trial.seed, metric, result["metrics"][key], "")
        for trial in plan.trials
        if trial.kind == "trial" and (result := read_result(out, trial))
        for row in trial.arms
        for metric in _METRICS
        if (key := judged_key(metric, trial.config.judged_network)) in result["metrics"]
    ]
    if not rows:
        return Confirmation(pd.DataFrame(), pd.Series(dtype=float))
    values = pd.DataFrame(rows, columns=VALUES)
    numbers = FilledTable(plan.tables[0], (), values).numbers
    table = numbers.xs(SEG_MIOU, level="metric").sort_values("mean", ascending=False)
    table = table[table["count"] > 0].copy()
    table["searched"] = pd.Series({_arm(t): last_value(t) for t in finished(study.trials)}, dtype=float)
    table.loc[table.index == PRESET, ["difference", "difference_std", "p"]] = math.nan  # to itself
    table["lost"] = table["searched"] - table["mean"]
    table[["labelled", "labelled_std"]] = numbers.xs(SEG_MIOU_LABELLED, level="metric")[["mean", "std"]]
    free = values[values["metric"] == SEG_MIOU].pivot(index="seed", columns="arm", values="value")
    return Confirmation(table, held_out_gain(free))


def _arm(trial: FrozenTrial) -> str:
    return PRESET if origin(trial) == PRESET else f"trial-{trial.number}"


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
    """The settings to go on with, and why these; the search has a finished trial.

    Of what was confirmed the highest mean, the preset included; without confirmation the search's maximum.
    """
    trials = finished(study.trials)
    if found.table.empty:
        why = f"trial {label(trials[0])}, the search's maximum, not confirmed"
        return override(base, study.changes(trials[0])), why
    top = found.table.iloc[0]
    changes = {_arm(trial): study.changes(trial) for trial in trials}.get(str(top.name), {})
    seeds = f"{top['count']:.0f} fresh {'seed' if top['count'] == 1 else 'seeds'}"
    return override(base, changes), f"{name(top.name)}, the highest of {len(found.table)} with {seeds}"


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
