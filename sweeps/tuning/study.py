"""The search's memory: an Optuna study that outlives every process, and how the next trial is suggested.

Only the driver writes it, one entry appended to OUT/study.journal at a time. A file that is only appended to
survives kill -9 and network file systems, and a dashboard that reads it never locks the search out:

    optuna-dashboard OUT/study.journal

A trial is Optuna's own FrozenTrial. Its parameters are those of the space, its intermediate values the
metric at the pruning steps, and its user attributes say whence it came and what became of it.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState

from cosa.config import MACHINE_FIELDS, Config, difference, from_json, override, to_json
from cosa.networks.published import pinned
from cosa.storage.run_folder import read_metrics
from sweeps.planning.plan import Trial, shared_warmup, trial_of
from sweeps.tables.metrics import SEG_MIOU, judged_key
from sweeps.tuning.space import Space

JOURNAL = "study.journal"
PRESET = "full"
"""Origin of the preset itself."""
LEAST = 4
"""Trials that must have reached a pruning step before any is stopped there."""

_STUDY = "search"
_SPACE, _BASE, _STEPS = "space", "config", "rungs"  # user attributes of the study
_ORIGIN, _PRUNED_AT, _REASON, _REPEATS = "origin", "pruned_at", "reason", "repeats"  # of a trial
_STARTUP = 10  # trials before TPE replaces random ones; the paper's rows are among them


def origin(trial: FrozenTrial) -> str:
    """The paper's row that a trial is, `5a/s2c-x2`; empty where it was suggested."""
    return str(trial.user_attrs.get(_ORIGIN, ""))


def label(trial: FrozenTrial) -> str:
    """`12`, or `0 full` for one of the paper's rows."""
    return f"{trial.number} {origin(trial).rpartition('/')[2]}".strip()


def state(trial: FrozenTrial) -> str:
    """`running`, `complete`, `pruned` or `failed`."""
    return "failed" if trial.state == TrialState.FAIL else trial.state.name.lower()


def reason(trial: FrozenTrial) -> str:
    """Why a trial failed."""
    return str(trial.user_attrs.get(_REASON, ""))


def last_value(trial: FrozenTrial) -> float:
    """The metric at the end, else at the last pruning step that a trial reached; NaN before any."""
    if trial.state == TrialState.COMPLETE:
        return float(trial.values[0])
    step = trial.last_step
    return math.nan if step is None else trial.intermediate_values[step]


