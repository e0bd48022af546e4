"""The sweep in MLflow, as its driver writes it: its parent run, and what each trial's run is tagged with.

Trials write their own runs. The driver makes the parent before they start and mends afterwards what a killed
process could not say: a finished trial's run is complete, a failed one's carries its reason.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from cosa.config import Config, difference
from cosa.config.presets import short_name
from cosa.storage.files import mask
from cosa.storage.run_folder import TRAINING_TAG, VALIDATION_TAG
from cosa.tracking import (
    KIND,
    RUN_FILE,
    MlflowTracker,
    TrackingError,
    TrackingSpec,
    find_run,
    find_tracked,
    initialise_store,
    read_json,
    read_run_id,
    sync_run,
)
from sweeps.planning.folder import RESULT, Result, SweepState, read_step, trial_folder
from sweeps.planning.plan import Plan, Trial, to_json
from sweeps.planning.reuse import COMMIT_TAG
from sweeps.running.arguments import SweepArgs
from sweeps.runs import (
    FAILURES,
    FORK_TAG,
    ORACLE_TAG,
    PLAN,
    REASON_TAG,
    client_of,
    explained,
    metric_names,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

_log = logging.getLogger(__name__)
_SECONDS = 120.0
"""How long the driver waits for its own run to be made: nothing else goes on meanwhile."""


@dataclass(frozen=True)
class Sweep:
    """The sweep's parent run, open for writing.

    As a context it is closed by what interrupts the block, as failed or killed; `close` ends it well.
    """

    out: Path
    """The sweep's folder."""
    uri: str
    experiment: str
    run_id: str
    tracker: MlflowTracker
    tags: Mapping[str, str]
    """Tags that the parent shares with every trial."""
    base: Config
    """What every arm starts from."""
    system_metrics: bool = True
    """Whether trials keep how busy their machines were."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self.stop("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")

    def spec(self, trial: Trial) -> TrackingSpec:
        """Where to track a trial, under which name and tags: they make MLflow's grouping useful."""
        tags = {**self.tags, "cosa.kind": trial.kind, "cosa.seed": str(trial.seed), "cosa.arm": trial.arm}
        if trial.kind == "trial":
            changes = difference(self.base, trial.config)
            named = [f"{name}={new}" for name, _, new in changes if name != "train.seed"]
            tags["cosa.changes"] = ", ".join(named) or "none"
            tags["cosa.arms"] = " ".join(trial.arms)
            tags["cosa.tables"] = " ".join(dict.fromkeys(arm.partition("/")[0] for arm in trial.arms))
        if trial.warmup:  # by name until the store has told its run's id
            tags[FORK_TAG] = read_run_id(trial_folder(self.out, trial.warmup)) or trial.warmup
        return TrackingSpec(
            uri=self.uri,
            experiment=self.experiment,
            run_name=trial.label,
            parent_run_id=self.run_id,
            tags=tags,
            system_metrics=self.system_metrics,
        )

    def tell(self, counts: Mapping[str, float], markdown: str) -> None:
        """Show how the sweep stands while it runs: as metrics, and at the head of its page."""
        self.tracker.log_metrics(counts, int(counts["sweep/done"] + counts["sweep/failed"]))
        self._note(
            f"{markdown}\n\nTables of what is finished: `python sweeps/report.py --sweep {self.out.name}`"
        )

    def _note(self, markdown: str) -> None:
        self.tracker.set_tags({"mlflow.note.content": markdown})

    def sync(self, state: SweepState, failures: Mapping[str, str]) -> None:
        """Bring MLflow to what the folders say.

        What is left in the trials' journals is delivered: of killed ones, and of a time without a store. The
        runs of finished trials are mended, those of failed ones are tagged with the reasons; reasons of
        trials that never had a run are in the parent.

        Args:
            state: What is finished.
            failures: Why trials that were run now did not finish, by name.

        Raises:
            TrackingError: The store does not answer; nothing is lost.
        """
        for folder in find_tracked(self.out / "trials"):
            try:
                for note in sync_run(folder, self.uri).notes:
                    _log.warning("tracking: %s: %s", folder.name, note)
            except TrackingError as error:
                raise TrackingError(
                    f"{error}; nothing is lost: run the same command again, or: cosa-track flush {self.out}"
                ) from None
        reasons = {name: mask(reason) for name, reason in failures.items()}
        with explained(self.uri):
            for name, result in state.results.items():
                self._mend(state.plan.named(name), result)
            client = client_of(self.uri)
            for name, reason in reasons.items():
                if run := find_run(client, read_run_id(trial_folder(self.out, name))):
                    client.set_tag(run.info.run_id, REASON_TAG, reason)
                    client.set_terminated(run.info.run_id, "FAILED")
        self.tracker.log_text(json.dumps(reasons, indent=2) + "\n", FAILURES)
        self.tracker.settle(_SECONDS)  # the report reads them there
        hours = sum(result.get("seconds", 0.0) for result in state.results.values()) / 3600
        self.tag("cosa.training_hours", f"{hours:.3f}")

    def _mend(self, trial: Trial, result: Result) -> None:
        """Have the run of a finished trial say so: the trial may have been killed, or its run deleted."""
        folder, spec = trial_folder(self.out, trial.name), self.spec(trial)
        run = find_run(client_of(self.uri), read_run_id(folder))
        finished = run is not None and run.info.status == "FINISHED"
        if run and finished and result["metrics"].keys() <= metric_names(run):
            wanted = {**spec.tags, "mlflow.parentRunId": self.run_id}
            if trial.warmup and wanted[FORK_TAG] == trial.warmup:
                del wanted[FORK_TAG]  # its folder is gone, and the run may know the id
            for key, value in wanted.items():  # another sweep's tables may hold this trial, too
                if run.data.tags.get(key) != value:
                    client_of(self.uri).set_tag(run.info.run_id, key, value)
            if REASON_TAG in run.data.tags:
                client_of(self.uri).delete_tag(run.info.run_id, REASON_TAG)
            return
        tags = {
            TRAINING_TAG: str(result.get("data_fingerprint", "")),
            VALIDATION_TAG: str(result.get("val_fingerprint", "")),
            **({ORACLE_TAG: "masks" if trial.config.standalone else "gt"} if trial.config.oracle else {}),
        }
        told = trial.steps > 0 and read_step(folder) == trial.last_step
        tracker = dataclasses.replace(
            spec, system_metrics=False
        ).tracker()  # this is not the load it trained at
        tracker.start(trial.config, out=folder, tags=tags)
        if not told:
            tracker.log_metrics(result["metrics"], trial.last_step)
        for pattern in ("panels/*.*", "analysis/*.*", "model/*.*", RESULT):
            for path in sorted(folder.glob(pattern)):
                tracker.log_artifact(path, path.parent.name if path.parent != folder else "")
        tracker.finish("FINISHED")
        sync_run(folder, self.uri)  # raises where the store has not taken it all

    def stop(self, status: Literal["FAILED", "KILLED"]) -> None:
        """Close the sweep's run and those of its trials that were training: nothing trains any more."""
        try:
            with explained(self.uri):
                client = client_of(self.uri)
                for folder in self.out.glob("trials/*"):
                    run = find_run(client, read_run_id(folder))
                    if run and run.info.status == "RUNNING":
                        client.set_terminated(run.info.run_id, "KILLED")
        except TrackingError as error:  # whatever stops the sweep is what the user must hear of
            _log.warning("tracking: %s", error)
        self.tracker.finish(status)

    def tag(self, key: str, value: str) -> None:
        """Tag the sweep's own run."""
        with explained(self.uri):
            client_of(self.uri).set_tag(self.run_id, key, value)

    def failures(self) -> Mapping[str, str]:
        """Reasons of the trials that failed when the sweep last ended, by name."""
        with explained(self.uri):
            return read_json(client_of(self.uri), self.run_id, FAILURES)

    def close(self, markdown: str, report: Sequence[Path], *, failed: bool) -> None:
        """Show the tables at the head of the sweep's page, keep the report's files, and close the run."""
        client = client_of(self.uri)
        with explained(self.uri):
            experiment = client.get_run(self.run_id).info.experiment_id
        place = f"#/experiments/{experiment}/runs/{self.run_id}/artifacts/report/{report[0].name}"
        self._note(f"[The whole report]({place}), as one page.\n\n{markdown}"[:8000])
        for path in report:
            within = "figures" if path.parent.name == "figures" else ""
            self.tracker.log_artifact(path, f"report/{within}".rstrip("/"))
        self.tracker.finish("FAILED" if failed else "FINISHED")


