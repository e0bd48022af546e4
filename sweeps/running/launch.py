"""Run a plan's remaining trials on Ray Tune: one Tuner, no barrier, nothing that has to be restored.

Tune's own experiment state is thrown away. What is finished is read from the trials' folders at every start,
and what is not goes on from its own checkpoint: the same command line again is the resume.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.search import Searcher

from cosa.cli.console import LiveLine, duration
from cosa.distributed.session import Allotment
from cosa.tracking import TrackingSpec
from cosa.training.trainer import RunSpec
from sweeps.planning import folder as folders
from sweeps.planning.plan import Trial
from sweeps.running.progress import Best, Progress, shown
from sweeps.running.schedule import Schedule
from sweeps.running.stopping import Stopping, orderly
from sweeps.running.trial import Train, describe, make_spec, run

SECONDS = "seconds"
"""What a trial tells Tune of itself: how long it was in its own hands."""

STOPPED = "stopped"
"""What a trial tells Tune when it stopped because the sweep was told to."""


@dataclass(frozen=True, kw_only=True)
class Times:
    """Where the slots' time went in one launch; all in seconds."""

    wall: float
    """From the launch to its end."""
    slots: int
    """Trials that ran side by side."""
    trials: int
    """Trials that ended."""
    held: float
    """From a trial's start by the driver until the driver knew its end, over all trials."""
    inside: float
    """Of that, spent in the trials themselves: reading data, training, evaluating, saving."""

    def __str__(self) -> str:
        whole = max(self.wall * self.slots, 1e-9)
        between, waiting = self.held - self.inside, self.wall * self.slots - self.held
        each = between / max(self.trials, 1)
        return (
            f"{duration(self.wall)} on {self.slots} slots: {self.inside / whole:.1%} of it in trials, "
            f"{between / whole:.1%} between them ({each:.1f} s each), {waiting / whole:.1%} waiting for a "
            f"warm-up or with nothing left to start"
        )


@dataclass(frozen=True)
class Outcome:
    """How a launch ended."""

    failures: Mapping[str, str]
    """Trials that did not finish, by name, with the reason in one line."""
    times: Times
    """Where the time went."""


class Dispatcher(Searcher):
    """Hands the schedule's trials to Tune, one whenever one is ready, and watches them end."""

    def __init__(self, schedule: Schedule, progress: Progress, line: LiveLine, stopping: Stopping) -> None:
        super().__init__()
        self._stopping = stopping
        self._schedule = schedule
        self._progress = progress
        self._line = line
        self._names: dict[str, str] = {}
        self.held = self.inside = 0.0
        self.ended = 0

    def suggest(self, trial_id: str) -> Any:
        """The next trial's name; None while every other one waits; FINISHED when nothing is left to start."""
        if self._stopping.told:
            return Searcher.FINISHED
        trial = self._schedule.start_next()
        if trial is None:
            return Searcher.FINISHED if self._schedule.exhausted else None
        self._names[trial_id] = trial.name
        self._progress.started(trial)
        return {"trial": trial.name}

    def on_trial_complete(
        self,
        trial_id: str,
        result: Mapping[str, Any] | None = None,
        error: bool = False,
    ) -> None:
        """A trial has ended for good: its retries are used up, or it is done."""
        trial = self._schedule.running[self._names[trial_id]]
        seconds = self._progress.ended(trial, failed=error)
        self.held += seconds
        self.inside += (result or {}).get(SECONDS, seconds)
        self.ended += 1
        self._schedule.end(trial.name, failed=error)
        how = "failed" if error else "stopped" if (result or {}).get(STOPPED) else "done"
        self._line.note(f"{how}: {trial.label}, {duration(seconds)}")

    def save(self, checkpoint_path: str) -> None:
        """Nothing is saved: the trials' folders say what is finished."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing is restored, see `save`."""


def launch(
    trials: Sequence[Trial],
    root: Path,
    track: Callable[[Trial], TrackingSpec],
    allotment: Allotment,
    *,
    workers: int,
    data_tags: Mapping[str, str],
    retries: int,
    done_before: int,
    line: LiveLine,
    best: Best | None = None,
    train: Train | None = None,
) -> Outcome:
    """Run `trials` in the sweep's folder `root`, each after the one it forks from; needs a running Ray.

    Args:
        trials: What to run; a warm-up that is not among them is finished.
        root: Folder of the sweep, on storage that all machines of the cluster reach.
        track: Where to track a trial.
        allotment: What each trial gets.
        workers: Data-parallel processes of a trial; 0 and 1 train in the trial's own.
        data_tags: Fingerprints of the data that a trial must find on its machine; empty takes any.
        retries: How often a failed trial starts again, from its last checkpoint.
        done_before: Trials finished earlier, for the live view.
        line: Where progress is shown.
        best: The best of the trials finished earlier.
        train: Stands for `cosa.training.trainer.train` in a test.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM, once the trials have saved and stopped.
    """
    schedule = Schedule(trials, allotment.slots)
    progress = Progress(schedule, root, done_before=done_before, clock=time.monotonic, best=best)
    specs = {trial.name: make_spec(trial, root, track(trial), data_tags) for trial in trials}
    begun = time.monotonic()
    with orderly(root, line.note) as stopping, folders.scratch(root) as scratch, shown(progress, line):
        dispatcher = Dispatcher(schedule, progress, line, stopping)
        tuner = tune.Tuner(
            tune.with_resources(_trainable(specs, root, workers, train), resources(allotment, workers)),
            tune_config=tune.TuneConfig(
                search_alg=dispatcher,
                num_samples=len(trials),
                reuse_actors=True,  # a trial finds torch imported by the one before it
                trial_dirname_creator=lambda trial: str(trial.trial_id),
            ),
            run_config=tune.RunConfig(
                storage_path=str(scratch),
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=retries),
            ),
        )
        results = tuner.fit()
    if stopping.told:
        raise KeyboardInterrupt
    wall = time.monotonic() - begun
    ended = [results[index] for index in range(len(results))]
    errors = {result.config["trial"]: result.error for result in ended if result.config and result.error}
    failures = {name: _reason(root, name, errors.get(name)) for name in schedule.failed}
    failures |= {name: f"not run: {trial.warmup} failed" for name, trial in schedule.skipped.items()}
    times = Times(
        wall=wall,
        slots=allotment.slots,
        trials=dispatcher.ended,
        held=dispatcher.held,
        inside=dispatcher.inside,
    )
    return Outcome(failures, times)


def _trainable(
    specs: Mapping[str, RunSpec], root: Path, workers: int, train: Train | None
) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def trainable(settings: dict[str, Any]) -> dict[str, Any]:
        begun = time.monotonic()
        ended = run(specs[settings["trial"]], root, workers=workers, train=train)
        return {SECONDS: time.monotonic() - begun, STOPPED: not ended}

    return trainable


def resources(allotment: Allotment, workers: int) -> dict[str, float]:
    """What Tune sets aside for the trial's own process; the workers of Ray Train ask for theirs."""
    if workers > 1:
        return {"CPU": 0.01}
    return {"CPU": allotment.cpus, **({"GPU": allotment.gpus} if allotment.gpus else {})}


def _reason(root: Path, name: str, error: Exception | None) -> str:
    """Why a trial failed, in one line."""
    reason = folders.read_failure(folders.trial_folder(root, name))
    if reason:
        return reason
    cause = getattr(error, "cause", None) or error
    return describe(cause) if cause else "its process ended without a word: killed, or out of memory"
