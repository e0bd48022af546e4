"""A sweep's numbers, from MLflow alone: rows of the paper's tables with ours beside the published values.

Runs are found by their tags. Values are fractions here; percent is made where they are printed. Statistics
are over seeds: mean, sample deviation, and a paired t-test of differences to the table's reference arm.
"""

from __future__ import annotations

import functools
import math
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import pandas as pd

from cosa.cli.console import duration
from cosa.config import Config, flatten, identity, nearest, override
from cosa.tracking import find_run, read_json
from sweeps.reporting.stages import Stage, labels_of
from sweeps.runs import (
    FAILURES,
    FORK_TAG,
    ORACLE_TAG,
    PLAN,
    REASON_TAG,
    RUN_KEY,
    base_of,
    children_of,
    is_trial,
)
from sweeps.tables.metrics import LABELS_MIOU, METRICS, judged_key
from sweeps.tables.table import Arm, Table

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

    from sweeps.reporting.plots import Drawing


LEAST_PAIRS = 3
"""Seeds that two arms must share before their difference is tested."""
VALUES = ("table", "arm", "seed", "metric", "value", "run_id")
"""Columns of a tidy frame of values: a line for each number of a finished run."""
_TIE = 0.0005
"""Half of the last printed digit: rows closer than this are not told apart."""


@dataclass(frozen=True)
class Row:
    """One arm of a filled table."""

    arm: Arm
    settings: Mapping[str, Any]
    """What it was trained with, by dotted name."""
    network: str
    """Which one it is judged on: `assignment`, `online` where it has no AN, or `standalone`."""
    oracle: bool
    """Whether its training saw ground-truth masks: it then bounds the others and is never the best."""
    gaps: tuple[str, ...]
    """Why values are missing, a line per reason with its seeds."""
    runs: Mapping[int, str]
    """Ids of the finished runs that its values are from, by seed."""


@dataclass(frozen=True)
class FilledTable:
    """A table of the paper, filled."""

    table: Table
    rows: tuple[Row, ...]
    values: pd.DataFrame
    """Columns VALUES; of the table's metrics, each of the network its row is judged on, and of ON's own."""
    classes: tuple[str, ...] = ()
    """What its C-mIoU average instead of `evaluation.coexistence`, where the report was asked for it."""

    @functools.cached_property
    def numbers(self) -> pd.DataFrame:
        """Statistics over seeds, a line for each (arm, metric).

        `count`, `mean` and sample deviation `std` of the arm's values; `pairs`, `difference` and
        `difference_std` of its differences to the reference arm, seed by seed where both have one; `p`, their
        `p_value`. NaN where there are too few values.
        """
        arms = [arm.name for arm in self.table.arms]
        by_arm = self.values.pivot(index=["metric", "seed"], columns="arm", values="value")
        by_arm = by_arm.reindex(columns=pd.Index(arms, name="arm"))
        differences = by_arm.sub(by_arm[self.table.reference], axis="index")
        own, gaps = by_arm.groupby("metric"), differences.groupby("metric")
        columns = {
            "count": own.count(),
            "mean": own.mean(),
            "std": own.std(),
            "pairs": gaps.count(),
            "difference": gaps.mean(),
            "difference_std": gaps.std(),
            "p": gaps.agg(p_value),
        }
        every = pd.MultiIndex.from_product([arms, shown_and_online(self.table)], names=["arm", "metric"])
        numbers = pd.DataFrame({name: found.unstack() for name, found in columns.items()}).reindex(every)
        return numbers.fillna({"count": 0, "pairs": 0})

    def of(self, row: Row, key: str) -> pd.Series:
        """The statistics of one row's metric."""
        return self.numbers.loc[row.arm.name, key]

    def seeds(self, row: Row) -> int:
        """Seeds that a row has a value of."""
        return int(self.numbers.loc[row.arm.name, "count"].max())

    @property
    def best(self) -> Row | None:
        """The row of the highest mean of the table's first metric, oracles and rows that lack a seed apart.

        None where fewer than two rows can be compared, where the two highest differ by less than a report
        prints, or where higher is not better.
        """
        key = self.table.metrics[0]
        rows = {row.arm.name: row for row in self.rows if not row.oracle}
        judged = self.numbers.xs(key, level="metric").loc[[*rows]]
        whole = judged["mean"][judged["count"] == judged["count"].max()].dropna()
        if len(whole) < 2 or not METRICS[key].percent:
            return None
        first, second = whole.nlargest(2).items()
        return rows[first[0]] if first[1] - second[1] >= _TIE else None


