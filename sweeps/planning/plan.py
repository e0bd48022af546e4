"""What a sweep will train: rows of tables x seeds, made into distinct trials that share their warm-ups.

Two rows with the same Config are one trial. Trials whose warm-up phases are the same fork from one warm-up,
which is a trial of its own that stops where co-training would start. Standalone networks learn from the
pseudo-labels of their seed's full model; writing those is a trial of its own, too.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from cosa import config as configs
from cosa.config import COTRAINING_SECTIONS, Config, identity, override, warmup_identity
from cosa.networks.published import pinned
from sweeps.runs import RUN_KEY
from sweeps.tables import Table


@dataclass(frozen=True)
class Trial:
    """One run of the trainer."""

    name: str
    """Name of its folder: of seed and identity alone, so that every sweep that holds it finds it again."""
    kind: Literal["warmup", "trial", "labels"]
    """`warmup` stops after `train.warmup` steps and is there to be forked from; `labels` trains nothing: it
    writes the pseudo-labels of the training images, for standalone networks."""
    config: Config
    """All of its settings; those of the network whose pseudo-labels they are."""
    seed: int
    """`train.seed` of its config."""
    arms: tuple[str, ...]
    """Rows that it fills, `3a/full`; for a warm-up or pseudo-labels those of the trials that wait for it."""
    warmup: str | None
    """Name of the trial that it forks from, if it shares its warm-up."""
    momenta: tuple[float, ...] = ()
    """Momenta of the further ANs that a warm-up carries for its arms (Tab. 5d)."""
    source: str | None = None
    """Name of the trial that has what it works on: its pseudo-labels or, for those, the network."""

    @property
    def after(self) -> str | None:
        """Name of the trial that must be finished before it starts."""
        return self.warmup or self.source

    @property
    def identity(self) -> str:
        """The experiment's identity; a warm-up's is that of its phase alone."""
        return warmup_identity(self.config) if self.kind == "warmup" else identity(self.config)

    @property
    def label(self) -> str:
        """How people read it: `GC+SA, seed 0`."""
        return f"{self.arm}, seed {self.seed}"

    @property
    def arm(self) -> str:
        """The first of its rows' names, `warm-up`, or `pseudo-labels`."""
        other = {"warmup": "warm-up", "labels": "pseudo-labels"}
        return other.get(self.kind) or self.arms[0].partition("/")[2]

    @property
    def first_step(self) -> int:
        """Steps that it gets from its warm-up."""
        return self.config.train.warmup if self.warmup else 0

    @property
    def last_step(self) -> int:
        """Steps after which it is finished; 0 for pseudo-labels."""
        train = self.config.train
        return {"warmup": train.warmup, "labels": 0}.get(self.kind, train.iterations)

    @property
    def steps(self) -> int:
        """Steps that it trains itself."""
        return self.last_step - self.first_step


@dataclass(frozen=True)
class Plan:
    """All trials of a sweep; each comes after the one that it waits for."""

    base: Config
    """Settings of every arm, before the arm's own changes."""
    tables: tuple[Table, ...]
    """Their relative values worked out for `base`."""
    seeds: tuple[int, ...]
    trials: tuple[Trial, ...]

    def named(self, name: str) -> Trial:
        """The trial called `name`."""
        return next(trial for trial in self.trials if trial.name == name)

    @property
    def iterations(self) -> int:
        """Iterations of the plan."""
        return sum(trial.steps for trial in self.trials)

    @property
    def distinct_iterations(self) -> int:
        """Iterations of the distinct trials, if each trained its own warm-up."""
        return sum(trial.last_step for trial in self.trials if trial.kind == "trial")

    @property
    def row_iterations(self) -> int:
        """Iterations of running every row of every table on its own, before equal ones are merged."""
        return sum(trial.last_step * len(trial.arms) for trial in self.trials if trial.kind == "trial")

    def remaining(self, finished: Collection[str]) -> list[Trial]:
        """Trials still to run; warm-ups and pseudo-labels only where one that waits for them is, too."""
        needed: set[str | None] = set()
        for trial in reversed(self.trials):
            if trial.name not in finished and (trial.kind == "trial" or trial.name in needed):
                needed |= {trial.name, trial.after}
        return [trial for trial in self.trials if trial.name in needed - set(finished)]