def open_sweep(args: SweepArgs, plan: Plan, reused: Mapping[str, str] | None = None) -> Sweep:
    """Make the sweep's run, or open it again, in a store that is made where there is none.

    Args:
        args: The folder, whose name is the run's, and the store.
        plan: Kept as the artifact `plan.json`; the settings that its arms start from are the run's params.
        reused: Ids of the earlier runs that stand for trials, by the trials' names.

    Raises:
        TrackingError: The store does not answer or refuses the run.
        ValueError: The sweep was tracked elsewhere before, or the experiment is another project's.
    """
    _check_same_store(args.out, args.uri)
    experiment_id = initialise_store(args.uri, args.experiment)
    with explained(args.uri):
        _claim(client_of(args.uri), experiment_id, args.experiment)
    shared = {
        "mlflow.source.name": f"sweeps/{args.name}.py",
        "cosa.sweep": args.out.name,
        "cosa.preset": short_name(args.preset),
    }
    if args.commit:
        shared[COMMIT_TAG] = args.commit
    own = {
        "cosa.kind": "sweep",
        "cosa.tables": " ".join(table.name for table in plan.tables),
        "cosa.seeds": " ".join(map(str, plan.seeds)),
        "cosa.reused": str(len(reused or {})),
    }
    spec = TrackingSpec(
        uri=args.uri,
        experiment=args.experiment,
        run_name=args.out.name,
        tags={**shared, **own},
        system_metrics=False,
    )
    tracker = MlflowTracker(spec)
    tracker.start(plan.base, out=args.out)
    tracker.log_text(to_json(plan, reused), PLAN)
    tracker.settle(_SECONDS)
    assert tracker.run_id is not None  # it has settled
    found = tracker.run_id
    return Sweep(args.out, args.uri, args.experiment, found, tracker, shared, plan.base, args.system_metrics)


def _claim(client: MlflowClient, experiment_id: str, name: str) -> None:
    """Refuse an experiment whose runs are another project's; have the UI open ours as training runs.

    Raises:
        ValueError: The experiment has runs, and none of them is ours.
    """
    ours = client.search_runs([experiment_id], "tags.`cosa.identity` LIKE '%'", max_results=1)
    if not ours and (others := client.search_runs([experiment_id], max_results=1)):
        raise ValueError(
            f"--experiment must be new or hold runs of cosa, got {name!r} with runs of another project "
            f"such as {others[0].info.run_name!r}; name another"
        )
    for tag, kind in KIND.items():
        if tag not in client.get_experiment(experiment_id).tags:  # as earlier versions made it
            client.set_experiment_tag(experiment_id, tag, kind)


def _check_same_store(root: Path, uri: str) -> None:
    """A sweep's finished trials are in the store it began with; another one would show them as missing."""
    path = root / RUN_FILE
    if not path.is_file():
        return
    before = json.loads(path.read_text()).get("tracking_uri", "")
    if before != mask(uri):
        raise ValueError(
            f"--tracking-uri must stay {before} for the sweep in {str(root)!r}, got {mask(uri)}; "
            f"give that one, or another --out"
        )
