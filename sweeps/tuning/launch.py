"""Run a search's trials on Ray Tune: a Searcher that asks the study, a scheduler that stops trials at rungs.

As with the tables' sweeps nothing of Tune's own state is kept. Tune's OptunaSearch is not used: it tells a
trial that was stopped as complete, counts Tune's iterations, which start anew after a restart, and cannot
have a trial wait for the warm-up that it forks from.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from cosa.cli.console import LiveLine, duration
from cosa.distributed.session import Allotment
from cosa.tracking import TrackingSpec
from cosa.training.trainer import RunSpec, TrainProgress, ignore
from sweeps.planning import folder as folders
from sweeps.planning.plan import Trial
from sweeps.running.launch import STOPPED, resources
from sweeps.running.progress import Progress, shown
from sweeps.running.stopping import Stopping, orderly
from sweeps.running.trial import Train, make_spec, run
from sweeps.tables.metrics import SEG_MIOU
from sweeps.tuning.flow import Flow

_KILLED = "its process ended without a word: killed, or out of memory"


class Board(Progress):
    """The live line of a search."""

    def __init__(self, flow: Flow, root: Path, budget: str) -> None:
        super().__init__(flow.schedule, root, done_before=0, clock=time.monotonic)
        self._flow = flow
        self._root_folder = root
        self._budget = budget
        self._running: dict[str, Trial] = {}
        self._seconds: list[float] = []

    def started(self, trial: Trial) -> None:
        """A trial starts, perhaps from a checkpoint of its own."""
        super().started(trial)
        self._running[trial.name] = trial

    def ended(self, trial: Trial, *, failed: bool) -> float:
        """A trial has ended; returns how many seconds it took."""
        self._running.pop(trial.name)
        seconds = super().ended(trial, failed=failed)
        if trial.kind == "trial" and not failed:
            self._seconds.append(seconds)
        return seconds

    def line(self) -> str:
        """How things stand now."""
        records = self._flow.study.records()
        done = [record for record in records if record.state in {"complete", "pruned", "failed"}]
        parts = [f"{len(done)} trials done of {self._budget}"]
        complete = [record for record in done if record.state == "complete"]
        if complete:
            best = max(complete, key=lambda record: record.value)
            parts.append(f"best {100 * best.value:.2f} (trial {best.label})")
        for state in ("pruned", "failed"):
            count = sum(record.state == state for record in done)
            parts += [f"{count} {state}"] if count else []
        for trial in list(self._running.values()):
            step = folders.read_step(folders.trial_folder(self._root_folder, trial.name))
            parts.append(f"{trial.label} {max(step, trial.first_step)}/{trial.last_step}")
        if self._seconds:
            parts.append(f"{duration(sum(self._seconds) / len(self._seconds))} a trial")
        return " | ".join(parts)


class Seeker(Searcher):
    """Hands Tune the next trial whenever one is ready, and watches it end."""

    def __init__(
        self, flow: Flow, board: Board, line: LiveLine, make: Callable[[Trial], RunSpec], stopping: Stopping
    ) -> None:
        super().__init__()
        self._stopping = stopping
        self._flow = flow
        self._board = board
        self._line = line
        self._make = make
        self._names: dict[str, str] = {}

    def suggest(self, trial_id: str) -> Any:
        """The next trial's run; None while every other one waits; FINISHED when nothing is left to start."""
        if self._stopping.told:
            return Searcher.FINISHED
        trial = self._flow.start_next()
        if trial is None:
            return Searcher.FINISHED if self._flow.exhausted else None
        self._names[trial_id] = trial.name
        self._board.started(trial)
        return {"trial": trial.name, "spec": self._make(trial)}

    def on_trial_complete(
        self,
        trial_id: str,
        result: Mapping[str, Any] | None = None,
        error: bool = False,
    ) -> None:
        """A trial has ended: done, stopped at a rung, out of retries, or stopped with the whole search."""
        flow = self._flow
        trial = flow.schedule.running[self._names[trial_id]]
        if (result or {}).get(STOPPED):  # goes on with the next start, like one whose driver was killed
            self._line.note(f"stopped: {trial.label}")
            return
        reason = (folders.read_failure(Path(self._make(trial).out)) or _KILLED) if error else ""
        seconds = self._board.ended(trial, failed=error)
        flow.end(trial.name, failed=error, reason=reason)
        number = flow.number(trial.name)
        how = "failed" if error else "done"
        if number is not None:
            record = flow.study.record(number)
            how = f"{record.state} at {100 * record.last_value:.2f}" if not error else "failed"
        self._line.note(f"{trial.label}: {how}, {duration(seconds)}{f' ({reason})' if reason else ''}")

    def save(self, checkpoint_path: str) -> None:
        """Nothing is saved: the study and the trials' folders have it all."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing is restored, see `save`."""

    def __getstate__(self) -> dict[str, object]:
        """Nothing is pickled: Tune writes a copy down that nobody reads, and what tracks is open files."""
        return {}


