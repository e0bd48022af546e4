"""Trials start as soon as they may, and never before what they fork from."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cosa.config import Config, TrainConfig
from sweeps.planning.plan import make_plan
from sweeps.running.schedule import Schedule, seconds_left
from sweeps.tables import Arm, Table

BASE = Config(train=TrainConfig(iterations=10, warmup=4))


def plan_of(arms, seeds):
    changes = [{"csc.weight": 0.1 * (i + 1)} for i in range(arms)]
    table = Table(
        name="t", title="", reference="a0", arms=tuple(Arm(f"a{i}", c) for i, c in enumerate(changes))
    )
    return make_plan(BASE, [table], range(seeds))


def start_all(schedule):
    started = []
    while (trial := schedule.start_next()) is not None:
        started.append(trial.label)
    return started


def test_arms_of_one_seed_start_while_another_seed_still_warms_up():
    plan = plan_of(arms=2, seeds=2)
    schedule = Schedule(plan.trials, slots=2)
    assert start_all(schedule) == ["warm-up, seed 0", "warm-up, seed 1"]
    schedule.end(plan.trials[0].name, failed=False)
    assert start_all(schedule) == ["a0, seed 0"]
    schedule.end(plan.trials[1].name, failed=False)
    assert start_all(schedule) == ["a1, seed 0"]


def test_nothing_starts_while_its_warmup_runs_even_with_a_free_slot():
    schedule = Schedule(plan_of(arms=2, seeds=1).trials, slots=2)
    assert start_all(schedule) == ["warm-up, seed 0"]
    assert not schedule.exhausted


def test_a_warmup_finished_earlier_holds_nothing_up():
    plan = plan_of(arms=2, seeds=1)
    schedule = Schedule(plan.remaining([plan.trials[0].name]), slots=1)
    assert start_all(schedule) == ["a0, seed 0"]


def test_a_failed_warmup_skips_its_own_arms_alone():
    plan = plan_of(arms=2, seeds=2)
    schedule = Schedule(plan.trials, slots=1)
    schedule.start_next()
    schedule.end(plan.trials[0].name, failed=True)
    assert [trial.label for trial in schedule.skipped.values()] == ["a0, seed 0", "a1, seed 0"]
    assert start_all(schedule) == ["warm-up, seed 1"]


def test_a_failed_arm_leaves_the_others_alone():
    plan = plan_of(arms=2, seeds=1)
    schedule = Schedule(plan.trials[1:], slots=1)
    schedule.start_next()
    schedule.end(plan.trials[1].name, failed=True)
    assert start_all(schedule) == ["a1, seed 0"]
    assert schedule.exhausted


@given(
    arms=st.integers(1, 4),
    seeds=st.integers(1, 3),
    slots=st.integers(1, 4),
    choices=st.lists(st.tuples(st.integers(0, 99), st.booleans()), min_size=20, max_size=20),
)
def test_every_trial_ends_once_after_its_warmup_and_within_the_slots(arms, seeds, slots, choices):
    plan = plan_of(arms, seeds)
    schedule = Schedule(plan.trials, slots)
    started = []
    for pick, failed in choices:
        while (trial := schedule.start_next()) is not None:
            assert trial.warmup is None or trial.warmup in schedule.done
            started.append(trial.name)
        assert len(schedule.running) <= slots
        if not schedule.running:
            break
        schedule.end(list(schedule.running)[pick % len(schedule.running)], failed=failed)
    assert schedule.exhausted
    assert len(set(started)) == len(started)
    assert len(started) + len(schedule.skipped) == len(plan.trials)


def test_time_left_plays_the_schedule_forward():
    plan = plan_of(arms=3, seeds=1)
    _, *arms = plan.trials
    # The warm-up runs 5 s more; then three arms of 10 s in two slots: 5 + 10 + 10.
    left = seconds_left(arms, {plan.trials[0].name: 5.0}, lambda _: 10.0, slots=2)
    assert left == 25.0


def test_time_left_fills_a_free_slot_with_another_seed():
    plan = plan_of(arms=2, seeds=2)
    # Warm-ups take 4 s each at once, then four arms of 6 s in two slots.
    left = seconds_left(plan.trials, {}, lambda trial: float(trial.last_step - trial.first_step), slots=2)
    assert left == 4 + 6 + 6


def test_time_left_of_nothing_is_nothing():
    assert seconds_left([], {}, lambda _: 1.0, slots=1) == 0.0
