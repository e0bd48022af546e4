"""A sweep's runs as MLflow has them, found by their tags."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosa.config import Config, from_json

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
    found: list[Run] = []
    token: str | None = None
    while True:
        page = client.search_runs(
            [parent.info.experiment_id],
            f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'",
            page_token=token,
        )
        found += page
        token = page.token
        if not token:
            break
    return sorted(found, key=lambda run: (run.info.status == "FINISHED", run.info.start_time))


def read_json(client: MlflowClient, run_id: str, name: str) -> dict[str, Any]:
    """A small artifact of a run; empty where there is none."""
    from mlflow.exceptions import MlflowException

    with tempfile.TemporaryDirectory() as folder:
        try:
            path = client.download_artifacts(run_id, name, folder)
        except (MlflowException, OSError):
            return {}
        content: dict[str, Any] = json.loads(Path(path).read_text())
    return content