class RungScheduler(FIFOScheduler):
    """Stops a trial where the flow says so at a rung."""

    _supports_buffered_results = False

    def __init__(self, flow: Flow) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._flow = flow

    def on_trial_result(
        self,
        tune_controller: object,  # noqa: ARG002 (Tune's signature)
        trial: TuneTrial,
        result: Mapping[str, Any],
    ) -> str:
        """Tune asks at every report; only those from a rung carry a step."""
        if "rung" not in result:
            return str(FIFOScheduler.CONTINUE)
        kept = self._flow.rung(trial.config["trial"], int(result["rung"]), float(result["value"]))
        return str(FIFOScheduler.CONTINUE if kept else FIFOScheduler.STOP)


def seek(
    flow: Flow,
    root: Path,
    track: Callable[[Trial], TrackingSpec],
    allotment: Allotment,
    *,
    rungs: tuple[int, ...],
    workers: int,
    data_tags: Mapping[str, str],
    retries: int,
    budget: str,
    line: LiveLine,
    train: Train | None = None,
) -> None:
    """Run trials until the budget is spent; needs a running Ray.

    Args:
        flow: What to run.
        root: Folder of the search, on storage that all machines of the cluster reach.
        track: Where to track a trial.
        allotment: What each trial gets.
        rungs: Steps at which a trial reports and waits to be told whether to go on.
        workers: Data-parallel processes of a trial; 0 and 1 train in the trial's own.
        data_tags: Fingerprints of the data that a trial must find on its machine; empty takes any.
        retries: How often a failed trial starts again, from its last checkpoint.
        budget: In words, for the live line.
        line: Where progress is shown.
        train: Stands for `cosa.training.trainer.train` in a test.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM, once the trials have saved and stopped.
    """
    board = Board(flow, root, budget)

    def make(trial: Trial) -> RunSpec:
        return make_spec(trial, root, track(trial), data_tags)

    with orderly(root, line.note) as stopping, folders.scratch(root) as scratch, shown(board, line):
        seeker = Seeker(flow, board, line, make, stopping)
        tune.Tuner(
            tune.with_resources(_trainable(rungs, root, workers, train), resources(allotment, workers)),
            tune_config=tune.TuneConfig(
                search_alg=seeker,
                scheduler=RungScheduler(flow),
                num_samples=-1,
                reuse_actors=True,
                trial_dirname_creator=lambda trial: str(trial.trial_id),
            ),
            run_config=tune.RunConfig(
                storage_path=str(scratch),
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=retries),
            ),
        ).fit()
    if stopping.told:
        raise KeyboardInterrupt


def _trainable(
    rungs: tuple[int, ...], root: Path, workers: int, train: Train | None
) -> Callable[[dict[str, Any]], dict[str, Any] | None]:
    def trainable(settings: dict[str, Any]) -> dict[str, Any]:
        spec: RunSpec = settings["spec"]
        reported: set[int] = set()

        def report(progress: TrainProgress) -> None:
            if progress.step in rungs and SEG_MIOU in progress.metrics and progress.step not in reported:
                reported.add(progress.step)
                # Blocks until the driver has decided; a trial that is stopped leaves by SystemExit.
                tune.report({"rung": progress.step, "value": progress.metrics[SEG_MIOU]})

        ended = run(spec, root, workers=workers, train=train, report=ignore if spec.stop_at else report)
        return {STOPPED: not ended}

    return trainable
