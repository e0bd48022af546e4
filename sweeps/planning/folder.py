"""What a sweep keeps on disk, read once into a `SweepState`, and what the same folder may be asked for again.

    OUT/.lock                 held by the driver while it runs
    OUT/.stop                 there while the driver waits for its trials to save and stop
    OUT/run.json              the sweep's run in MLflow
    OUT/plan.json             what it was last asked for
    OUT/.tune/                Ray Tune's own notes of the current start, thrown away
    OUT/trials/NAME/          one trial: what the trainer leaves, and
        .lock                 held by the process that trains it
        log.txt               what it printed
        failure.txt           why it failed, while it is failed
        labels/               its pseudo-labels, where it is there to write those

A trial is finished exactly where the trainer's `result.json` says so for the same experiment. More tables or
seeds in the same folder are fine, and fewer; other settings, or a row that has changed under its name, would
mix two experiments and are refused.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import Any

from cosa.config import MACHINE_FIELDS, difference, override
from cosa.storage.files import last_entry
from cosa.storage.label_files import SUMMARY
from sweeps.planning.plan import Plan, Trial
from sweeps.runs import PLAN, RUN_KEY, base_of

RESULT = "result.json"
FAILURE = "failure.txt"
LOG = "log.txt"
LABELS = "labels"
LOCK = ".lock"
STOP = ".stop"
JOURNAL = "journal.jsonl"

Result = Mapping[str, Any]
"""What the trainer wrote of a finished trial."""

_FREE = MACHINE_FIELDS | {"train.seed"}
"""Settings that change no result, and the first seed: plans name their seeds."""


@dataclass(frozen=True)
class SweepState:
    """How far a plan is, as its folder says and, of what finished elsewhere, MLflow."""

    plan: Plan
    results: Mapping[str, Result]
    """Of the trials that are finished here, by name."""
    failures: Mapping[str, str]
    """Why trials failed when they were last trained, by name."""
    reused: Mapping[str, str] = field(default_factory=dict)
    """Ids of the earlier runs that stand for trials, by name."""

    @property
    def finished(self) -> set[str]:
        """Names of the trials that need not be trained."""
        return {*self.results, *self.reused}

    @property
    def remaining(self) -> list[Trial]:
        """Trials still to run, warm-ups only where they are needed."""
        return self.plan.remaining(self.finished)

    def after(self, results: Mapping[str, Result]) -> SweepState:
        """The state once further trials have finished."""
        return replace(self, results={**self.results, **results})


def read_state(out: Path, plan: Plan) -> SweepState:
    """What the folder `out` says of the plan's trials; each file is read and each warm-up hashed once."""
    plan = planned(out, plan)
    results = {t.name: result for t in plan.trials if (result := read_result(out, t)) is not None}
    failures = {t.name: why for t in plan.trials if (why := read_failure(trial_folder(out, t.name)))}
    return SweepState(plan, results, failures)


def trial_folder(out: Path, name: str) -> Path:
    """The folder of the trial called `name`."""
    return out / "trials" / name


def checkpoint(folder: Path, step: int) -> Path:
    """Where the trainer leaves the checkpoint of `step`."""
    from cosa.storage.checkpoint import checkpoint_path  # imports torch

    return checkpoint_path(folder / "checkpoints", step)


def read_result(out: Path, trial: Trial) -> Result | None:
    """What the trainer wrote of a finished trial, or None where it is not finished.

    A warm-up whose checkpoint is lost or torn is not finished: nothing can fork from it. Neither are
    pseudo-labels whose summary, written last, is gone.
    """
    folder, trial = trial_folder(out, trial.name), with_labels(out, trial)
    result = _read_json(folder / RESULT)
    kind = "warmup_identity" if trial.kind == "warmup" else "identity"
    if result.get("step") != trial.last_step or result.get(kind) != trial.identity:
        return None
    if trial.kind == "labels" and not (folder / LABELS / SUMMARY).is_file():
        return None
    if trial.kind == "warmup":
        from cosa.storage.checkpoint import is_whole  # imports torch

        path = checkpoint(folder, trial.last_step)
        if not (path.is_file() and is_whole(path)):
            return None
    return result


def with_labels(out: Path, trial: Trial) -> Trial:
    """`trial` with the pseudo-labels that it learns from in its settings, once they are written.

    Their fingerprint is part of its identity, and nobody knows it before.
    """
    if trial.kind != "trial" or trial.source is None:
        return trial
    labels = trial_folder(out, trial.source) / LABELS
    fingerprint = _read_json(labels / SUMMARY).get("fingerprint")
    if fingerprint is None:
        return trial
    changes = {"segmentation.labels": str(labels), "segmentation.labels_fingerprint": fingerprint}
    return replace(trial, config=override(trial.config, changes))


def planned(out: Path, plan: Plan) -> Plan:
    """`plan` with the pseudo-labels that are written by now in the settings of what learns from them."""
    return replace(plan, trials=tuple(with_labels(out, trial) for trial in plan.trials))


def _read_json(path: Path) -> dict[str, Any]:
    """Empty where there is no file, or a torn one."""
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return content


def read_failure(folder: Path) -> str:
    """Why a trial failed, in one line; empty where it is not known."""
    try:
        return (folder / FAILURE).read_text().strip()
    except FileNotFoundError:
        return ""


def read_step(folder: Path) -> int:
    """The last step in a trial's journal, 0 where there is none yet."""
    return int(last_entry(folder / JOURNAL).get("step", 0))


@contextlib.contextmanager
def scratch(out: Path) -> Iterator[Path]:
    """An empty folder that all machines of the sweep reach, removed afterwards."""
    folder = out / ".tune"
    shutil.rmtree(folder, ignore_errors=True)  # a driver that was killed left its own
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def read_plan(out: Path) -> Mapping[str, Any]:
    """The plan of the sweep in `out`, as `plan.to_json` wrote it; empty where there is none yet."""
    return _read_json(out / PLAN)


def taken_before(out: Path) -> dict[str, str]:
    """Trials of the sweep in `out` that it took from earlier runs, by name, with the runs' ids."""
    return {trial["name"]: trial[RUN_KEY] for trial in read_plan(out).get("trials", ()) if RUN_KEY in trial}


def require_same_sweep(out: Path, plan: Plan) -> None:
    """Refuse a plan that contradicts the one that `out` began with.

    Raises:
        ValueError: Settings or rows are others than before.
    """
    before = read_plan(out)
    if not before:
        return
    base = base_of(before)
    changes = [
        f"{name} {old} -> {new}"
        for name, old, new in difference(base, plan.base)
        if name not in _FREE and not (name == "network.weights" and PurePath(old).name == PurePath(new).name)
    ]
    kept = {
        (table["name"], arm["name"]): arm["changes"] for table in before["tables"] for arm in table["arms"]
    }
    if not changes:
        changes = [
            f"row {table.name}/{arm.name}: {name} {was} -> {now}"
            for table in plan.tables
            for arm in table.arms
            if (table.name, arm.name) in kept
            for name, was, now in difference(
                override(base, kept[table.name, arm.name]), override(base, arm.changes)
            )
        ]
    if changes:
        raise ValueError(
            f"settings must stay those of the sweep in {str(out)!r}, got {'; '.join(changes)}; go on with "
            "the old ones, or begin another sweep with another --out"
        )
