"""Which trial of a search starts next and what becomes of one that reports or ends. Knows no Ray.

The study says which trials were begun, their folders how far they are: a driver that starts again first takes
from the folders what the study does not know yet, then goes on with what is unfinished.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Container, Mapping
from pathlib import Path
from types import MappingProxyType

from cosa.config import COTRAINING_SECTIONS, Config, identity, warmup_identity
from sweeps.planning import folder as folders
from sweeps.planning.plan import Trial
from sweeps.running.schedule import Schedule
from sweeps.tables.metrics import SEG_MIOU
from sweeps.tuning.budget import Budget, Ledger, Spent
from sweeps.tuning.record import PRESET, Record
from sweeps.tuning.rungs import decide
from sweeps.tuning.study import SearchStudy

TABLE = "search"
"""Stands where other sweeps have a table's name: `search/12`."""
_TRIES = 50
"""Suggestions in a row that may all have been tried before, until the space counts as exhausted."""


def alone(config: Config, row: str) -> Trial:
    """The trial of a config that fills `row` and trains its own warm-up."""
    name = f"trial-seed{config.train.seed}-{identity(config)[:8]}"
    return Trial(name, "trial", config, config.train.seed, (row,), None)


def trial_of(record: Record, config: Config, base: Config, momenta: tuple[float, ...]) -> tuple[Trial, ...]:
    """The trial of a record, after the warm-up that it forks from, if it has one.

    Every trial of a search shares its warm-up with those to come, so that even the first one forks.

    Args:
        record: Of the study.
        config: What the trial trains.
        base: What all trials start from.
        momenta: Of ANs that the warm-up carries.
    """
    seed = config.train.seed
    trial = alone(config, f"{TABLE}/{record.label.replace(' ', '-')}")
    if config.train.warmup == 0:
        return (trial,)
    own = {section: getattr(base, section) for section in COTRAINING_SECTIONS | {"ema"}}
    others = tuple(m for m in momenta if m != base.ema.momentum)
    carried = hashlib.sha256(f"{warmup_identity(config)} {base.ema.momentum} {others}".encode()).hexdigest()
    warmup = f"warmup-seed{seed}-{carried[:8]}"
    return (
        Trial(warmup, "warmup", config.replace(**own), seed, (TABLE + "/",), None, others),
        dataclasses.replace(trial, warmup=warmup),
    )