def finished(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Trials that came to their end, the best one first."""
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    return sorted(complete, key=lambda trial: (-last_value(trial), trial.number))


def failed(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Trials that failed and were not tried again since."""
    repeated = {trial.user_attrs.get(_REPEATS) for trial in trials}
    return [t for t in trials if t.state == TrialState.FAIL and t.number not in repeated]


def begun(trials: Sequence[FrozenTrial]) -> int:
    """Trials that count for the budget: one that is tried again counts once."""
    return sum(_REPEATS not in trial.user_attrs for trial in trials)


def objective(config: Config) -> str:
    """The metric that a trial of these settings is judged by: label-free mIoU, of ON where it has no AN."""
    return judged_key(SEG_MIOU, config.judged_network)


def metric_by_step(folder: Path, steps: Container[int], config: Config) -> dict[int, float]:
    """What the journal of a run says of its objective at those of `steps` where it was evaluated."""
    key = objective(config)
    return {
        step: float(metrics[key])
        for step, metrics in read_metrics(folder)
        if step in steps and key in metrics
    }


def in_worst_third(value: float, others: Sequence[float]) -> bool:
    """Whether a value is in the worst third of all that came to its step so far: asynchronous halving.

    Optuna's PercentilePruner compares with finished trials alone, which are the survivors of its own cuts, so
    that it stops ever more than a third; its SuccessiveHalvingPruner keeps half at most. With a rank
    correlation of 0.38 between the step and the end, the best of 30 is in the worse half there one time in
    five, in the worst third one in ten.

    Args:
        value: The metric, higher being better; NaN is worse than everything.
        others: The metric of all others that were there before it; fewer than LEAST in all stop nobody.
    """
    count = len(others) + 1
    rank = 1 + sum(other > (-math.inf if math.isnan(value) else value) for other in others)
    return count >= LEAST and rank > count - count // 3


def _experimental() -> AbstractContextManager[object]:
    """Within it Optuna does not warn of what it calls experimental."""
    return warnings.catch_warnings(action="ignore", category=optuna.exceptions.ExperimentalWarning)


class SearchStudy:
    """The study of one search."""

    def __init__(self, storage: BaseStorage, space: Space, base: Config) -> None:
        """Open the study in `storage`, made if there is none.

        Args:
            storage: Where it is kept.
            space: What is varied, resolved for `base`.
            base: What every trial starts from; its seed is that of the suggestions, too.

        Raises:
            ValueError: The study is one of another space or of other settings.
        """
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.space, self._storage, self._base = space, storage, base
        self._study = optuna.create_study(
            storage=storage, study_name=_STUDY, direction="maximize", load_if_exists=True
        )
        self._study_id = storage.get_study_id_from_name(_STUDY)
        if {_SPACE, _BASE} <= set(self._study.user_attrs):
            _require_same(self._study.user_attrs, space, base)
        else:
            self._study.set_user_attr(_SPACE, space.texts())
            self._study.set_user_attr(_BASE, to_json(base))

    def describe(self, steps: Sequence[int]) -> None:
        """Say in the study what it maximises and where trials are judged, for those who open it."""
        with _experimental():
            self._study.set_metric_names([SEG_MIOU])
        if self._study.user_attrs.get(_STEPS) != list(steps):
            self._study.set_user_attr(_STEPS, list(steps))

    def enqueue(self, rows: Mapping[str, Mapping[str, Any]]) -> None:
        """Have the trials of `rows`, parameters by origin, come first; none that the study knows again."""
        known = {trial.user_attrs.get(_ORIGIN) for trial in self._study.trials}
        for name, parameters in rows.items():
            if name not in known:
                self._study.enqueue_trial(dict(parameters), user_attrs={_ORIGIN: name})

    def repeat_failed(self) -> int:
        """Have trials that failed come next, from their checkpoints; returns how many wait for that."""
        for trial in failed(self._study.trials):
            attributes = {_ORIGIN: origin(trial), _REPEATS: trial.number}
            self._study.enqueue_trial(trial.params, user_attrs=attributes)
        return self.waiting

    def ask(self) -> FrozenTrial:
        """Begin the next trial. What is suggested follows from the seed, its number and the trials so far."""
        self._study.sampler = self._sampler(len(self.trials))
        trial = self._study.ask()
        self.space.suggest(trial)
        return self.trial(trial.number)

    def complete(self, number: int) -> FrozenTrial:
        """Suggest what a process that was killed in `ask` had not suggested yet."""
        self._study.sampler = self._sampler(number)
        self.space.suggest(optuna.trial.Trial(self._study, self._id(number)))
        return self.trial(number)

    def _sampler(self, number: int) -> optuna.samplers.TPESampler:
        """A fresh one for each trial: one that lived on would repeat its first draws after every restart."""
        with _experimental():
            return optuna.samplers.TPESampler(
                seed=(self._base.train.seed * 1_000_003 + number) % 2**32,
                n_startup_trials=_STARTUP,
                multivariate=True,  # the weights of one loss depend on each other
                group=True,  # so that a conditional setting is modelled among the trials that have it
                constant_liar=True,  # so that trials at the same time differ
            )

    def report(self, number: int, step: int, value: float) -> bool:
        """Judge a running trial at a pruning step; returns whether it goes on.

        It is judged once: one that comes there again after a kill has its judgement. The preset, which all
        others are held against, goes on in any case.
        """
        trial = self.trial(number)
        if step not in trial.intermediate_values:
            before = [t.intermediate_values[step] for t in self.trials if step in t.intermediate_values]
            if origin(trial) != PRESET and in_worst_third(value, before):
                self._storage.set_trial_user_attr(self._id(number), _PRUNED_AT, step)
            self._storage.set_trial_intermediate_value(self._id(number), step, value)
            trial = self.trial(number)
        pruned = trial.user_attrs.get(_PRUNED_AT) == step
        if pruned and trial.state == TrialState.RUNNING:
            self.prune(number)
        return not pruned

    def prune(self, number: int) -> None:
        """The trial has been stopped on its way, or is one that was tried before."""
        self._study.tell(number, state=TrialState.PRUNED)

    def finish(self, number: int, value: float) -> None:
        """The trial has come to its end; one whose metric is not finite has failed."""
        if math.isfinite(value):
            self._study.tell(number, value)
        else:
            self.fail(number, f"metric must be finite, got {value}")

    def fail(self, number: int, why: str) -> None:
        """The trial has failed for good."""
        self._storage.set_trial_user_attr(self._id(number), _REASON, why)
        self._study.tell(number, state=TrialState.FAIL)

    def trial(self, number: int) -> FrozenTrial:
        """One trial."""
        return self._storage.get_trial(self._id(number))

    @property
    def trials(self) -> list[FrozenTrial]:
        """All trials that were begun, in order."""
        return [trial for trial in self._study.trials if trial.state != TrialState.WAITING]

    @property
    def waiting(self) -> int:
        """Rows that wait to be asked for."""
        return sum(trial.state == TrialState.WAITING for trial in self._study.trials)

    def changes(self, trial: FrozenTrial) -> dict[str, Any]:
        """The settings that a trial changes in the preset; none before all of them are suggested."""
        try:
            return self.space.changes(trial.params)
        except KeyError:  # its process was killed in `ask`
            return {}

    def config(self, trial: FrozenTrial) -> Config:
        """What a trial trains."""
        return pinned(override(self._base, self.changes(trial)))

    def runs(self, trial: FrozenTrial) -> tuple[Trial, ...]:
        """What trains a trial, after the warm-up that it forks from, if it has one.

        Every trial shares its warm-up, which carries an AN of every momentum, with those to come, so that
        even the first one forks.
        """
        config, base = self.config(trial), self._base
        row, seed = f"search/{label(trial).replace(' ', '-')}", config.train.seed
        if config.train.warmup == 0:
            return (trial_of(config, seed, (row,)),)
        others = tuple(momentum for momentum in self.space.momenta if momentum != base.ema.momentum)
        warmup = shared_warmup(config, base, ("search/",), others)
        return warmup, trial_of(config, seed, (row,), warmup)

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


def open_study(root: Path, space: Space, base: Config) -> SearchStudy:
    """The study in the search's folder `root`, which this process holds.

    Raises:
        ValueError: It is a study of another space or of other settings.
    """
    path = root / JOURNAL
    if path.is_file():  # a process that was killed may have left half a line, which nobody can read on from
        whole = path.read_bytes().rpartition(b"\n")
        with path.open("r+b") as file:
            file.truncate(len(whole[0]) + len(whole[1]))
    with _experimental():
        lock = JournalFileOpenLock(str(path), grace_period=5)  # one that a killed driver left is taken over
        storage = JournalStorage(JournalFileBackend(str(path), lock))
    return SearchStudy(storage, space, base)


def peek(root: Path, space: Space, base: Config) -> Counter[str]:
    """Trials begun so far by state, while another process may hold the study; changes nothing.

    Raises:
        ValueError: It is a study of another space or of other settings.
    """
    if not (root / JOURNAL).is_file():
        return Counter()
    with tempfile.TemporaryDirectory() as copy:
        shutil.copy(root / JOURNAL, copy)
        return Counter(state(trial) for trial in open_study(Path(copy), space, base).trials)


def _require_same(known: Mapping[str, Any], space: Space, base: Config) -> None:
    """Refuse another space or another preset: trials of theirs would tell the study what is not so."""
    old, new, none = known[_SPACE], space.texts(), "not varied"
    pairs = [(name, old.get(name, none), new.get(name, none)) for name in {**old, **new}]
    changed = [f"{name}: {before} -> {now}" for name, before, now in pairs if before != now]
    changed += [
        f"{name}: {json.dumps(before, default=str)} -> {json.dumps(now, default=str)}"
        for name, before, now in difference(from_json(known[_BASE]), base)
        if name not in MACHINE_FIELDS
    ]
    if changed:
        raise ValueError(
            f"study must be of this space and these settings, got one that differs in {'; '.join(changed)}; "
            f"give what it began with, or choose another --out"
        )
