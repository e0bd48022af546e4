"""Run a search's trials on Ray Tune: the loop around the study, and what hands its trials to Tune.

The study says which trials were begun, their folders how far they are: a driver that starts again first takes
from the folders what the study does not know yet, then goes on with what is unfinished. Nothing of Tune's own
state is kept. Tune's OptunaSearch is not used: it tells a trial that was stopped as complete, counts Tune's
iterations, which start anew after a restart, and cannot have a trial wait for the warm-up it forks from.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from optuna.trial import FrozenTrial, TrialState
from ray import tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from cosa.cli.console import LiveLine, duration
from cosa.config import warmup_identity
from cosa.distributed.session import Allotment
from cosa.tracking import TrackingSpec
from cosa.training.trainer import RunSpec, TrainProgress, ignore
from sweeps.planning import folder as folders
from sweeps.planning.plan import Trial
from sweeps.running.launch import STOPPED, resources
from sweeps.running.progress import Progress, shown
from sweeps.running.schedule import Schedule
from sweeps.running.stopping import Stopping, orderly
from sweeps.running.trial import Train, make_spec, run
from sweeps.tables.metrics import SEG_MIOU
from sweeps.tuning import study as studies
from sweeps.tuning.arguments import Budget, SearchArgs
from sweeps.tuning.study import SearchStudy

_TRIES = 50
"""Suggestions in a row that may all have been tried before, until the space counts as exhausted."""
_KILLED = "its process ended without a word: killed, or out of memory"


class SearchLoop:
    """Which trial starts next, and what becomes of one that reports or ends. Knows no Ray."""

    def __init__(
        self,
        args: SearchArgs,
        study: SearchStudy,
        budget: Budget,
        slots: int,
        earlier: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        """Take from the folders what a killed driver did not note; nothing runs yet.

        Args:
            args: What was asked for.
            study: What was begun.
            budget: When no more trials are begun, unless only those that failed are.
            slots: Trials at a time.
            earlier: The metric of trials that finished in earlier runs, by name: they are not run again.
        """
        self.study = study
        self.schedule = Schedule([], slots)
        self._args = args
        self._budget = budget
        self._earlier = earlier
        self._numbers: dict[str, int] = {}  # of the trials that did not fail, by name
        self._exhausted = False
        for found in study.trials:
            if found.state == TrialState.RUNNING:
                self._take_up(study.complete(found.number))
            elif found.state != TrialState.FAIL:
                self._numbers.setdefault(self.study.runs(found)[-1].name, found.number)

    def start_next(self) -> Trial | None:
        """The next trial to run, or None while there is no slot or every other one waits."""
        trial = self.schedule.start_next()
        while trial is None and self._may_ask():
            self._ask()
            trial = self.schedule.start_next()
        if trial:
            self._budget.note(len(self.schedule.running) - 1)
        return trial

    @property
    def exhausted(self) -> bool:
        """Whether nothing will ever start again."""
        return self.schedule.exhausted and not self._budget_left()

    def report(self, name: str, step: int, value: float) -> bool:
        """A running trial is at a pruning step; returns whether it goes on."""
        self._budget.note(len(self.schedule.running))
        return self.study.report(self._numbers[name], step, value)

    def end(self, name: str, *, why: str = "") -> None:
        """A running trial has ended for good: finished, stopped on its way, or failed, and `why`."""
        self._budget.note(len(self.schedule.running))
        trial = self.schedule.running[name]
        self.schedule.end(name, failed=bool(why))
        if trial.kind == "trial":
            self._end(trial, why)
        elif why:
            # The preset's own warm-up serves all trials, unless the space varies what it trains.
            self._exhausted |= warmup_identity(trial.config) == warmup_identity(self._args.base)
            for fork in [t for t in self.schedule.skipped.values() if t.warmup == name]:
                del self.schedule.skipped[fork.name]
                self.study.fail(self._numbers[fork.name], f"not run: {name} failed ({why})")

    def found(self, name: str) -> FrozenTrial | None:
        """A trial in the study; None for a warm-up."""
        number = self._numbers.get(name)
        return None if number is None else self.study.trial(number)

    def _end(self, trial: Trial, why: str) -> None:
        number = self._numbers[trial.name]
        result = folders.read_result(self._args.root, trial)
        if self.study.trial(number).state == TrialState.PRUNED:
            # Nobody goes on from here, and states of big networks fill disks.
            shutil.rmtree(
                folders.trial_folder(self._args.root, trial.name) / "checkpoints", ignore_errors=True
            )
        elif why or result is None:
            self.study.fail(number, why or "ended without a result")
        else:
            self.study.finish(number, result["metrics"].get(SEG_MIOU, math.nan))

    def _budget_left(self) -> bool:
        if self._args.sweep.retry_failed:
            return self.study.waiting > 0
        return not self._exhausted and self._budget.left(studies.begun(self.study.trials))

    def _may_ask(self) -> bool:
        """A slot is free, and not so many wait for their warm-up already that they would be asked blindly."""
        waiting = sum(trial.kind == "trial" for trial in self.schedule.waiting.values())
        free = len(self.schedule.running) < self.schedule.slots
        return free and waiting < self.schedule.slots and self._budget_left()

    def _ask(self) -> None:
        """Begin one more trial; one whose Config was tried before is not trained again."""
        for _ in range(_TRIES):
            if self._take_up(self.study.ask()) or not self._budget_left():
                return
        self._exhausted = True

    def _take_up(self, found: FrozenTrial) -> bool:
        """Have a trial that was begun run to its end; False where there is nothing to run."""
        *warmups, trial = self.study.runs(found)
        root, number = self._args.root, found.number
        twin = self.found(trial.name)
        if twin is not None and twin.state == TrialState.COMPLETE:
            self.study.finish(number, studies.last_value(twin))
            return False
        if twin is not None and twin.state != TrialState.FAIL:
            self.study.prune(number)
            return False
        self._numbers[trial.name] = number
        result = folders.read_result(root, trial)
        if result is not None or trial.name in self._earlier:
            metrics = {SEG_MIOU: self._earlier[trial.name]} if result is None else result["metrics"]
            self.study.finish(number, metrics.get(SEG_MIOU, math.nan))
            return False
        passed = studies.metric_by_step(folders.trial_folder(root, trial.name), self._args.steps)
        if not all(self.study.report(number, step, passed[step]) for step in sorted(passed)):
            return False
        for warmup in warmups:
            if folders.read_result(root, warmup) is None and warmup.name not in self.schedule.running:
                self.schedule.waiting.setdefault(warmup.name, warmup)
        self.schedule.waiting[trial.name] = trial
        return True


class SearchProgress(Progress):
    """The live line of a search."""

    def __init__(self, loop: SearchLoop, args: SearchArgs) -> None:
        super().__init__(loop.schedule, args.root, done_before=0, clock=time.monotonic)
        self._loop, self._args = loop, args
        self._running: dict[str, Trial] = {}

    def started(self, trial: Trial) -> None:
        """A trial starts, perhaps from a checkpoint of its own."""
        super().started(trial)
        self._running[trial.name] = trial

    def ended(self, trial: Trial, *, failed: bool) -> float:
        """A trial has ended; returns how many seconds it took."""
        self._running.pop(trial.name)
        return super().ended(trial, failed=failed)

    def line(self) -> str:
        """How things stand now."""
        trials = self._loop.study.trials
        ended = [studies.state(trial) for trial in trials if trial.state.is_finished()]
        parts = [f"{len(ended)} trials done of {self._args.limits}"]
        parts += [
            f"best {100 * studies.last_value(best):.2f} (trial {studies.label(best)})"
            for best in studies.finished(trials)[:1]
        ]
        parts += [f"{ended.count(state)} {state}" for state in ("pruned", "failed") if state in ended]
        for trial in list(self._running.values()):
            step = folders.read_step(folders.trial_folder(self._args.root, trial.name))
            parts.append(f"{trial.label} {max(step, trial.first_step)}/{trial.last_step}")
        return " | ".join(parts)


class StudySearcher(Searcher):
    """Hands Tune the next trial whenever one is ready, and watches it end."""

    def __init__(
        self,
        loop: SearchLoop,
        progress: SearchProgress,
        line: LiveLine,
        make: Callable[[Trial], RunSpec],
        stopping: Stopping,
    ) -> None:
        super().__init__()
        self._loop, self._progress, self._line = loop, progress, line
        self._make, self._stopping = make, stopping
        self._names: dict[str, str] = {}

    def suggest(self, trial_id: str) -> Any:
        """The next trial's run; None while every other one waits; FINISHED when nothing is left to start."""
        if self._stopping.told:
            return Searcher.FINISHED
        trial = self._loop.start_next()
        if trial is None:
            return Searcher.FINISHED if self._loop.exhausted else None
        self._names[trial_id] = trial.name
        self._progress.started(trial)
        return {"trial": trial.name, "spec": self._make(trial)}

    def on_trial_complete(
        self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False
    ) -> None:
        """A trial has ended: done, stopped on its way, out of retries, or stopped with the whole search."""
        trial = self._loop.schedule.running[self._names[trial_id]]
        if (result or {}).get(STOPPED):  # goes on with the next start, like one whose driver was killed
            self._line.note(f"stopped: {trial.label}")
            return
        why = (folders.read_failure(Path(self._make(trial).out)) or _KILLED) if error else ""
        seconds = self._progress.ended(trial, failed=error)
        self._loop.end(trial.name, why=why)
        found = self._loop.found(trial.name)
        how = f"failed, {duration(seconds)} ({why})" if error else f"done, {duration(seconds)}"
        if found is not None and not error:
            at = 100 * studies.last_value(found)
            how = f"{studies.state(found)} at {at:.2f}, {duration(seconds)}"
        self._line.note(f"{trial.label}: {how}")

    def save(self, checkpoint_path: str) -> None:
        """Nothing is saved: the study and the trials' folders have it all."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing is restored, see `save`."""

    def __getstate__(self) -> dict[str, object]:
        """Nothing is pickled: Tune writes a copy down that nobody reads, and what tracks is open files."""
        return {}