@dataclass(frozen=True)
class FullModel:
    """The preset unchanged, over its seeds: what may stand beside the paper's own rows."""

    preset: str
    config: Config
    values: pd.DataFrame
    """A line per seed. Columns are metrics by the keys of AN, ON's where the preset has no AN; IoU of single
    classes, `seg_iou/cat`, and likewise of `seg_iou_labelled`, `cpl_iou` and `aux_cpl_iou`; `hours` of
    training, evaluations and warm-up included; what else it took, `cost/peak_memory_gib` among it."""
    classes: tuple[str, ...]
    """Background first."""
    runs: Mapping[int, str] = field(default_factory=dict)
    """Ids of its runs by seed."""
    images: int | None = None
    """Images that it was judged on; None where their number is not known."""
    parameters: int | None = None
    """Numbers in the assignment network; None where they are not known."""


@dataclass(frozen=True)
class Standing:
    """How a sweep stands that has not ended; warm-ups are counted as trials."""

    counts: Mapping[str, float]
    """Trials `done`, `running`, `waiting` and `failed`, and `hours_left` where they are known."""
    told: float
    """When its driver said so, in seconds since 1970."""
    trials: tuple[tuple[str, str, int, int], ...] = ()
    """Those that run: label, run's id, step and last step."""

    @property
    def planned(self) -> int:
        """All trials."""
        return round(sum(value for name, value in self.counts.items() if name != "hours_left"))

    def __str__(self) -> str:
        """In a line, with the time: a driver that was killed says nothing more."""
        if not self.counts:
            return "running"
        parts = [f"{value:.0f} {name}" for name, value in self.counts.items() if name != "hours_left"]
        left = f", {duration(3600 * self.counts['hours_left'])} left" if "hours_left" in self.counts else ""
        clock = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.told))
        return f"{', '.join(parts)}{left}, as of {clock}"


@dataclass(frozen=True)
class Results:
    """Everything a report shows."""

    sweep: str
    preset: str
    seeds: tuple[int, ...]
    tables: tuple[FilledTable, ...]
    full: FullModel | None
    """The preset unchanged; None where no table holds it or it has not finished yet."""
    provenance: Mapping[str, str]
    figures: tuple[Drawing, ...] = ()
    curves: Mapping[str, Drawing] = field(default_factory=dict)
    """Of each table that has any, by its name: a metric of its arms over iterations."""
    experiment_id: str = ""
    """Of the sweep, for addresses."""
    standing: Standing | None = None
    """None where the sweep has ended."""
    stages: tuple[Stage, ...] = ()
    """Standalone networks of its tables."""


def p_value(differences: pd.Series) -> float:
    """How likely a mean of `differences` this far from 0 is if there is none: two-sided, over pairs.

    A paired t-test, since Wilcoxon's cannot fall below 0.05 with fewer than six pairs. It takes the
    differences to be normal. NaN below LEAST_PAIRS, where it could tell hardly anything.
    """
    from scipy.stats import ttest_1samp  # a second of imports

    found = differences.dropna()
    if len(found) < LEAST_PAIRS:
        return math.nan
    if found.nunique() == 1:  # no deviation to hold the mean against
        return float(found.iloc[0] == 0)
    with warnings.catch_warnings(action="ignore"):  # that differences are nearly equal
        return float(ttest_1samp(found, 0).pvalue)


