"""Trials start as soon as they may, and never before what they fork from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cosa.config import Config, TrainConfig
from cosa.config.presets import get_preset
from sweeps.planning.plan import make_plan
from sweeps.running.progress import play_forward
from sweeps.running.queue import TrialQueue
from sweeps.tables import Arm, Table, get_table

BASE = Config(train=TrainConfig(iterations=10, warmup=4))
NOWHERE = Path("/none")


def plan_of(arms, seeds):
    changes = [{"csc.weight": 0.1 * (i + 1)} for i in range(arms)]
    table = Table(
        name="t", title="", reference="a0", arms=tuple(Arm(f"a{i}", c) for i, c in enumerate(changes))
    )
    return make_plan(BASE, [table], range(seeds))


def start_all(queue):
    started = []
    while (trial := queue.start_next()) is not None:
        started.append(trial.label)
    return started


def test_arms_of_one_seed_start_while_another_seed_still_warms_up():
    plan = plan_of(arms=2, seeds=2)
    queue = TrialQueue(plan.trials, 2, NOWHERE)
    assert start_all(queue) == ["warm-up, seed 0", "warm-up, seed 1"]
    queue.end(plan.trials[0].name)
    assert start_all(queue) == ["a0, seed 0"]
    queue.end(next(t.name for t in plan.trials if t.label == "warm-up, seed 1"))
    assert start_all(queue) == ["a1, seed 0"]


def test_a_seeds_warmup_comes_before_the_trials_of_the_seed_ahead_of_it():
    queue = TrialQueue(plan_of(arms=2, seeds=3).trials, 1, NOWHERE)
    assert [trial.label for trial in queue.waiting.values()] == [
        *("warm-up, seed 0", "warm-up, seed 1", "a0, seed 0", "a1, seed 0"),
        *("warm-up, seed 2", "a0, seed 1", "a1, seed 1", "a0, seed 2", "a1, seed 2"),
    ]


def test_two_slots_idle_at_most_2_percent_of_the_time_with_three_seeds():
    plan = make_plan(get_preset("shapes"), [get_table("3a"), get_table("3b")], range(3))
    queue = TrialQueue(plan.trials, 2, NOWHERE)
    wall = play_forward(list(queue.waiting.values()), {}, lambda trial: float(trial.steps), 2)
    assert plan.iterations >= 0.98 * 2 * wall


def test_nothing_starts_while_its_warmup_runs_even_with_a_free_slot():
    queue = TrialQueue(plan_of(arms=2, seeds=1).trials, 2, NOWHERE)
    assert start_all(queue) == ["warm-up, seed 0"]
    assert queue.waiting


def test_a_warmup_finished_earlier_holds_nothing_up():
    plan = plan_of(arms=2, seeds=1)
    queue = TrialQueue(plan.remaining([plan.trials[0].name]), 1, NOWHERE)
    assert start_all(queue) == ["a0, seed 0"]


def test_a_failed_model_keeps_its_pseudo_labels_and_what_they_teach_from_starting():
    network = {"network.architecture": "upernet", "network.encoder": "resnet18", "network.pretrained": False}
    table = Table(name="t", title="", reference="a", arms=(Arm("a"), Arm("b", network)))
    full, labels, taught, *others = make_plan(BASE, [table], [0, 1]).trials
    queue = TrialQueue([full, labels, taught, *others], 1, NOWHERE)

    queue.start_next()
    queue.end(full.name, "broken")

    assert queue.failures == {
        full.name: "broken",
        labels.name: f"not run: {full.name} failed",
        taught.name: f"not run: {labels.name} failed",
    }
    assert [trial.name for trial in queue.waiting.values()] == [trial.name for trial in others]


def test_a_failed_warmup_keeps_its_own_arms_alone_from_starting():
    plan = plan_of(arms=2, seeds=2)
    warmup, *arms = plan.trials[:3]
    queue = TrialQueue(plan.trials, 1, NOWHERE)
    queue.start_next()
    queue.end(warmup.name, "broken")
    assert queue.failures == {
        warmup.name: "broken",
        **{arm.name: f"not run: {warmup.name} failed" for arm in arms},
    }
    assert start_all(queue) == ["warm-up, seed 1"]


def test_a_failed_arm_leaves_the_others_alone():
    plan = plan_of(arms=2, seeds=1)
    queue = TrialQueue(plan.trials[1:], 1, NOWHERE)
    queue.start_next()
    queue.end(plan.trials[1].name, "broken")
    assert start_all(queue) == ["a1, seed 0"]
    assert not queue.waiting


@pytest.mark.parametrize(("journal", "steps"), [(None, 6), (8, 2)])
def test_what_ended_tells_its_time_and_the_steps_it_had_to_do(tmp_path, journal, steps):
    arm = plan_of(arms=2, seeds=1).trials[1]
    now = [100.0]
    if journal:
        folder = tmp_path / "trials" / arm.name
        folder.mkdir(parents=True)
        (folder / "journal.jsonl").write_text(json.dumps({"step": journal}) + "\n")
    queue = TrialQueue([arm], 1, tmp_path, clock=lambda: now[0])
    queue.start_next()
    now[0] = 107.0
    queue.end(arm.name)
    (ended,) = queue.ended
    assert (ended.seconds, ended.steps, ended.why) == (7.0, steps, "")


@given(
    arms=st.integers(1, 4),
    seeds=st.integers(1, 3),
    slots=st.integers(1, 4),
    choices=st.lists(st.tuples(st.integers(0, 99), st.booleans()), min_size=20, max_size=20),
)
def test_every_trial_ends_once_after_its_warmup_and_within_the_slots(arms, seeds, slots, choices):
    plan = plan_of(arms, seeds)
    queue = TrialQueue(plan.trials, slots, NOWHERE)
    started = []
    for pick, failed in choices:
        while (trial := queue.start_next()) is not None:
            done = {ended.trial.name for ended in queue.ended if not ended.why}
            assert trial.warmup is None or trial.warmup in done
            started.append(trial.name)
        assert len(queue.running) <= slots
        if not queue.running:
            break
        queue.end(list(queue.running)[pick % len(queue.running)], "broken" if failed else "")
    assert not queue.waiting
    assert len(set(started)) == len(started)
    assert {*started, *queue.failures} == {trial.name for trial in plan.trials}
