"""A sweep's numbers, from MLflow alone: rows of the paper's tables with ours beside the published values.

Runs are found by their tags. Metrics are fractions here; percent is made where they are printed.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosa.config import Config, flatten, override
from cosa.tracking import find_run
from sweeps.reporting.cells import Cell
from sweeps.reporting.full_model import FullModel, read_full_model
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
    read_json,
)
from sweeps.tables.metrics import METRICS
from sweeps.tables.table import Arm, Table, from_dict

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

    from sweeps.reporting.plots import Drawing


PANELS_FILE = "fig10.png"
"""Where the figures have it, the panels of single arms say nothing more."""
_TIE = 0.0005
"""Half of the last printed digit: rows closer than this are not told apart."""


@dataclass(frozen=True)
class Row:
    """One arm with ours and the published values."""

    arm: Arm
    marks: tuple[bool, ...]
    """Under each of the table's components."""
    values: tuple[Any, ...]
    """What it was trained with, under each of the table's settings."""
    oracle: bool
    """Whether its training saw ground-truth masks: it then bounds the others and is never the best."""
    cells: Mapping[str, Cell]
    """By the metric's key."""
    differences: Mapping[str, Cell]
    """To the table's reference arm, by the metric's key."""
    published: Mapping[str, float]
    """Percent, by column."""
    published_differences: Mapping[str, float]
    """To the reference arm, percent, by column."""
    gaps: tuple[str, ...]
    """Why values are missing, a line per seed and reason."""
    runs: Mapping[int, str]
    """Ids of the finished runs that its values are from, by seed."""

    @property
    def seeds(self) -> int:
        """Seeds that it has a value of."""
        return max((len(cell.values) for cell in self.cells.values()), default=0)


@dataclass(frozen=True)
class FilledTable:
    """A table of the paper, filled."""

    table: Table
    rows: tuple[Row, ...]

    @property
    def best(self) -> Row | None:
        """The row of the highest mean of the table's first metric, oracles and rows that lack a seed apart.

        None where fewer than two rows can be compared, where the two highest differ by less than a report
        prints, or where higher is not better.
        """
        key = self.table.metrics[0]
        judged = [row for row in self.rows if not row.oracle and row.cells[key].values]
        most = max((len(row.cells[key].values) for row in judged), default=0)
        judged = [row for row in judged if len(row.cells[key].values) == most]
        if len(judged) < 2 or not METRICS[key].percent:
            return None
        first, second = sorted(judged, key=lambda row: row.cells[key].mean, reverse=True)[:2]
        return first if first.cells[key].mean - second.cells[key].mean >= _TIE else None


@dataclass(frozen=True)
class Panel:
    """The last picture panel of one arm."""

    title: str
    png: bytes


@dataclass(frozen=True)
class Results:
    """Everything a report shows."""

    sweep: str
    preset: str
    seeds: tuple[int, ...]
    tables: tuple[FilledTable, ...]
    full: FullModel | None
    """The preset unchanged; None where no table holds it or it has not finished yet."""
    panels: tuple[Panel, ...]
    provenance: Mapping[str, str]
    figures: tuple[Drawing, ...] = ()
    curves: Mapping[str, Drawing] = field(default_factory=dict)
    """Of each table that has any, by its name: a metric of its arms over iterations."""
    experiment_id: str = ""
    """Of the sweep, for addresses."""