def read_results(uri: str, run_id: str, *, status: str = "", classes: Sequence[str] = ()) -> Results:
    """The results of the sweep whose parent run is `run_id`.

    Args:
        uri: Of the store.
        run_id: The parent run's.
        status: How the sweep has ended, as its driver knows before it closes the run.
        classes: The ones that C-mIoU of the tables is to average, instead of `evaluation.coexistence`.

    Raises:
        mlflow.exceptions.MlflowException: The store does not answer or has no such run.
        ValueError: The run is no sweep of ours, or was judged on other classes.
    """
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    from mlflow import MlflowClient

    from sweeps.reporting.figures import draw_curves, draw_figures
    from sweeps.reporting.histories import Histories

    client = MlflowClient(uri)
    parent = client.get_run(run_id)
    plan, tags = read_json(client, run_id, PLAN), parent.data.tags
    if tags.get("cosa.kind") != "sweep" or not plan:
        raise ValueError(f"run must be a sweep, got {run_id!r} without {PLAN}; name another with --sweep")
    if "config" not in plan:
        raise ValueError(
            f"sweep must be planned by this version of cosa, got {run_id!r} of an earlier one; "
            f"its own report is among its artifacts"
        )
    preset = tags.get("cosa.preset", "")
    children = [*_earlier_runs(client, plan), *children_of(client, parent)]
    runs = {run.data.tags["cosa.identity"]: run for run in children if is_trial(run)}
    failures, labels = read_json(client, run_id, FAILURES), labels_of(plan, children)
    histories = Histories(client, plan, children, preset)
    by_id = {run.info.run_id: run for run in children}
    tables = histories.tables
    if classes:
        tables = [_with_cmiou(table) for table in tables]
        for run in runs.values():
            for name in [name for name in run.data.metrics if "_cmiou" in name]:
                del run.data.metrics[name]  # of other classes: a gap says more
            run.data.metrics.update(class_means(read_json(client, run.info.run_id, "result.json"), classes))
    filled = tuple(
        replace(fill(table, plan, runs, failures, labels), classes=tuple(classes)) for table in tables
    )
    standing = (
        read_standing(client, parent, children) if (status or parent.info.status) == "RUNNING" else None
    )
    state = str(standing) if standing else _ENDED.get(status or parent.info.status, "")
    return Results(
        sweep=tags.get("cosa.sweep", run_id),
        preset=preset,
        seeds=tuple(plan["seeds"]),
        tables=filled,
        full=read_full_model(client, preset, plan, children),
        stages=read_stages(client, filled, labels, lambda own: _counted(client, by_id[own])[1]),
        provenance={"state": state, **_provenance(parent, plan, list(runs.values()))},
        figures=tuple(draw_figures(histories)),
        curves=draw_curves(histories),
        experiment_id=parent.info.experiment_id,
        standing=standing,
    )


def _with_cmiou(table: Table) -> Table:
    """The table with C-mIoU of each mIoU that it shows."""
    means = [key.replace("_miou", "_cmiou") for key in table.metrics]
    metrics = dict.fromkeys([*table.metrics, *(key for key in means if key in METRICS)])
    return replace(table, metrics=tuple(metrics))


def class_means(result: Mapping[str, Any], classes: Sequence[str]) -> dict[str, float]:
    """C-mIoU over `classes`, by the metrics' names, of what a run has found at its end.

    Raises:
        ValueError: One of them was not judged.
    """
    known = ("background", *result.get("classes", classes))
    for name in classes:
        if name not in known:
            raise ValueError(
                f"class must be one that was judged, got {name!r}"
                f"{nearest(name, known) or '; these are ' + ', '.join(known)}"
            )
    return {
        f"val/{network}/{kind.replace('iou', 'cmiou')}": sum(found) / len(found)
        for network in ("assignment", "online", "standalone")
        for kind, own in result.get(network, {}).get("per_class", {}).items()
        if (found := [own[name] for name in classes if name in own])
    }


