"""Run a search's trials on Ray Tune: the loop around the study, and what hands its trials to Tune.

The study says which trials were begun, their folders how far they are: a driver that starts again first takes
from the folders what the study does not know yet, then goes on with what is unfinished. Nothing of Tune's own
state is kept. Tune's OptunaSearch is not used: it tells a trial that was stopped as complete, counts Tune's
iterations, which start anew after a restart, and cannot have a trial wait for the warm-up it forks from.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from optuna.trial import FrozenTrial, TrialState
from ray import tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import FIFOScheduler

from cosa.cli.console import LiveLine
from cosa.config import warmup_identity
from cosa.distributed.session import Allotment
from cosa.tracking import TrackingSpec
from cosa.training.trainer import RunSpec, TrainProgress, ignore
from sweeps.planning import folder as folders
from sweeps.planning.plan import Trial
from sweeps.running.launch import STOPPED, TrialSearcher, run_on_tune
from sweeps.running.progress import SweepProgress
from sweeps.running.queue import Ended, TrialQueue
from sweeps.running.trial import make_spec, run_trial
from sweeps.tables.metrics import SEG_MIOU
from sweeps.tuning import study as studies
from sweeps.tuning.arguments import Budget, SearchArgs
from sweeps.tuning.study import SearchStudy

_TRIES = 50
"""Suggestions in a row that may all have been tried before, until the space counts as exhausted."""


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
        self.queue = TrialQueue([], slots, args.root)
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
        trial = self.queue.start_next()
        while trial is None and self._may_ask():
            self._ask()
            trial = self.queue.start_next()
        if trial:
            self._budget.note(len(self.queue.running) - 1)
        return trial

    @property
    def exhausted(self) -> bool:
        """Whether nothing will ever start again."""
        return not self.queue.waiting and not self._budget_left()

    def report(self, name: str, step: int, value: float) -> bool:
        """A running trial is at a pruning step; returns whether it goes on."""
        self._budget.note(len(self.queue.running))
        return self.study.report(self._numbers[name], step, value)

    def end(self, name: str, why: str = "") -> Ended:
        """A running trial has ended for good: finished, stopped on its way, or failed, and `why`."""
        self._budget.note(len(self.queue.running))
        forks = [fork.name for fork in self.queue.waiting.values() if fork.warmup == name]
        ended = self.queue.end(name, why)
        trial = ended.trial
        if trial.kind == "trial":
            self._end(trial, why)
        elif why:
            # The preset's own warm-up serves all trials, unless the space varies what it trains.
            self._exhausted |= warmup_identity(trial.config) == warmup_identity(self._args.base)
            for fork in forks:
                self.study.fail(self._numbers[fork], f"not run: {name} failed ({why})")
        return ended

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
        waiting = sum(trial.kind == "trial" for trial in self.queue.waiting.values())
        free = len(self.queue.running) < self.queue.slots
        return free and waiting < self.queue.slots and self._budget_left()

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
            if folders.read_result(root, warmup) is None and warmup.name not in self.queue.running:
                self.queue.waiting.setdefault(warmup.name, warmup)
        self.queue.waiting[trial.name] = trial
        return True


class StudySearcher(TrialSearcher):
    """Hands Tune the loop's next trial whenever one is ready, and watches it end."""

    def __init__(self, loop: SearchLoop, out: Path, line: LiveLine, make: Callable[[Trial], RunSpec]) -> None:
        super().__init__(loop.queue, out, line)
        self._loop, self._make = loop, make

    @property
    def exhausted(self) -> bool:
        """Whether nothing will ever start again."""
        return self._loop.exhausted

    def next_trial(self) -> Trial | None:
        """Start the next trial; None while every other one waits."""
        return self._loop.start_next()

    def settings(self, trial: Trial) -> dict[str, Any]:
        """What the trial's process is given."""
        return {**super().settings(trial), "spec": self._make(trial)}

    def end(self, trial: Trial, why: str) -> tuple[Ended, str]:
        """A trial has ended: done, stopped on its way, or out of retries; returns what became of it, too."""
        ended = self._loop.end(trial.name, why)
        found = self._loop.found(trial.name)
        if why:
            return ended, f"failed ({why})"
        if found is None:
            return ended, "done"
        return ended, f"{studies.state(found)} at {100 * studies.last_value(found):.2f}"


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
    slots: Allotment,
    data_tags: Mapping[str, str],
) -> None:
    """Run trials until the budget is spent; needs a running Ray.

    Args:
        loop: What to run.
        args: What was asked for; its folder is on storage that all machines of the cluster reach.
        track: Where to track a trial.
        slots: What each trial gets.
        data_tags: Fingerprints of the data that a trial must find on its machine; empty takes any.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM, once the trials have saved and stopped.
    """
    out, workers, steps = args.root, args.sweep.resources.workers, args.steps

    def make(trial: Trial) -> RunSpec:
        return make_spec(trial, out, track(trial), data_tags)

    def trainable(settings: dict[str, Any]) -> dict[str, Any]:
        spec: RunSpec = settings["spec"]
        reported: set[int] = set()

        def report(progress: TrainProgress) -> None:
            if progress.step in steps and SEG_MIOU in progress.metrics and progress.step not in reported:
                reported.add(progress.step)
                # Blocks until the driver has decided; a trial that is stopped leaves by SystemExit.
                tune.report({"step": progress.step, "value": progress.metrics[SEG_MIOU]})

        ended = run_trial(spec, out, workers=workers, report=ignore if spec.stop_at else report)
        return {STOPPED: not ended}

    def head() -> list[str]:
        trials = loop.study.trials
        ended = [studies.state(trial) for trial in trials if trial.state.is_finished()]
        best = [
            f"best {100 * studies.last_value(found):.2f} (trial {studies.label(found)})"
            for found in studies.finished(trials)[:1]
        ]
        counts = [f"{ended.count(state)} {state}" for state in ("pruned", "failed") if state in ended]
        return [f"{len(ended)} trials done of {args.limits}", *best, *counts]

    progress = SweepProgress(loop.queue, out, head, all_queued=False)
    searcher = StudySearcher(loop, out, LiveLine(), make)
    run_on_tune(trainable, searcher, progress, args.sweep, slots, PruningScheduler(loop))
