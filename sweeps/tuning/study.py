"""The search's memory: an Optuna study that outlives every process, and how the next trial is suggested.

Only the driver writes it, one record appended to OUT/study.journal at a time. A file that is only appended to
survives kill -9 and network file systems, and a dashboard that reads it never locks the search out:

    optuna-dashboard OUT/study.journal
"""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState

from cosa.config import MACHINE_FIELDS, Config, difference, from_json, override, to_json
from sweeps.tuning.record import Record, State, failed
from sweeps.tuning.rungs import Decision
from sweeps.tuning.space import Space

JOURNAL = "study.journal"

_STUDY = "search"
_SPACE, _BASE, _RUNGS = "space", "config", "rungs"
_ORIGIN, _DECISIONS, _REASON, _REPEATS = "origin", "decisions", "reason", "repeats"
_STARTUP = 10  # trials before TPE replaces random ones; the paper's rows are among them
_STATES: Mapping[TrialState, State] = {
    TrialState.RUNNING: "running",
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.WAITING: "waiting",
}


class SearchStudy:
    """The study of one search."""

    def __init__(self, storage: BaseStorage, space: Space, base: Config, seed: int) -> None:
        """Open the study in `storage`, made if there is none.

        Args:
            storage: Where it is kept.
            space: What is varied, resolved for `base`.
            base: What every trial starts from.
            seed: Of the suggestions.

        Raises:
            ValueError: The study is one of another space or of other settings.
        """
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._storage = storage
        self._space = space
        self._base = base
        self._seed = seed
        self._study = optuna.create_study(
            storage=storage, study_name=_STUDY, direction="maximize", load_if_exists=True
        )
        self._study_id = storage.get_study_id_from_name(_STUDY)
        if not _check_known(self._study.user_attrs, space, base):
            self._study.set_user_attr(_SPACE, space.texts())
            self._study.set_user_attr(_BASE, to_json(base))

    def describe(self, metric: str, rungs: Sequence[int]) -> None:
        """Say in the study what it maximises and where trials are judged, for those who open it."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self._study.set_metric_names([metric])
        if self._study.user_attrs.get(_RUNGS) != list(rungs):
            self._study.set_user_attr(_RUNGS, list(rungs))

    def enqueue(self, rows: Mapping[str, Mapping[str, Any]]) -> None:
        """Have the trials of `rows`, parameters by origin, come first; none that the study knows again."""
        known = {trial.user_attrs.get(_ORIGIN) for trial in self._study.trials}
        for origin, parameters in rows.items():
            if origin not in known:
                self._study.enqueue_trial(dict(parameters), user_attrs={_ORIGIN: origin})

    def repeat_failed(self) -> int:
        """Have trials that failed come next, from their checkpoints; returns how many wait for that."""
        known = {trial.user_attrs.get(_REPEATS) for trial in self._study.trials}
        for record in failed(self.records()):
            if record.number not in known:
                attributes = {_ORIGIN: record.origin, _REPEATS: record.number}
                self._study.enqueue_trial(dict(record.parameters), user_attrs=attributes)
        return self.waiting

    def ask(self) -> Record:
        """Begin the next trial. What is suggested follows from the seed, its number and the trials so far."""
        self._study.sampler = self._sampler(sum(t.state != TrialState.WAITING for t in self._study.trials))
        trial = self._study.ask()
        self._space.suggest(trial)
        return self.record(trial.number)

    def complete(self, number: int) -> None:
        """Suggest what a process that was killed in `ask` had not suggested yet."""
        self._study.sampler = self._sampler(number)
        self._space.suggest(optuna.trial.Trial(self._study, self._id(number)))

    def _sampler(self, number: int) -> optuna.samplers.TPESampler:
        """A fresh one for each trial: one that lived on would repeat its first draws after every restart."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return optuna.samplers.TPESampler(
                seed=(self._seed * 1_000_003 + number) % 2**32,
                n_startup_trials=_STARTUP,
                multivariate=True,  # the weights of one loss depend on each other
                group=True,  # so that a conditional setting is modelled among the trials that have it
                constant_liar=True,  # so that trials at the same time differ
            )

    def decided(self, number: int, decision: Decision) -> None:
        """Keep what became of a trial at a rung; one that is not kept is told to be pruned."""
        trial = self._frozen(number)
        if decision.step not in trial.intermediate_values:
            self._storage.set_trial_intermediate_value(self._id(number), decision.step, decision.value)
        decisions = [*trial.user_attrs.get(_DECISIONS, []), dataclasses.asdict(decision)]
        self._storage.set_trial_user_attr(self._id(number), _DECISIONS, decisions)
        if not decision.kept:
            self.prune(number)

    def prune(self, number: int) -> None:
        """The trial has been stopped at a rung, or is one that was tried before."""
        self._study.tell(number, state=TrialState.PRUNED)

    def finish(self, number: int, value: float) -> None:
        """The trial has come to its end; one whose metric is not finite has failed."""
        if math.isfinite(value):
            self._study.tell(number, value)
        else:
            self.fail(number, f"metric must be finite, got {value}")

    def fail(self, number: int, reason: str) -> None:
        """The trial has failed for good."""
        self._storage.set_trial_user_attr(self._id(number), _REASON, reason)
        self._study.tell(number, state=TrialState.FAIL)

    def record(self, number: int) -> Record:
        """One trial."""
        return self._record(self._frozen(number))

    def records(self) -> list[Record]:
        """All trials that were begun, in order."""
        return [self._record(trial) for trial in self._study.trials if trial.state != TrialState.WAITING]

    @property
    def waiting(self) -> int:
        """Rows that wait to be asked for."""
        return sum(trial.state == TrialState.WAITING for trial in self._study.trials)

    def config(self, record: Record, seed: int | None = None) -> Config:
        """What a trial trains, or would train with another seed."""
        changes = dict(record.changes)
        return override(self._base, changes if seed is None else {**changes, "train.seed": seed})

    def importances(self) -> dict[str, float]:
        """How much of the metric's variance over finished trials each parameter explains (fANOVA).

        Of parameters that all finished trials have; empty where there are too few to say, or all are equal.
        """
        try:
            return optuna.importance.get_param_importances(
                self._study, evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0)
            )
        except (ValueError, RuntimeError):
            return {}

    def _id(self, number: int) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._study_id, number)

    def _frozen(self, number: int) -> FrozenTrial:
        return self._storage.get_trial(self._id(number))

    def _record(self, trial: FrozenTrial) -> Record:
        try:
            changes = self._space.changes(trial.params)
        except KeyError:  # its process was killed before all was suggested
            changes = {}
        return Record(
            number=trial.number,
            state=_STATES[trial.state],
            origin=trial.user_attrs.get(_ORIGIN, ""),
            parameters=trial.params,
            changes=changes,
            value=trial.value if trial.state == TrialState.COMPLETE and trial.value is not None else math.nan,
            decisions=tuple(Decision(**found) for found in trial.user_attrs.get(_DECISIONS, [])),
            reason=trial.user_attrs.get(_REASON, ""),
            repeats=trial.user_attrs.get(_REPEATS),
        )