_ENDED = {
    "FINISHED": "finished",
    "FAILED": "ended with failures",
    "KILLED": "interrupted, the same command goes on",
}


def read_standing(client: MlflowClient, parent: Run, children: Sequence[Run]) -> Standing:
    """How a sweep that runs stands: its driver's counts, and how far its running trials' metrics are."""

    def history(run: Run, start: str) -> list[Any]:
        key = next((name for name in run.data.metrics if name.startswith(start)), "")
        return list(client.get_metric_history(run.info.run_id, key)) if key else []

    counts = {
        name.removeprefix("sweep/"): value
        for name, value in parent.data.metrics.items()
        if name.startswith("sweep/")
    }
    trials = []
    for run in sorted(children, key=lambda one: one.info.start_time):
        if run.info.status == "RUNNING":
            begun = int(run.data.tags.get("cosa.resumed_at", 0))
            step = max([begun, *(point.step for point in history(run, "train/"))])
            length = "train.warmup" if run.data.tags.get("cosa.kind") == "warmup" else "train.iterations"
            last = int(run.data.params.get(length, step))
            trials.append((run.info.run_name, run.info.run_id, step, last))
    told = max((point.timestamp for point in history(parent, "sweep/")), default=0)
    return Standing(counts, told / 1000, tuple(trials))


def _earlier_runs(client: MlflowClient, plan: Mapping[str, Any]) -> list[Run]:
    """Runs of other sweeps that stand for trials of this plan, each after the warm-up that it forked from."""
    found: list[Run] = []
    for trial in plan["trials"]:
        run = find_run(client, trial.get(RUN_KEY, ""))
        if run is not None:
            warmup = find_run(client, run.data.tags.get(FORK_TAG, ""))
            found += [warmup, run] if warmup is not None else [run]
    return found


def fill(
    table: Table,
    plan: Mapping[str, Any],
    runs: Mapping[str, Run],
    failures: Mapping[str, str],
    labels: Mapping[tuple[str, int], Run] = MappingProxyType({}),
) -> FilledTable:
    """Put a sweep's runs into a table's rows.

    Args:
        table: Rows, their order and their published values.
        plan: What the sweep planned, as `plan.to_json` writes it.
        runs: The trials' runs by identity.
        failures: Reasons by the trials' names.
        labels: Runs that wrote pseudo-labels, by row and seed.
    """
    trials = {
        (arm, trial["seed"]): trial
        for trial in plan["trials"]
        if trial["kind"] == "trial"
        for arm in trial["arms"]
    }
    base, keys = base_of(plan), shown_and_online(table)
    rows, values = [], []
    for arm in table.arms:
        config, line = override(base, arm.changes), f"{table.name}/{arm.name}"
        network = config.judged_network
        own = {seed: trials.get((line, seed), {}) for seed in plan["seeds"]}
        found = {seed: runs[name] for seed, trial in own.items() if (name := trial.get("identity")) in runs}
        gaps = {seed: _gap(trial, found.get(seed), failures) for seed, trial in own.items()}
        finished = {seed: run for seed, run in found.items() if not gaps[seed]}
        values += [
            (table.name, arm.name, seed, key, run.data.metrics[own_key], run.info.run_id)
            for seed, run in finished.items()
            for key in keys
            if (own_key := judged_key(key, network)) in run.data.metrics
        ]
        values += [
            (table.name, arm.name, seed, LABELS_MIOU, written.data.metrics[LABELS_MIOU], written.info.run_id)
            for seed in finished
            if LABELS_MIOU in table.metrics
            if (written := labels.get((line, seed))) and LABELS_MIOU in written.data.metrics
        ]
        row = Row(
            arm,
            settings=flatten(config),
            network=network,
            oracle=config.oracle or any(ORACLE_TAG in run.data.tags for run in found.values()),
            gaps=tuple(
                f"{'seed' if len(lacking) == 1 else 'seeds'} {', '.join(map(str, lacking))}: {gap}"
                for gap in dict.fromkeys(filter(None, gaps.values()))
                if (lacking := [seed for seed in gaps if gaps[seed] == gap])
            ),
            runs={seed: run.info.run_id for seed, run in finished.items()},
        )
        rows.append(row)
    return FilledTable(table, tuple(rows), pd.DataFrame(values, columns=VALUES).astype({"value": float}))