def read_results(uri: str, run_id: str) -> Results:
    """The results of the sweep whose parent run is `run_id`.

    Raises:
        mlflow.exceptions.MlflowException: The store does not answer or has no such run.
        ValueError: The run is no sweep of ours.
    """
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    from mlflow import MlflowClient

    from sweeps.reporting.curves import draw_curves
    from sweeps.reporting.figures import draw_figures
    from sweeps.reporting.histories import Recordings

    client = MlflowClient(uri)
    parent = client.get_run(run_id)
    plan = read_json(client, run_id, PLAN)
    if parent.data.tags.get("cosa.kind") != "sweep" or not plan:
        raise ValueError(f"run must be a sweep, got {run_id!r} without {PLAN}; name another with --sweep")
    if "config" not in plan:
        raise ValueError(
            f"sweep must be planned by this version of cosa, got {run_id!r} of an earlier one; "
            f"its own report is among its artifacts"
        )
    children = [*_earlier_runs(client, plan), *children_of(client, parent)]
    runs = {run.data.tags["cosa.identity"]: run for run in children if is_trial(run)}
    failures = read_json(client, run_id, FAILURES)
    tables = tuple(fill(from_dict(table), plan, runs, failures) for table in plan["tables"])
    tags = parent.data.tags
    recordings = Recordings(client, plan, children, tags.get("cosa.preset", ""))
    figures = tuple(draw_figures(recordings))
    shown = any(part.file == PANELS_FILE for drawing in figures for part in drawing.parts)
    return Results(
        sweep=tags.get("cosa.sweep", run_id),
        preset=tags.get("cosa.preset", ""),
        seeds=tuple(plan["seeds"]),
        tables=tables,
        full=read_full_model(client, tags.get("cosa.preset", ""), plan, children),
        panels=() if shown else tuple(_panels(client, plan, runs, tables)),
        provenance=_provenance(parent, plan, list(runs.values())),
        figures=figures,
        curves=draw_curves(recordings, [filled.table for filled in tables]),
        experiment_id=parent.info.experiment_id,
    )


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
    table: Table, plan: Mapping[str, Any], runs: Mapping[str, Run], failures: Mapping[str, str]
) -> FilledTable:
    """Put a sweep's runs into a table's rows.

    Args:
        table: Rows, their order and their published values.
        plan: What the sweep planned, as `plan.to_json` writes it.
        runs: The trials' runs by identity.
        failures: Reasons by the trials' names.
    """
    trials = {
        (arm, trial["seed"]): trial
        for trial in plan["trials"]
        if trial["kind"] == "trial"
        for arm in trial["arms"]
    }
    keys = shown_and_online(table)
    cells: dict[str, dict[str, Cell]] = {}
    gaps: dict[str, tuple[str, ...]] = {}
    ids: dict[str, dict[int, str]] = {arm.name: {} for arm in table.arms}
    oracles: set[str] = set()
    for arm in table.arms:
        found: dict[str, dict[int, float]] = {key: {} for key in keys}
        missing = []
        for seed in plan["seeds"]:
            trial = trials.get((f"{table.name}/{arm.name}", seed), {})
            run = runs.get(trial.get("identity", ""))
            gap = _gap(trial, run, failures)
            if run is not None and ORACLE_TAG in run.data.tags:
                oracles.add(arm.name)
            if gap:
                missing.append(f"seed {seed}: {gap}")
            elif run is not None:
                ids[arm.name][seed] = run.info.run_id
                for key, values in found.items():
                    if key in run.data.metrics:
                        values[seed] = run.data.metrics[key]
        cells[arm.name] = {key: Cell(values) for key, values in found.items()}
        gaps[arm.name] = tuple(missing)
    base = base_of(plan)
    rows = (
        _row(table, arm, override(base, arm.changes), cells, gaps[arm.name], ids[arm.name])
        for arm in table.arms
    )
    return FilledTable(
        table,
        tuple(dataclasses.replace(row, oracle=row.oracle or row.arm.name in oracles) for row in rows),
    )


def shown_and_online(table: Table) -> tuple[str, ...]:
    """The table's metrics, then ON's own, which the CSV keeps beside AN's: every row is judged on AN."""
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
    return (
        "not run yet"
        if run is None
        else {"RUNNING": "still running", "KILLED": "interrupted"}.get(run.info.status, "failed")
    )


