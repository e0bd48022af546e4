"""Trials that finished elsewhere: the same experiment on the same data by the same code is not run again.

Nothing is copied. A sweep's plan names the earlier run, and the report reads it where it is. The code is the
same where both runs come from the same commit and neither from a tree with local changes; a commit that
nobody knows is the same as none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cosa.config import identity
from cosa.tracking import find_run
from sweeps.planning.plan import Trial
from sweeps.runs import metric_names, read_json

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

COMMIT_TAG, DIRTY_TAG = "mlflow.source.git.commit", "cosa.dirty"


@dataclass(frozen=True)
class Reuse:
    """What earlier runs a sweep may take."""

    runs: Mapping[str, str]
    """Their ids, by the names of the trials that they stand for."""
    refused: str = ""
    """Why trials that finished earlier are run again all the same; empty where there are none."""


def find_reusable(
    client: MlflowClient,
    experiment_id: str,
    trials: Sequence[Trial],
    code: Mapping[str, str],
    data_tags: Mapping[str, str],
) -> Reuse:
    """The newest finished run of each trial's experiment, by this code, on this data.

    Args:
        client: Of the store that holds the runs.
        experiment_id: Experiment to look in.
        trials: Those still to run; warm-ups are passed over, for their checkpoints are in no store.
        code: This code's tags, as `cosa.tracking.provenance.source_tags` gives them.
        data_tags: Fingerprints of the training and validation images, by tag.
    """
    found: dict[str, str] = {}
    reasons: Counter[str] = Counter()
    for trial in trials:
        if trial.kind != "trial":
            continue
        earlier = _finished(client, experiment_id, trial)
        obstacles = {run.info.run_id: _obstacle(run, code, data_tags) for run in earlier}
        run_id = next((run_id for run_id, obstacle in obstacles.items() if not obstacle), None)
        if run_id is not None:
            found[trial.name] = run_id
        elif obstacles:
            reasons[next(iter(obstacles.values()))] += 1
    return Reuse(found, _told(reasons))


def still_there(client: MlflowClient, trials: Sequence[Trial], runs: Mapping[str, str]) -> dict[str, str]:
    """Those of `runs`, ids by the trials' names, that a sweep took before and that nobody has deleted."""
    kept = {}
    for trial in trials:
        run = find_run(client, runs.get(trial.name, ""))
        if run is not None and _is_whole(client, run, trial):
            kept[trial.name] = run.info.run_id
    return kept


def _finished(client: MlflowClient, experiment_id: str, trial: Trial) -> list[Run]:
    """Finished runs of a trial's experiment, newest first: those of sweeps, and those of `cosa-train`."""
    runs = client.search_runs(
        [experiment_id],
        f"attributes.status = 'FINISHED' and tags.`cosa.identity` = '{identity(trial.config)}'",
    )
    return [run for run in runs if _is_whole(client, run, trial)]


def _is_whole(client: MlflowClient, run: Run, trial: Trial) -> bool:
    """Whether a run went to the trial's last step and has all it measured there: no warm-up, no sweep."""
    if run.info.status != "FINISHED" or run.data.tags.get("cosa.kind", "trial") != "trial":
        return False
    result = read_json(client, run.info.run_id, "result.json")
    return (
        result.get("identity") == identity(trial.config)
        and result.get("step") == trial.last_step
        and result.get("metrics", {}).keys() <= metric_names(run)
    )


def _obstacle(run: Run, code: Mapping[str, str], data_tags: Mapping[str, str]) -> str:
    """What keeps a run from being taken; empty where nothing does."""
    tags = run.data.tags
    if not code.get(COMMIT_TAG):
        return "the commit of this code is not known"
    if code.get(DIRTY_TAG) != "false":
        return "this code may have local changes: commit them"
    if tags.get(DIRTY_TAG) != "false" or tags.get(COMMIT_TAG) != code[COMMIT_TAG]:
        return "they were run by other code, or by code with local changes"
    if not data_tags or any(tags.get(name) != value for name, value in data_tags.items()):
        return "they were trained or judged on other data"
    return ""


def _told(reasons: Mapping[str, int]) -> str:
    if not reasons:
        return ""
    total = sum(reasons.values())
    parts = [reason + (f" ({count})" if len(reasons) > 1 else "") for reason, count in reasons.items()]
    trials = "1 trial" if total == 1 else f"{total} trials"
    return f"{trials} finished earlier but will run again: {'; '.join(parts)}"
