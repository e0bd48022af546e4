"""Trials that finished elsewhere: the same experiment on the same data by the same code is not run again.

Nothing is copied. A sweep's plan names the earlier run, and the report reads it where it is. The code is the
same where both runs come from the same commit and neither from a tree with local changes; a commit that
nobody knows is the same as none. A run that a sweep took before stays, whatever code and data are now.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from cosa.config import identity
from cosa.tracking import find_run, read_json
from sweeps.planning.plan import Trial, counted
from sweeps.runs import metric_names

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

COMMIT_TAG, DIRTY_TAG = "mlflow.source.git.commit", "cosa.dirty"


def find_reusable(
    client: MlflowClient,
    experiment_id: str,
    trials: Sequence[Trial],
    code: Mapping[str, str],
    data_tags: Mapping[str, str],
    taken: Mapping[str, str],
) -> tuple[dict[str, str], str]:
    """The run that each trial took before, or the newest finished one of its experiment, code and data.

    Args:
        client: Of the store that holds the runs.
        experiment_id: Experiment to look in.
        trials: Those still to run; warm-ups are passed over, for their checkpoints are in no store.
        code: This code's tags, as `cosa.tracking.provenance.source_tags` gives them.
        data_tags: Fingerprints of the training and validation images, by tag.
        taken: Ids of the runs that the sweep took before, by the trials' names; one may be deleted by now.

    Returns:
        Ids of the runs by the names of the trials that they stand for, and why other trials that finished
        earlier are run again all the same; empty where there are none.
    """
    found: dict[str, str] = {}
    reasons: Counter[str] = Counter()
    for trial in trials:
        if trial.kind != "trial":
            continue
        before = find_run(client, taken.get(trial.name, ""))
        if before is not None and _is_whole(client, before, trial):
            found[trial.name] = before.info.run_id
            continue
        query = f"attributes.status = 'FINISHED' and tags.`cosa.identity` = '{identity(trial.config)}'"
        earlier = [r for r in client.search_runs([experiment_id], query) if _is_whole(client, r, trial)]
        obstacles = {_obstacle(run, code, data_tags): run.info.run_id for run in reversed(earlier)}
        if "" in obstacles:
            found[trial.name] = obstacles[""]
        elif earlier:
            reasons[_obstacle(earlier[0], code, data_tags)] += 1
    if not reasons:
        return found, ""
    parts = [reason + (f" ({count})" if len(reasons) > 1 else "") for reason, count in reasons.items()]
    trained_again = counted(reasons.total(), "trial")
    return found, f"{trained_again} finished earlier but will run again: {'; '.join(parts)}"


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