def metric_by_step(folder: Path, steps: Container[int]) -> dict[int, float]:
    """What a trial's journal says of the metric at those of `steps` where it was evaluated."""
    found: dict[int, float] = {}
    try:
        lines = (folder / "journal.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return found
    for line in lines:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:  # a line being written
            continue
        if entry.get("step") in steps and SEG_MIOU in entry:
            found[entry["step"]] = float(entry[SEG_MIOU])
    return found


class Flow:
    """The search as its driver sees it."""

    def __init__(
        self,
        study: SearchStudy,
        base: Config,
        root: Path,
        *,
        rungs: tuple[int, ...],
        momenta: tuple[float, ...],
        budget: Budget,
        ledger: Ledger,
        slots: int,
        earlier: Mapping[str, float] = MappingProxyType({}),
        waiting_only: bool = False,
    ) -> None:
        """Take from the folders what a killed driver did not note; nothing runs yet.

        Args:
            study: What was begun.
            base: What all trials start from.
            root: The search's folder.
            rungs: Steps at which trials are judged on their way.
            momenta: Of ANs that a shared warm-up carries.
            budget: When no more trials are begun.
            ledger: What was spent.
            slots: Trials at a time.
            earlier: The metric of trials that finished in earlier runs, by name: they are not run again.
            waiting_only: Begin none but what waits in the study, whatever the budget.
        """
        self.study = study
        self.schedule = Schedule([], slots)
        self._base = base
        self._root = root
        self._rungs = rungs
        self._momenta = momenta
        self._budget = budget
        self._earlier = earlier
        self._waiting_only = waiting_only
        self._ledger = ledger
        self._numbers: dict[str, int] = {}
        self._exhausted = False
        for record in study.records():
            if record.state == "running":
                study.complete(record.number)
                self._take_up(study.record(record.number))

    def start_next(self) -> Trial | None:
        """The next trial to run, or None while there is no slot or every other one waits."""
        trial = self.schedule.start_next()
        while trial is None and self._may_ask():
            self._ask()
            trial = self.schedule.start_next()
        if trial:
            self._ledger.note(len(self.schedule.running) - 1)
        return trial

    @property
    def exhausted(self) -> bool:
        """Whether nothing will ever start again."""
        return self.schedule.exhausted and not self._budget_left()

    @property
    def spent(self) -> Spent:
        """What the search has cost so far."""
        begun = sum(record.repeats is None for record in self.study.records())
        return Spent(begun, self._ledger.seconds, self._ledger.gpu_seconds)

    def rung(self, name: str, step: int, value: float) -> bool:
        """A running trial reports from a rung; returns whether it goes on."""
        self._ledger.note(len(self.schedule.running))
        record = self.study.record(self._numbers[name])
        return self._judge(record, step, value)

    def end(self, name: str, *, failed: bool, reason: str = "") -> None:
        """A running trial has ended for good, one stopped at a rung among them."""
        self._ledger.note(len(self.schedule.running))
        trial = self.schedule.running[name]
        self.schedule.end(name, failed=failed)
        if trial.kind == "trial":
            self._end(trial, failed=failed, reason=reason)
            return
        if failed:
            # The preset's own warm-up serves all trials, unless the space varies what it trains.
            self._exhausted |= warmup_identity(trial.config) == warmup_identity(self._base)
            for fork in [t for t in self.schedule.skipped.values() if t.warmup == name]:
                del self.schedule.skipped[fork.name]
                self._fail(fork, f"not run: {name} failed ({reason})")

    def number(self, name: str) -> int | None:
        """A trial's number; None for a warm-up."""
        return self._numbers.get(name)

    def _end(self, trial: Trial, *, failed: bool, reason: str) -> None:
        number = self._numbers[trial.name]
        result = folders.read_result(self._root, trial)
        if self.study.record(number).state == "pruned":
            # Nobody goes on from here, and states of big networks fill disks.
            shutil.rmtree(folders.trial_folder(self._root, trial.name) / "checkpoints", ignore_errors=True)
        elif failed or result is None:
            self._fail(trial, reason or "ended without a result")
        else:
            self._finish(trial, result["metrics"])

    def _finish(self, trial: Trial, metrics: Mapping[str, float]) -> None:
        self.study.finish(self._numbers[trial.name], metrics.get(SEG_MIOU, math.nan))

    def _fail(self, trial: Trial, reason: str) -> None:
        self.study.fail(self._numbers[trial.name], reason)

    def _budget_left(self) -> bool:
        if self._waiting_only:
            return self.study.waiting > 0
        return not self._exhausted and self._budget.left(self.spent)

    def _may_ask(self) -> bool:
        """A slot is free, and not so many wait for their warm-up already that they would be asked blindly."""
        waiting = sum(trial.kind == "trial" for trial in self.schedule.waiting.values())
        free = len(self.schedule.running) < self.schedule.slots
        return free and waiting < self.schedule.slots and self._budget_left()

    def _ask(self) -> None:
        """Begin one more trial; one whose Config was tried before is not trained again."""
        for _ in range(_TRIES):
            record = self.study.ask()
            if self._take_up(record) or not self._budget_left():
                return
        self._exhausted = True

    def _take_up(self, record: Record) -> bool:
        """Have a trial that was begun run to its end; False where there is nothing to run."""
        config = self.study.config(record)
        *warmup, trial = trial_of(record, config, self._base, self._momenta)
        twin = next((r for r in self.study.records() if self._same(r, record)), None)
        if twin is not None and twin.state == "complete":
            self.study.finish(record.number, twin.value)
            return False
        if twin is not None:
            self.study.prune(record.number)
            return False
        self._numbers[trial.name] = record.number
        result = folders.read_result(self._root, trial)
        if result is None and trial.name in self._earlier:
            result = {"metrics": {SEG_MIOU: self._earlier[trial.name]}}
        if result is not None:
            self._finish(trial, result["metrics"])
            return False
        if not self._catch_up(record, trial):
            return False
        for phase in warmup:
            done = folders.read_result(self._root, phase) is not None
            if not done and phase.name not in self.schedule.running:
                self.schedule.waiting.setdefault(phase.name, phase)
        self.schedule.waiting[trial.name] = trial
        return True

    def _same(self, earlier: Record, record: Record) -> bool:
        """Whether an earlier trial, unless it failed, is of the same Config."""
        if earlier.number >= record.number or earlier.state == "failed":
            return False
        return identity(self.study.config(earlier)) == identity(self.study.config(record))

    def _catch_up(self, record: Record, trial: Trial) -> bool:
        """Judge a trial at the rungs that its folder says it has passed; returns whether it goes on."""
        values = metric_by_step(folders.trial_folder(self._root, trial.name), self._rungs)
        return all(
            self._judge(self.study.record(record.number), step, values[step]) for step in sorted(values)
        )

    def _judge(self, record: Record, step: int, value: float) -> bool:
        """Decide once for each rung: a trial that trains a rung again after a kill has its decision."""
        known = {decision.step: decision for decision in record.decisions}
        if step not in known:
            others = [
                decision.value
                for other in self.study.records()
                if other.number != record.number
                for decision in other.decisions
                if decision.step == step
            ]
            known[step] = decide(step, value, others, protected=record.origin == PRESET)
            self.study.decided(record.number, known[step])
        elif not known[step].kept and record.state == "running":  # killed before the study was told
            self.study.prune(record.number)
        return known[step].kept