def make_plan(base: Config, tables: Sequence[Table], seeds: Sequence[int]) -> Plan:
    """The distinct trials of `tables` over `seeds`, in the order in which they are worth starting.

    Args:
        base: Settings of every arm, before the arm's own changes.
        tables: Tables to fill.
        seeds: Values of `train.seed`.

    Raises:
        ValueError, TypeError: An arm gives a setting a value against its law.
    """
    base = pinned(base)
    tables = tuple(table.resolved(base) for table in tables)
    trials: list[Trial] = []
    for seed in seeds:
        seeded = override(base, {"train.seed": seed})
        rows: dict[str, tuple[Config, list[str]]] = {}  # by the identity of their config
        for table in tables:
            for arm in table.arms:
                row = f"{table.name}/{arm.name}"
                try:
                    config = pinned(override(seeded, arm.changes))
                except (ValueError, TypeError) as error:
                    raise type(error)(f"arm {row}: {error}") from None
                rows.setdefault(identity(config), (config, []))[1].append(row)
        trials += _trials_of_seed(seeded, list(rows.values()))
    return Plan(base, tables, tuple(seeds), tuple(trials))


def _trials_of_seed(base: Config, rows: Sequence[tuple[Config, Sequence[str]]]) -> Iterator[Trial]:
    """Each warm-up that two or more trials share, followed by its trials; then those that stand alone.

    Standalone networks come last, behind the pseudo-labels of `base` that they learn from.
    """
    phases: dict[str, list[tuple[Config, Sequence[str]]]] = {}
    for config, arms in rows:
        if config.network.architecture == "cosa":
            phases.setdefault(warmup_identity(config), []).append((config, arms))
    for forks in phases.values():
        first, warmup = forks[0][0], None
        if len(forks) > 1 and first.train.warmup > 0:
            every = tuple(row for _, arms in forks for row in arms)
            momenta = sorted({config.ema.momentum for config, _ in forks} - {base.ema.momentum})
            yield (warmup := shared_warmup(first, base, every, momenta))
        for config, arms in forks:
            yield trial_of(config, base.train.seed, tuple(arms), warmup)
    standalone = [(config, arms) for config, arms in rows if config.network.architecture != "cosa"]
    labels = None
    if taught := tuple(row for config, arms in standalone for row in arms if not config.oracle):
        full = trial_of(base, base.train.seed, ())
        if all(identity(config) != identity(base) for config, _ in rows):
            raise ValueError(
                f"tables must hold an arm without changes beside {taught[0]}, which learns from its "
                "pseudo-labels, got none; add it"
            )
        name = full.name.replace("trial", "labels", 1)
        yield (labels := Trial(name, "labels", base, base.train.seed, taught, None, source=full.name))
    for config, arms in standalone:
        trial = trial_of(config, base.train.seed, tuple(arms))
        yield trial if config.oracle or labels is None else replace(trial, source=labels.name)


def trial_of(config: Config, seed: int, arms: tuple[str, ...], warmup: Trial | None = None) -> Trial:
    """The trial that trains `config` for the rows `arms`, from its shared `warmup` if it has one."""
    name = f"trial-seed{seed}-{identity(config)[:8]}"
    return Trial(name, "trial", config, seed, arms, warmup.name if warmup else None)


def shared_warmup(config: Config, base: Config, arms: tuple[str, ...], momenta: Sequence[float]) -> Trial:
    """The warm-up that trials such as `config` share: all that only co-training reads is as `base` has it.

    So the same warm-up is the same config. Its evaluations read thresholds and perplexities there, too, and
    judge the AN of the base's EMA.

    Args:
        config: Of one of its trials.
        base: What its trials change, with their seed.
        arms: Rows that its trials fill.
        momenta: Of the further ANs that it carries. A list and a tuple make two names: they stand in it as
            Python writes them, and folders of earlier versions must be found again.
    """
    seed = base.train.seed
    carried = f"{warmup_identity(config)} {base.ema.momentum} {momenta}"
    name = f"warmup-seed{seed}-{hashlib.sha256(carried.encode()).hexdigest()[:8]}"
    sections = {section: getattr(base, section) for section in COTRAINING_SECTIONS | {"ema"}}
    return Trial(name, "warmup", config.replace(**sections), seed, arms, None, tuple(momenta))