def shown_and_online(table: Table) -> tuple[str, ...]:
    """The table's metrics, then ON's own, which the CSV keeps beside them."""
    online = (key.replace("val/assignment/", "val/online/") for key in table.metrics)
    return tuple(dict.fromkeys([*table.metrics, *online]))


def _gap(trial: Mapping[str, Any], run: Run | None, failures: Mapping[str, str]) -> str:
    """Why a trial has no result, or nothing where it has one."""
    if not trial:
        return "not in the plan: the table has changed since"
    if run is not None and run.info.status == "FINISHED":
        return ""
    reason = failures.get(trial["name"]) or (run.data.tags.get(REASON_TAG) if run is not None else None)
    if reason:
        return f"failed ({reason})"
    if run is None:
        return "not run yet"
    return {"RUNNING": "still running", "KILLED": "interrupted"}.get(run.info.status, "failed")


def read_full_model(
    client: MlflowClient, preset: str, plan: Mapping[str, Any], children: Sequence[Run]
) -> FullModel | None:
    """The runs of the plan's own settings, whatever tables hold them; None where none has finished."""
    base = base_of(plan)
    network = base.judged_network
    wanted = {identity(override(base, {"train.seed": seed})): seed for seed in plan["seeds"]}
    runs = {  # of equals the last one counts
        wanted[name]: run
        for run in children
        if is_trial(run) and run.info.status == "FINISHED"
        if (name := run.data.tags["cosa.identity"]) in wanted
    }
    warmups = {child.info.run_id for child in children}
    values: dict[int, dict[str, float]] = {}
    classes: list[str] = []
    for seed, run in sorted(runs.items()):
        result = read_json(client, run.info.run_id, "result.json")
        classes = classes or result.get("classes", [])
        per_class = result.get(network, {}).get("per_class", {})
        ious = {f"{kind}/{name}": iou for kind, own in per_class.items() for name, iou in own.items()}
        seconds, warmup = result.get("seconds", math.nan), run.data.tags.get(FORK_TAG, "")
        if warmup in warmups:
            seconds += read_json(client, warmup, "result.json").get("seconds", 0)
        metrics = {
            key.replace(f"/{network}/", "/assignment/"): value
            for key, value in run.data.metrics.items()
            if f"/{network}/" in key or key.startswith("cost/")
        }
        values[seed] = {**metrics, **ious, "hours": seconds / 3600}
    if not runs:
        return None
    ids = {seed: runs[seed].info.run_id for seed in values}
    return FullModel(
        preset,
        base,
        pd.DataFrame.from_dict(values, orient="index"),
        ("background", *classes),
        ids,
        *_counted(client, next(iter(runs.values()))),
    )


def read_stages(
    client: MlflowClient,
    tables: Sequence[FilledTable],
    labels: Mapping[tuple[str, int], Run],
    parameters: Callable[[str], int | None],
) -> tuple[Stage, ...]:
    """The standalone networks of a sweep's tables.

    Args:
        client: Of the store that holds the runs.
        tables: Of the sweep.
        labels: As `labels_of` finds them.
        parameters: Tells the numbers in a run's network, by its id.
    """

    def hours(run_id: str) -> float:
        return float(read_json(client, run_id, "result.json").get("seconds", math.nan)) / 3600

    stages = []
    for filled in tables:
        for row in filled.rows:
            if row.settings["network.architecture"] == "cosa" or not row.runs:
                continue
            own = filled.values[filled.values["arm"] == row.arm.name]
            values = own.pivot(index="seed", columns="metric", values="value")
            for seed, run_id in row.runs.items():
                values.loc[seed, "hours"] = hours(run_id)
                taught = labels.get((f"{filled.table.name}/{row.arm.name}", seed))
                values.loc[seed, "labels_hours"] = hours(taught.info.run_id) if taught else math.nan
            size = parameters(next(iter(row.runs.values())))
            stages.append(Stage(row.arm.name, row.oracle, values, row.runs, size))
    return tuple(stages)


