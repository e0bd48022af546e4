"""What a search found, confirmed: its best trials and the preset trained again with fresh seeds.

The best of many noisy values is partly the luckiest one, twice: the search picks one among all trials, the
confirmation one among those it trained again. Only values of seeds that played no part in a choice say how
good it is. They say nothing of another bias: all is judged on the same validation images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from optuna.trial import FrozenTrial

from cosa.config import Config, override
from sweeps.planning.folder import read_result
from sweeps.planning.plan import Plan, make_plan
from sweeps.reporting.results import LEAST_PAIRS, p_value
from sweeps.tables import Arm, Table
from sweeps.tables.metrics import SEG_MIOU, SEG_MIOU_LABELLED
from sweeps.tuning.study import PRESET, SearchStudy, finished, label, last_value, origin

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
        if origin(trial) != PRESET:
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
    """What fresh seeds say; fractions of label-free mIoU throughout but for one column."""

    table: pd.DataFrame
    """A row for each setting with a finished run, the highest mean first; its index is `full` or `trial-12`.

    Columns: `searched`, in the search with its one seed; `mean`, `sd`, `n` over fresh seeds; `lost`, searched
    less mean; `gain`, `gain_sd`, `gain_n`, `p` of the differences to the preset seed by seed, paired t-test;
    `labelled`, `labelled_sd`, the labelled mIoU. NaN where there is nothing to say.
    """
    held_out: pd.Series
    """By fresh seed, the gain over the preset of the settings that all other seeds would choose."""


def read_confirmation(study: SearchStudy, result: ConfirmResult, root: Path) -> Confirmation:
    """What the runs of a confirmation left in the search's folder `root`."""
    free, labelled = (_values(result.plan, root, key) for key in (SEG_MIOU, SEG_MIOU_LABELLED))
    tried = {_arm(t): last_value(t) for t in result.best}
    preset = [last_value(trial) for trial in finished(study.trials) if origin(trial) == PRESET]
    tried[PRESET] = preset[0] if preset else math.nan
    gains = free.sub(free[PRESET], axis=0)[[arm for arm in free if arm != PRESET]]
    table = pd.DataFrame({"searched": pd.Series(tried, dtype=float).reindex(free.columns)})
    table = table.assign(mean=free.mean(), sd=free.std(), n=free.count())
    table = table.assign(lost=table["searched"] - table["mean"], gain=gains.mean(), gain_sd=gains.std())
    table = table.assign(gain_n=gains.count(), p=gains.apply(p_value) if len(gains.columns) else math.nan)
    table = table.assign(labelled=labelled.mean(), labelled_sd=labelled.std())
    table = table[table["n"] > 0].sort_values("mean", ascending=False, kind="stable")
    return Confirmation(table, held_out_gain(free[table.index]))


def _values(plan: Plan | None, root: Path, key: str) -> pd.DataFrame:
    """One metric by fresh seed (rows) and setting (columns)."""
    arms = [arm.name for arm in plan.tables[0].arms] if plan else [PRESET]
    values = pd.DataFrame(math.nan, index=list(plan.seeds) if plan else [], columns=arms)
    for trial in plan.trials if plan else ():
        result = read_result(root, trial) if trial.kind == "trial" else None
        for row in trial.arms if result else ():
            values.loc[trial.seed, row.partition("/")[2]] = (result or {})["metrics"].get(key, math.nan)
    return values


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
    lines = {}
    price = first["lost"] - preset["lost"]
    if math.isfinite(price):
        lines["price of choosing the search's maximum"] = (
            f"{points(max(0.0, price))} ({name(first.name)} lost {points(first['lost'])} with fresh seeds, "
            f"the preset, which nobody chose, {points(preset['lost'])})"
        )
    if top["gain_n"]:
        n = f"n = {top['gain_n']:.0f}"
        test = f"p {top['p']:.2f}, paired t-test, {n}" if math.isfinite(top["p"]) else n
        gain = over_seeds(top["gain"], top["gain_sd"], signed=True)
        lines["gain over the preset"] = f"{gain} ({name(top.name)}, the highest of {len(tried)}; {test})"
    if len(found.held_out):
        gain = over_seeds(found.held_out.mean(), found.held_out.std(), signed=True)
        lines["on seeds that had no say in the choice"] = f"{gain} (n = {len(found.held_out)})"
    return lines | {"advice": _advice(top)}


def _advice(top: pd.Series) -> str:
    if not top["gain"] > 0:
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
        seeds = f"{top['n']:.0f} fresh {'seed' if top['n'] == 1 else 'seeds'}"
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
