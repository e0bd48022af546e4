"""What each stage of CoSA-MS took and reached: standalone networks, and the pseudo-labels before them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from sweeps.runs import read_json

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

    from sweeps.reporting.results import FilledTable


@dataclass(frozen=True)
class Stage:
    """One standalone network, over its seeds."""

    name: str
    """Its row's."""
    oracle: bool
    """Whether it learned from masks."""
    values: pd.DataFrame
    """A line per seed. Columns are the metrics of its table by the keys of AN; `hours` of its training, and
    `labels_hours` of writing the pseudo-labels that it learned from."""
    runs: Mapping[int, str]
    """Ids of its runs by seed."""
    parameters: int | None
    """Numbers in the network; None where its weights were not kept."""


def labels_of(plan: Mapping[str, Any], children: Sequence[Run]) -> dict[tuple[str, int], Run]:
    """The run that wrote the pseudo-labels which a row of a seed learned from, by row and seed."""
    runs = {
        run.data.tags.get("cosa.identity"): run
        for run in children
        if run.data.tags.get("cosa.kind") == "labels" and run.info.status == "FINISHED"
    }
    return {
        (row, trial["seed"]): runs[trial["identity"]]
        for trial in plan["trials"]
        if trial["kind"] == "labels" and trial["identity"] in runs
        for row in trial["arms"]
    }


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
