"""A search's trials on Ray Tune: a Searcher around the study, which also says where a trial stops on its way.

The study says which trials were begun, their folders how far they are: a driver that starts again first takes
from the folders what the study does not know yet, then goes on with what is unfinished. Tune's OptunaSearch
is not used: it tells a trial that was stopped as complete, counts Tune's iterations, which start anew after a
restart, and cannot have a trial wait for the warm-up that it forks from.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from typing import Any

from optuna.trial import FrozenTrial, TrialState
from ray import tune

from cosa.config import warmup_identity
from cosa.distributed.session import Slots
from cosa.training.trainer import RunSpec, TrainProgress
from sweeps.planning.folder import Result, read_result, trial_folder
from sweeps.planning.plan import Trial
from sweeps.running.launch import NO_RESULT, TrialSearcher, run_on_tune
from sweeps.running.progress import SweepProgress, Tell
from sweeps.running.queue import TrialQueue
from sweeps.running.trial import LabelsSpec
from sweeps.tables.metrics import SEG_MIOU, judged_key
from sweeps.tuning.arguments import Budget, SearchArgs
from sweeps.tuning.study import (
    SearchStudy,
    begun,
    finished,
    label,
    last_value,
    metric_by_step,
    objective,
    state,
)

_TRIES = 50
"""Suggestions in a row that may all have been tried before, until the space counts as exhausted."""


class StudySearcher(TrialSearcher):
    """Hands Tune the study's next trial whenever one is ready, and tells the study what becomes of it."""

    def __init__(
        self,
        args: SearchArgs,
        study: SearchStudy,
        budget: Budget,
        slots: int,
        make: Callable[[Trial], RunSpec | LabelsSpec],
        earlier: Mapping[str, Result],
    ) -> None:
        """Take from the folders what a killed driver did not note; nothing runs yet.

        Args:
            args: What was asked for.
            study: What was begun.
            budget: When no more trials are begun, unless only those that failed are.
            slots: Trials at a time.
            make: The run that a trial is.
            earlier: Of trials that finished in earlier runs, by name: they are not run again.
        """
        super().__init__(TrialQueue((), slots, args.out), make)
        self._args, self._study, self._budget, self._earlier = args, study, budget, earlier
        self._numbers: dict[str, int] = {}  # of the trials that were taken up, by name
        self._spent = False  # nothing new can be suggested, or nothing can be trained
        for found in study.trials:
            if found.state == TrialState.RUNNING:
                self._take_up(study.complete(found.number))
            elif found.state != TrialState.FAIL:
                self._numbers.setdefault(study.runs(found)[-1].name, found.number)

    def next_trial(self) -> Trial | None:
        """Start the next trial, one more of the study where that is due."""
        while (trial := self.queue.start_next()) is None and self._may_ask():
            self._ask()
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
        return self._study.report(self._numbers[name], step, value)

    def should_stop(self, trial_id: str, result: Mapping[str, Any]) -> bool:
        """Called by Tune at every report; only those from a pruning step carry a step."""
        if "step" not in result:
            return False
        trial = self.queue.running[self._names[trial_id]].trial
        return not self.report(trial.name, int(result["step"]), float(result[trial.config.judged_network]))

    def end(self, trial: Trial, why: str) -> str:
        """A running trial has ended for good: finished, stopped on its way, or failed for a reason."""
        self._budget.note(len(self.queue.running))
        self.queue.end(trial.name, why)
        if trial.kind == "trial":
            return self._tell(trial, why)
        if why:
            # The preset's own warm-up serves all trials, unless the space varies what it trains.
            self._spent |= warmup_identity(trial.config) == warmup_identity(self._args.base)
            for name in set(self.queue.failures) & set(self._numbers):
                if self._study.trial(self._numbers[name]).state == TrialState.RUNNING:
                    self._study.fail(self._numbers[name], f"{self.queue.failures[name]} ({why})")
        return f"failed ({why})" if why else "done"

    def head(self) -> list[str]:
        """How the search stands, for the live view."""
        trials = self._study.trials
        states = [state(trial) for trial in trials if trial.state.is_finished()]
        best = [f"best {100 * last_value(t):.2f} (trial {label(t)})" for t in finished(trials)[:1]]
        others = [f"{states.count(name)} {name}" for name in ("pruned", "failed") if name in states]
        return [f"{len(states)} trials done of {self._args.limits}", *best, *others]

    def _tell(self, trial: Trial, why: str) -> str:
        """Tell the study how a trial ended, and say it in words."""
        number, result = self._numbers[trial.name], read_result(self.out, trial)
        if self._study.trial(number).state == TrialState.PRUNED:
            # Nobody goes on from here, and states of big networks fill disks.
            shutil.rmtree(trial_folder(self.out, trial.name) / "checkpoints", ignore_errors=True)
        elif why or result is None:
            self._study.fail(number, why or NO_RESULT)
        else:
            self._study.finish(number, result["metrics"].get(objective(trial.config), math.nan))
        found = self._study.trial(number)
        return f"failed ({why})" if why else f"{state(found)} at {100 * last_value(found):.2f}"

    def _budget_left(self) -> bool:
        if self._args.sweep.retry_failed:
            return self._study.waiting > 0
        return not self._spent and self._budget.left(begun(self._study.trials))

    def _may_ask(self) -> bool:
        """A slot is free, and not so many wait for their warm-up already that they would be asked blindly."""
        waiting = sum(trial.kind == "trial" for trial in self.queue.waiting.values())
        free = len(self.queue.running) < self.queue.slots
        return free and waiting < self.queue.slots and self._budget_left()

    def _ask(self) -> None:
        """Begin one more trial; one whose Config was tried before is not trained again."""
        for _ in range(_TRIES):
            if self._take_up(self._study.ask()) or not self._budget_left():
                return
        self._spent = True

    def _take_up(self, found: FrozenTrial) -> bool:
        """Have a trial that was begun run to its end; False where there is nothing to run."""
        *warmups, trial = self._study.runs(found)
        number = found.number
        twin = self._study.trial(self._numbers[trial.name]) if trial.name in self._numbers else None
        if twin is not None and twin.state != TrialState.FAIL:
            if twin.state == TrialState.COMPLETE:
                self._study.finish(number, last_value(twin))
            else:
                self._study.prune(number)
            return False
        self._numbers[trial.name] = number
        if result := read_result(self.out, trial) or self._earlier.get(trial.name):
            self._study.finish(number, result["metrics"].get(objective(trial.config), math.nan))
            return False
        passed = metric_by_step(trial_folder(self.out, trial.name), self._args.steps, trial.config)
        if not all(self._study.report(number, step, passed[step]) for step in sorted(passed)):
            return False
        for warmup in warmups:
            if read_result(self.out, warmup) is None and warmup.name not in self.queue.running:
                self.queue.waiting.setdefault(warmup.name, warmup)
        self.queue.waiting[trial.name] = trial
        return True


def search(searcher: StudySearcher, args: SearchArgs, slots: Slots, tell: Tell | None = None) -> None:
    """Run trials until the budget is spent, telling `tell` now and then; needs a running Ray.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM, once the trials have saved and stopped.
    """
    steps = args.steps

    def report(progress: TrainProgress) -> None:
        if progress.step in steps and SEG_MIOU in progress.metrics:
            # Blocks until the driver has decided; a trial that is stopped leaves by SystemExit.
            # Of both networks: the driver knows which one the trial is judged on.
            keys = {network: judged_key(SEG_MIOU, network) for network in ("assignment", "online")}
            tune.report(
                {"step": progress.step} | {n: progress.metrics.get(key, math.nan) for n, key in keys.items()}
            )

    progress = SweepProgress(searcher.queue, searcher.head, all_queued=False, tell=tell)
    run_on_tune(searcher, progress, args.sweep, slots, report)
