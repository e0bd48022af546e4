"""The live line says which trials run, how far they are, and when all will be done."""

from __future__ import annotations

import json

import pytest

from cosa.config import Config, TrainConfig, identity, warmup_identity
from sweeps.planning import folder as folders
from sweeps.planning.plan import make_plan
from sweeps.running.progress import Best, Progress, best_of
from sweeps.running.schedule import Schedule
from sweeps.tables import Arm, Table
from sweeps.tables.metrics import SEG_MIOU

BASE = Config(train=TrainConfig(iterations=200, warmup=100))
TABLE = Table(name="t", title="", reference="a", arms=(Arm("a"), Arm("b", {"csc.weight": 0.0})))


class Sweep:
    """A schedule with a clock that is set by hand."""

    def __init__(self, root):
        self.root, self.now = root, 0.0
        self.plan = make_plan(BASE, [TABLE], [0])
        self.schedule = Schedule(self.plan.trials, slots=1)
        self.progress = Progress(self.schedule, root, done_before=0, clock=lambda: self.now)

    def start(self):
        trial = self.schedule.start_next()
        self.progress.started(trial)
        return trial

    def write(self, trial, step):
        folder = folders.trial_folder(self.root, trial.name)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "journal.jsonl").open("a") as file:
            file.write(json.dumps({"step": step}) + "\n")

    def end(self, trial, *, failed=False):
        self.progress.ended(trial, failed=failed)
        self.schedule.end(trial.name, failed=failed)


@pytest.fixture
def sweep(tmp_path):
    return Sweep(tmp_path)


def test_before_any_speed_is_known_no_time_is_promised(sweep):
    sweep.start()
    assert sweep.progress.line() == "0/3 done | warm-up, seed 0 0/100 | time left not known yet"


def test_the_time_left_follows_from_the_speed_so_far(sweep):
    warmup = sweep.start()
    sweep.write(warmup, 50)
    sweep.now = 10.0  # 0.2 s a step: 10 s more, and twice 20 s
    assert sweep.progress.line() == "0/3 done | warm-up, seed 0 50/100 | 50 s left"


def test_a_forked_arm_counts_from_the_step_it_forks_at(sweep):
    sweep.end(sweep.start())
    arm = sweep.start()
    sweep.now = 5.0
    assert "| a, seed 0 100/200 |" in sweep.progress.line()
    sweep.write(arm, 150)
    sweep.now = 50.0  # 1 s a step: 50 s more, then 100 s
    assert sweep.progress.seconds_left(50.0) is not None
    assert "1/3 done | a, seed 0 150/200 | 2 min left, done at" in sweep.progress.line()


def test_a_resumed_trial_counts_only_what_it_did_since(sweep):
    sweep.end(sweep.start())
    arm = next(iter(sweep.schedule.waiting.values()))
    sweep.write(arm, 180)
    sweep.start()
    sweep.now = 10.0
    sweep.write(arm, 190)  # 1 s a step
    sweep.progress.line()
    assert sweep.progress.seconds_left(10.0) == pytest.approx(10 + 100)


def test_failures_are_counted(sweep):
    sweep.end(sweep.start(), failed=True)
    assert sweep.progress.line().startswith("0/3 done | 3 failed |")


def finish(sweep, trial, score):
    """What the trainer leaves of a finished trial."""
    folder = folders.trial_folder(sweep.root, trial.name)
    folder.mkdir(parents=True, exist_ok=True)
    result = {
        "identity": identity(trial.config),
        "warmup_identity": warmup_identity(trial.config),
        "step": trial.last_step,
        "metrics": {SEG_MIOU: score},
    }
    (folder / "result.json").write_text(json.dumps(result))
    sweep.end(trial)


def test_the_best_trial_so_far_is_named(sweep):
    finish(sweep, sweep.start(), 0.9)  # a warm-up is no result
    finish(sweep, sweep.start(), 0.41)
    assert "| best a, seed 0: label-free mIoU 41.0 |" in sweep.progress.line()
    finish(sweep, sweep.start(), 0.409)
    assert "| best a, seed 0: label-free mIoU 41.0 |" in sweep.progress.line()


def test_the_best_of_what_was_finished_before_counts():
    trials = make_plan(BASE, [TABLE], [0]).trials
    results = {trial.name: {"metrics": {SEG_MIOU: 0.1 * place}} for place, trial in enumerate(trials)}
    assert best_of(trials, results) == Best("b, seed 0", 0.2)
    assert best_of(trials, {}) is None


def test_an_oracle_is_never_the_best_so_far():
    table = Table(name="t", title="", reference="a", arms=(Arm("a"), Arm("GT", {"s2c.source": "gt"})))
    trials = make_plan(BASE, [table], [0]).trials
    results = {trial.name: {"metrics": {SEG_MIOU: 0.9 if trial.config.oracle else 0.2}} for trial in trials}
    assert best_of(trials, results) == Best("a, seed 0", 0.2)


def test_on_a_terminal_each_running_trial_has_a_line_of_its_own(sweep):
    warmup = sweep.start()
    sweep.write(warmup, 50)
    sweep.now = 10.0
    assert sweep.progress.block() == [
        "0/3 done | 50 s left",
        "  warm-up, seed 0  ██████████░░░░░░░░░░      50 of 100",
    ]