def _counted(client: MlflowClient, run: Run) -> tuple[int | None, int | None]:
    """Images that a run's last evaluation judged, by its histogram of single images; numbers in its final AN.

    Of a run that does not tell these they are known by the size of its file, four bytes each behind a short
    header.
    """
    run_id, told = run.info.run_id, run.data.metrics.get("cost/parameters")
    analyses = sorted(item.path for item in client.list_artifacts(run_id, "analysis"))
    images: Any = read_json(client, run_id, analyses[-1]) if analyses else {}
    for name in ("networks", "assignment", "images", "iou", "count"):
        images = images.get(name, {})
    if told is not None:
        return sum(images) if images else None, int(told)
    files = [*client.list_artifacts(run_id), *client.list_artifacts(run_id, "model")]
    sizes = (item.file_size for item in files if item.path.endswith(".safetensors") and item.file_size)
    size = next(sizes, None)
    return sum(images) if images else None, None if size is None else size // 4


def _provenance(parent: Run, plan: Mapping[str, Any], runs: Sequence[Run]) -> dict[str, str]:
    """What the numbers were made with; where trials differ, all of it."""

    def distinct(*tags: str) -> list[tuple[str, ...]]:
        """The distinct values of some tags together, in the order of the runs, of those that have them."""
        found = (tuple(run.data.tags.get(tag, "") for tag in tags) for run in runs)
        return [values for values in dict.fromkeys(found) if values[0]]

    commits = [
        commit[:12] + (" with local changes" if dirty == "true" else "")
        for commit, dirty in distinct("mlflow.source.git.commit", "cosa.dirty")
    ]
    versions = [
        f"{name} {' / '.join(value for (value,) in distinct(f'cosa.version.{name}'))}"
        for name in ("cosa", "python", "torch", "timm", "ray", "mlflow")
    ]
    hosts = distinct("cosa.host.system", "cosa.host.cpus", "cosa.host.memory_gib", "cosa.host.gpus")
    hardware = [f"{name}, {cpus} CPUs, {gib} GiB, GPU: {gpus or 'none'}" for name, cpus, gib, gpus in hosts]
    data = [f"fingerprint {value}" for (value,) in distinct("cosa.data_fingerprint")]
    iterations = sum(trial["iterations"] for trial in plan["trials"])
    finished = sum(run.info.status == "FINISHED" for run in runs)
    earlier = sum(run.data.tags.get("mlflow.parentRunId") != parent.info.run_id for run in runs)
    planned = sum(trial["kind"] == "trial" for trial in plan["trials"])
    taken = f"{earlier} of them in earlier runs, " if earlier else ""
    hours = float(parent.data.tags.get("cosa.training_hours", "nan"))
    return {
        "preset": parent.data.tags.get("cosa.preset", ""),
        "seeds": " ".join(map(str, plan["seeds"])),
        "trials": f"{finished} of {planned} finished, {taken}{iterations:,} iterations with shared warm-ups",
        "training": "" if math.isnan(hours) else f"{hours:.2f} hours over all trials of this sweep",
        "commit": ", ".join(commits) or "unknown: the code came without its history (see --commit)",
        "data": ", ".join(data) or "unknown",
        "hardware": "; ".join(hardware) or "unknown",
        "versions": ", ".join(versions),
        "MLflow run": parent.info.run_id,
    }
