"""The live view says which trials run, how far they are, and when all will be done."""

from __future__ import annotations

import json

import pytest

from cosa.cli.console import LiveLine
from cosa.config import Config, TrainConfig
from sweeps.planning.folder import trial_folder
from sweeps.planning.plan import make_plan
from sweeps.running.progress import SweepProgress, best_so_far, play_forward
from sweeps.running.queue import TrialQueue
from sweeps.tables import Arm, Table, get_table
from sweeps.tables.metrics import SEG_MIOU

BASE = Config(train=TrainConfig(iterations=200, warmup=100))


def plan_of(arms, seeds, base=BASE):
    table = Table(
        name="t",
        title="",
        reference="a",
        arms=tuple(Arm(name, {"csc.weight": 0.1 * place}) for place, name in enumerate("abcd"[:arms])),
    )
    return make_plan(base, [table], range(seeds))


class Sweep:
    """A queue with a clock that is set by hand."""

    def __init__(self, root):
        self.root, self.now = root, 0.0
        self.queue = TrialQueue(plan_of(2, 1).trials, 1, root, clock=lambda: self.now)
        self.progress = self.view()

    def view(self, **settings):
        return SweepProgress(self.queue, lambda: [f"{len(self.queue.ended)}/3 done"], **settings)

    def line(self):
        return self.progress.lines()[0]

    def left(self):
        return self.progress.seconds_left(self.progress.steps())

    def start(self):
        return self.queue.start_next()

    def write(self, trial, step):
        folder = trial_folder(self.root, trial.name)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "journal.jsonl").open("a") as file:
            file.write(json.dumps({"step": step}) + "\n")

    def end(self, trial):
        self.queue.end(trial.name)


@pytest.fixture
def sweep(tmp_path):
    return Sweep(tmp_path)


def test_before_any_speed_is_known_no_time_is_promised(sweep):
    sweep.start()
    assert sweep.line() == "0/3 done | warm-up, seed 0 0/100 | time left not known yet"


def test_the_time_left_follows_from_the_speed_so_far(sweep):
    warmup = sweep.start()
    sweep.write(warmup, 50)
    sweep.now = 10.0  # 0.2 s a step: 10 s more, and twice 20 s
    assert sweep.line() == "0/3 done | warm-up, seed 0 50/100 | 50 s left"


def test_where_more_may_come_no_end_is_foretold(sweep):
    sweep.write(sweep.start(), 50)
    sweep.now = 10.0
    assert sweep.view(all_queued=False).lines()[0] == "0/3 done | warm-up, seed 0 50/100"


def test_a_forked_arm_counts_from_the_step_it_forks_at(sweep):
    sweep.end(sweep.start())
    arm = sweep.start()
    sweep.now = 5.0
    assert "| a, seed 0 100/200 |" in sweep.line()
    sweep.write(arm, 150)
    sweep.now = 50.0  # 1 s a step: 50 s more, then 100 s
    assert sweep.left() == pytest.approx(150)
    assert "1/3 done | a, seed 0 150/200 | 2 min left, done at" in sweep.line()


def test_a_resumed_trial_counts_only_what_it_did_since(sweep):
    sweep.end(sweep.start())
    arm = next(iter(sweep.queue.waiting.values()))
    sweep.write(arm, 180)
    sweep.start()
    sweep.now = 10.0
    sweep.write(arm, 190)  # 1 s a step
    assert sweep.left() == pytest.approx(10 + 100)


def test_a_trial_that_failed_says_nothing_of_the_speed(sweep):
    sweep.queue.end(sweep.start().name, "broken")
    assert sweep.left() is None


def test_on_a_terminal_each_running_trial_has_a_line_of_its_own(sweep):
    warmup = sweep.start()
    sweep.write(warmup, 50)
    sweep.now = 10.0
    assert sweep.progress.lines()[1] == [
        "0/3 done | 50 s left",
        "  warm-up, seed 0  ██████████░░░░░░░░░░      50 of 100",
    ]


SHORT = Config(train=TrainConfig(iterations=10, warmup=4))


def test_time_left_plays_the_queue_forward():
    warmup, *arms = plan_of(3, 1, SHORT).trials
    # The warm-up runs 5 s more; then three arms of 10 s in two slots: 5 + 10 + 10.
    assert play_forward(arms, {warmup.name: 5.0}, lambda _: 10.0, slots=2) == 25.0


def test_time_left_fills_a_free_slot_with_another_seed():
    plan = plan_of(2, 2, SHORT)
    # Warm-ups take 4 s each at once, then four arms of 6 s in two slots.
    assert play_forward(plan.trials, {}, lambda trial: float(trial.steps), slots=2) == 4 + 6 + 6


def test_time_left_of_nothing_is_nothing():
    assert play_forward([], {}, lambda _: 1.0, slots=1) == 0.0


def test_the_best_so_far_is_the_trial_with_the_highest_label_free_miou():
    trials = make_plan(BASE, [get_table("3b")], [0]).trials
    results = {trial.name: {"metrics": {SEG_MIOU: 0.1 * place}} for place, trial in enumerate(trials)}
    assert (
        best_so_far(trials, results) == f"best {trials[-1].label}: label-free mIoU {10 * (len(trials) - 1)}.0"
    )
    assert best_so_far(trials, {}) == ""


def test_a_warmup_or_an_oracle_is_never_the_best_so_far():
    table = Table(name="t", title="", reference="a", arms=(Arm("a"), Arm("GT", {"s2c.source": "gt"})))
    trials = make_plan(BASE, [table], [0]).trials
    results = {trial.name: {"metrics": {SEG_MIOU: 0.2 if trial.arm == "a" else 0.9}} for trial in trials}
    assert best_so_far(trials, results) == "best a, seed 0: label-free mIoU 20.0"


def test_the_best_so_far_is_by_on_where_a_trial_has_no_an():
    table = Table(name="t", title="", reference="a", arms=(Arm("a"), Arm("no-SA", {"cam.source": "online"})))
    trials = make_plan(BASE, [table], [0]).trials
    metrics = {
        "a": {SEG_MIOU: 0.5, "val/online/seg_miou": 0.4},
        "no-SA": {SEG_MIOU: 0.6, "val/online/seg_miou": 0.3},
    }
    results = {trial.name: {"metrics": metrics[trial.arm]} for trial in trials if trial.kind == "trial"}
    assert best_so_far(trials, results) == "best a, seed 0: label-free mIoU 50.0"


def test_how_things_stand_is_told_as_counts_and_as_markdown(sweep):
    warmup = sweep.start()
    sweep.now = 50.0
    sweep.end(warmup)
    trial = sweep.start()
    sweep.write(trial, 120)
    sweep.now = 60.0

    counts, markdown = sweep.view(before=4).standing()

    # half a second a step: 80 steps of this trial and 100 of the one that waits
    assert counts == {
        "sweep/done": 5,
        "sweep/running": 1,
        "sweep/waiting": 1,
        "sweep/failed": 0,
        "sweep/hours_left": pytest.approx(90 / 3600),
    }
    assert markdown.splitlines()[0].startswith("1/3 done · ")
    assert markdown.splitlines()[-1] == f"| {trial.label} | 120 of 200 |"


def test_a_view_tells_how_things_stand_in_the_end(sweep):
    told = []
    view = sweep.view(tell=lambda counts, _: told.append(counts["sweep/running"]))
    with view.shown(LiveLine(), every=0.01):
        sweep.start()
    assert told[-1] == 1
