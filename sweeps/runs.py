"""The ground of this package: MLflow asked for sweeps and their runs, and the tags that they are found by."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosa import tracking
from cosa.config import Config, from_json, nearest
from cosa.storage.files import mask
from cosa.tracking import initialise_store

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

PLAN = "plan.json"
RUN_KEY = "run"
"""Of a trial in a plan: the id of the earlier run that stands for it."""
FAILURES = "failures.json"
REASON_TAG = "cosa.failure"
FORK_TAG = "cosa.forked_from"
"""On runs that share a warm-up: the id of the warm-up's run."""
ORACLE_TAG = "cosa.oracle"
"""On runs whose training saw ground-truth masks."""


def base_of(plan: Mapping[str, Any]) -> Config:
    """The settings that every arm started from."""
    return from_json(json.dumps(plan["config"]))


def is_trial(run: Run) -> bool:
    """Whether it fills rows: no sweep and no warm-up."""
    return run.data.tags.get("cosa.kind") == "trial" and "cosa.identity" in run.data.tags


def metric_names(run: Run) -> set[str]:
    """Names of what a run has, metrics that were never finite among them."""
    prefix = "cosa.non_finite."
    return {*run.data.metrics, *(tag.removeprefix(prefix) for tag in run.data.tags if tag.startswith(prefix))}


def children_of(client: MlflowClient, parent: Run) -> list[Run]:
    """Runs nested under `parent`, finished ones last and newer after older: of equals the last one counts."""
    search = functools.partial(
        client.search_runs, [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    )
    page = search()
    found = [*page]
    while page.token:
        page = search(page_token=page.token)
        found += page
    return sorted(found, key=lambda run: (run.info.status == "FINISHED", run.info.start_time))


def explained(uri: str) -> AbstractContextManager[None]:
    """One line for a store that stops answering, as `cosa.tracking.explained`; raises TrackingError."""
    return tracking.explained(uri, "the trials' folders have it all: run the same command again when it does")


def find_sweep(uri: str, experiment: str, name: str) -> str:
    """The id of the newest sweep, of those called `name` unless that is empty; `name` may be the id itself.

    Raises:
        TrackingError: The store does not answer.
        ValueError: There is none.
    """
    path = Path(uri.partition(":///")[2])
    if uri.startswith("sqlite") and not path.is_file():
        raise ValueError(f"--tracking-uri must name a store that exists, got no file {str(path)!r}")
    experiment_id = initialise_store(uri, experiment)
    with explained(uri):
        sweeps = client_of(uri).search_runs([experiment_id], "tags.`cosa.kind` = 'sweep'")
    names = [run.data.tags.get("cosa.sweep", "") for run in sweeps]  # newest first
    for run, own_name in zip(sweeps, names, strict=True):
        if name in {"", own_name, run.info.run_id}:
            return str(run.info.run_id)
    raise ValueError(f"--sweep must be one in {mask(uri)}, got {name!r}{nearest(name, names)}")


def client_of(uri: str) -> MlflowClient:
    """A client of a store that is known to answer."""
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    from mlflow import MlflowClient

    return MlflowClient(uri)