def open_study(root: Path, space: Space, base: Config, seed: int) -> SearchStudy:
    """The study in the search's folder `root`, which this process holds.

    Raises:
        ValueError: It is a study of another space or of other settings.
    """
    path = root / JOURNAL
    _cut_torn_line(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        lock = JournalFileOpenLock(str(path), grace_period=5)  # one that a killed driver left is taken over
        return SearchStudy(JournalStorage(JournalFileBackend(str(path), lock)), space, base, seed)


def peek(root: Path, space: Space, base: Config) -> list[State]:
    """What became of the trials begun so far, while another process may hold the study; changes nothing.

    Raises:
        ValueError: It is a study of another space or of other settings.
    """
    path = root / JOURNAL
    if not path.is_file():
        return []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        storage = JournalStorage(JournalFileBackend(str(path)))
    try:
        study = optuna.load_study(study_name=_STUDY, storage=storage)
    except KeyError:  # a process was killed, or is just about to write it
        return []
    _check_known(study.user_attrs, space, base)
    states = [_STATES[trial.state] for trial in study.trials]
    return [state for state in states if state != "waiting"]


def _cut_torn_line(path: Path) -> None:
    """A process that was killed while it wrote may have left half a line, after which nothing can be read."""
    if not path.is_file():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)


def _check_known(known: Mapping[str, Any], space: Space, base: Config) -> bool:
    """Whether a study says what it is of; a ValueError where that is something else."""
    whole = _SPACE in known and _BASE in known
    if whole:
        _check_same(known[_SPACE], space.texts(), from_json(known[_BASE]), base)
    return whole


def _check_same(
    old_space: Mapping[str, str], space: Mapping[str, str], old_base: Config, base: Config
) -> None:
    """A study is of one space around one preset: trials of another would tell it what is not so."""
    changed = [
        f"{name}: {old_space.get(name, 'not varied')} -> {space.get(name, 'not varied')}"
        for name in dict.fromkeys([*old_space, *space])
        if old_space.get(name) != space.get(name)
    ]
    changed += [
        f"{name}: {json.dumps(old, default=str)} -> {json.dumps(new, default=str)}"
        for name, old, new in difference(old_base, base)
        if name not in MACHINE_FIELDS
    ]
    if changed:
        raise ValueError(
            f"study must be of this space and these settings, got one that differs in {'; '.join(changed)}; "
            f"give what it began with, or choose another --out"
        )