def _row(
    table: Table,
    arm: Arm,
    config: Config,
    cells: Mapping[str, Mapping[str, Cell]],
    gaps: tuple[str, ...],
    runs: Mapping[int, str],
) -> Row:
    reference = table.arm(table.reference)
    settings = flatten(config)
    own = cells[arm.name]
    return Row(
        arm=arm,
        marks=tuple(arm.has(component) for component in table.components),
        values=tuple(settings[name] for name in table.settings),
        oracle=config.oracle,
        cells=own,
        differences={key: cell.minus(cells[reference.name][key]) for key, cell in own.items()},
        published=arm.paper,
        published_differences={
            column: value - reference.paper[column]
            for column, value in arm.paper.items()
            if column in reference.paper
        },
        gaps=gaps,
        runs=runs,
    )


def _panels(
    client: MlflowClient, plan: Mapping[str, Any], runs: Mapping[str, Run], tables: Sequence[FilledTable]
) -> Iterator[Panel]:
    """The last panel of the first table's reference arm and of its first other arm, for the first seed."""
    if not tables:
        return
    table = tables[0].table
    others = [arm.name for arm in table.arms if arm.name != table.reference]
    seed = plan["seeds"][0]
    runs_by_row = {
        row: runs.get(trial["identity"])
        for trial in plan["trials"]
        if trial["kind"] == "trial" and trial["seed"] == seed
        for row in trial["arms"]
    }
    for name in [table.reference, *others[:1]]:
        run = runs_by_row.get(f"{table.name}/{name}")
        if run is None:
            continue
        paths = sorted(item.path for item in client.list_artifacts(run.info.run_id, "panels"))
        if paths:
            with tempfile.TemporaryDirectory() as folder:
                path = client.download_artifacts(run.info.run_id, paths[-1], folder)
                yield Panel(f"{name}, seed {seed}", Path(path).read_bytes())


def _provenance(parent: Run, plan: Mapping[str, Any], runs: Sequence[Run]) -> dict[str, str]:
    """What the numbers were made with; where trials differ, all of it."""
    distinct = functools.partial(_distinct, runs)
    commits = [
        commit[:12] + (" with local changes" if dirty == "true" else "")
        for commit, dirty in distinct("mlflow.source.git.commit", "cosa.dirty")
    ]
    versions = [
        f"{name} {' / '.join(value for (value,) in distinct(f'cosa.version.{name}'))}"
        for name in ("cosa", "python", "torch", "timm", "ray", "mlflow")
    ]
    hardware = [
        f"{system}, {cpus} CPUs, {memory} GiB, GPU: {gpus or 'none'}"
        for system, cpus, memory, gpus in distinct(
            "cosa.host.system", "cosa.host.cpus", "cosa.host.memory_gib", "cosa.host.gpus"
        )
    ]
    data = [value for (value,) in distinct("cosa.data_fingerprint")]
    iterations = sum(trial["iterations"] for trial in plan["trials"])
    finished = sum(run.info.status == "FINISHED" for run in runs)
    earlier = sum(run.data.tags.get("mlflow.parentRunId") != parent.info.run_id for run in runs)
    planned = sum(trial["kind"] == "trial" for trial in plan["trials"])
    hours = float(parent.data.tags.get("cosa.training_hours", "nan"))
    return {
        "preset": parent.data.tags.get("cosa.preset", ""),
        "seeds": " ".join(map(str, plan["seeds"])),
        "trials": f"{finished} of {planned} finished, "
        + (f"{earlier} of them in earlier runs, " if earlier else "")
        + f"{iterations:,} iterations with shared warm-ups",
        "training": "unknown" if math.isnan(hours) else f"{hours:.2f} hours over all trials of this sweep",
        "commit": ", ".join(commits) or "unknown: the code came without its history (see --commit)",
        "data": ", ".join(f"fingerprint {value}" for value in data) or "unknown",
        "hardware": "; ".join(hardware) or "unknown",
        "versions": ", ".join(versions),
        "MLflow run": parent.info.run_id,
    }


def _distinct(runs: Sequence[Run], *tags: str) -> list[tuple[str, ...]]:
    """The distinct values of some tags together, in the order of the runs; runs without them are left out."""
    found = [tuple(run.data.tags.get(tag, "") for tag in tags) for run in runs]
    return [values for values in dict.fromkeys(found) if values[0]]