def draw_tree(plan: Plan, finished: Collection[str] = (), reused: Collection[str] = ()) -> str:
    """The plan as a tree, with what sharing saves, what is finished, and what is taken from earlier runs."""
    marks = {**dict.fromkeys(reused, "finished in an earlier run"), **dict.fromkeys(finished, "finished")}
    kinds = Counter(trial.kind for trial in plan.trials)
    rows = sum(len(trial.arms) for trial in plan.trials if trial.kind == "trial")
    tables = ", ".join(table.name for table in plan.tables)
    headline = (
        f"tables {tables} x {counted(len(plan.seeds), 'seed')}: {counted(rows, 'row')}, "
        f"{counted(kinds['trial'], 'distinct trial')}, {counted(kinds['warmup'], 'shared warm-up')}"
    )
    lines = [headline]
    lines += _branches(plan, None, "", marks)
    alone, distinct, planned = plan.row_iterations, plan.distinct_iterations, plan.iterations
    lines.append(
        f"iterations: {alone:,} for every row on its own, {distinct:,} with equal rows merged, "
        f"{planned:,} with shared warm-ups ({planned / alone:.0%} of all rows, saves {alone - planned:,})"
    )
    remaining = plan.remaining(marks)
    if len(remaining) < len(plan.trials):
        taken = len(set(reused) - set(finished))
        lines.append(
            f"finished already: {sum(trial.name in finished for trial in plan.trials)}; "
            + (f"taken from earlier runs: {taken}; " if taken else "")
            + f"left to train: {counted(len(remaining), 'trial')}, "
            f"{sum(trial.steps for trial in remaining):,} iterations"
        )
    return "\n".join(lines)


def counted(number: int, noun: str) -> str:
    """`1 trial`, `2 trials`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _branches(plan: Plan, after: str | None, margin: str, marks: Mapping[str, str]) -> Iterator[str]:
    """The trials that wait for the one called `after`, each followed by those that wait for it."""
    trials = [trial for trial in plan.trials if trial.after == after]
    for trial in trials:
        branch, inner = ("└─ ", "   ") if trial is trials[-1] else ("├─ ", "│  ")
        rows = "  " + " ".join(trial.arms) if trial.kind == "trial" else ""
        rows += "  (oracle: trains on ground-truth masks)" if trial.config.oracle else ""
        mark = f"  {marks[trial.name]}" if trial.name in marks else ""
        steps = "" if trial.kind == "labels" else f"{trial.steps:>9,} iterations"
        yield (f"{margin}{branch}{trial.label}".ljust(36) + f"{steps}{rows}{mark}").rstrip()
        yield from _branches(plan, trial.name, margin + inner, marks)


def to_json(plan: Plan, reused: Mapping[str, str] | None = None) -> str:
    """What a report must know of the plan: its tables, yours among them, and which trial fills which row.

    Args:
        plan: The plan.
        reused: Ids of the earlier runs that stand for trials, by the trials' names.
    """
    runs = reused or {}
    content = {
        "config": json.loads(configs.to_json(plan.base)),
        "tables": [table.to_dict() for table in plan.tables],
        "seeds": plan.seeds,
        "trials": [
            {
                "name": trial.name,
                "kind": trial.kind,
                "seed": trial.seed,
                "arms": trial.arms,
                "warmup": trial.warmup,
                "identity": trial.identity,
                "iterations": trial.steps,
                **({"source": trial.source} if trial.source else {}),
                **({RUN_KEY: runs[trial.name]} if trial.name in runs else {}),
            }
            for trial in plan.trials
        ],
    }
    return json.dumps(content, indent=2) + "\n"