class PruningScheduler(FIFOScheduler):
    """Stops a trial where the study says so at a pruning step."""

    _supports_buffered_results = False

    def __init__(self, loop: SearchLoop) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._loop = loop

    def on_trial_result(
        self,
        tune_controller: object,  # noqa: ARG002 (Tune's signature)
        trial: TuneTrial,
        result: Mapping[str, Any],
    ) -> str:
        """Tune asks at every report; only those from a pruning step carry a step."""
        goes_on = "step" not in result or self._loop.report(
            trial.config["trial"], int(result["step"]), float(result["value"])
        )
        return str(FIFOScheduler.CONTINUE if goes_on else FIFOScheduler.STOP)


def search(
    loop: SearchLoop,
    args: SearchArgs,
    track: Callable[[Trial], TrackingSpec],
    allotment: Allotment,
    data_tags: Mapping[str, str],
    line: LiveLine,
    train: Train | None = None,
) -> None:
    """Run trials until the budget is spent; needs a running Ray.

    Args:
        loop: What to run.
        args: What was asked for; its folder is on storage that all machines of the cluster reach.
        track: Where to track a trial.
        allotment: What each trial gets.
        data_tags: Fingerprints of the data that a trial must find on its machine; empty takes any.
        line: Where progress is shown.
        train: Stands for `cosa.training.trainer.train` in a test.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM, once the trials have saved and stopped.
    """
    root, workers = args.root, args.sweep.request.workers
    progress = SearchProgress(loop, args)

    def make(trial: Trial) -> RunSpec:
        return make_spec(trial, root, track(trial), data_tags)

    with orderly(root, line.note) as stopping, folders.scratch(root) as scratch, shown(progress, line):
        tune.Tuner(
            tune.with_resources(_trainable(args, train), resources(allotment, workers)),
            tune_config=tune.TuneConfig(
                search_alg=StudySearcher(loop, progress, line, make, stopping),
                scheduler=PruningScheduler(loop),
                num_samples=-1,
                reuse_actors=True,
                trial_dirname_creator=lambda trial: str(trial.trial_id),
            ),
            run_config=tune.RunConfig(
                storage_path=str(scratch),
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=args.sweep.retries),
            ),
        ).fit()
    if stopping.told:
        raise KeyboardInterrupt


def _trainable(args: SearchArgs, train: Train | None) -> Callable[[dict[str, Any]], dict[str, Any]]:
    steps, root, workers = args.steps, args.root, args.sweep.request.workers

    def trainable(settings: dict[str, Any]) -> dict[str, Any]:
        spec: RunSpec = settings["spec"]
        reported: set[int] = set()

        def report(progress: TrainProgress) -> None:
            if progress.step in steps and SEG_MIOU in progress.metrics and progress.step not in reported:
                reported.add(progress.step)
                # Blocks until the driver has decided; a trial that is stopped leaves by SystemExit.
                tune.report({"step": progress.step, "value": progress.metrics[SEG_MIOU]})

        ended = run(spec, root, workers=workers, train=train, report=ignore if spec.stop_at else report)
        return {STOPPED: not ended}

    return trainable
