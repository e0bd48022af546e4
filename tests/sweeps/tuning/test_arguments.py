"""What a search's command line asks for: budget over several starts, pruning steps, first rows."""

from __future__ import annotations

import pytest

from cosa.config import TrainConfig
from cosa.config.presets import get_preset
from sweeps.tuning.arguments import Budget, Limits, paper_rows, pruning_steps, read_arguments


@pytest.mark.parametrize(
    ("limits", "spent", "left"),
    [
        (Limits(trials=3), (2, 1e9), True),
        (Limits(trials=3), (3, 0), False),
        (Limits(hours=0.5), (99, 1799), True),
        (Limits(hours=0.5), (0, 1800), False),
        (Limits(gpu_hours=2), (99, 3599), True),
        (Limits(gpu_hours=2), (0, 3600), False),
        (Limits(trials=3, hours=1), (1, 3600), False),
    ],
)
def test_the_first_limit_reached_ends_the_search(limits, spent, left, tmp_path):
    trials, now = 0, 0.0
    budget = Budget(limits, tmp_path / "spent.json", gpus=2, clock=lambda: now)
    trials, now = spent
    budget.note(running=1)
    assert budget.left(trials) is left


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"trials": 0}, "--trials must be > 0, got 0"),
        ({"hours": 0.0}, "--hours must be > 0, got 0"),
        ({"gpu_hours": -1.0}, "--gpu-hours must be > 0, got -1"),
        ({"hours": float("inf")}, "--hours must be > 0, got inf"),
        ({"hours": float("nan")}, "--hours must be > 0, got nan"),
    ],
)
def test_a_budget_of_nothing_is_refused(limits, message):
    with pytest.raises(ValueError, match=message):
        Limits(**limits)


def test_a_budget_counts_hours_of_wall_time_and_of_gpus_over_restarts(tmp_path):
    path = tmp_path / "spent.json"
    now = 100.0
    budget = Budget(Limits(), path, gpus=0.5, clock=lambda: now)
    now = 110.0
    budget.note(running=4)
    now = 115.0
    budget.note(running=0)
    now = 7.0  # another process, whose clock starts anew
    again = Budget(Limits(), path, gpus=0.5, clock=lambda: now)
    now = 9.0
    again.note(running=1)
    read = Budget(Limits(), path)
    assert (read.seconds, read.gpu_seconds) == (17.0, 10 * 4 * 0.5 + 2 * 0.5)


def test_nothing_is_spent_where_there_is_no_account(tmp_path):
    budget = Budget(Limits(), tmp_path / "spent.json")
    assert (budget.seconds, budget.gpu_seconds) == (0.0, 0.0)


def test_without_a_limit_it_is_thirty_trials():
    assert str(read_arguments(["--preset", "shapes"]).limits) == "30 trials"
    assert str(read_arguments(["--preset", "shapes", "--hours", "2"]).limits) == "2 hours"


def test_the_papers_rows_come_nearest_first_after_the_preset():
    args = read_arguments(["--preset", "voc"])
    rows = paper_rows(args.sweep.tables, args.base)
    names = [origin.rpartition("/")[2] for origin in rows]
    assert names[0] == "full"
    assert names.index("no-DT") < names.index("s2c-x2") < names.index("s2c-x4")
    assert len(set(rows.values())) == len(rows)


def test_trials_are_evaluated_at_the_pruning_steps():
    args = read_arguments(["--preset", "shapes", "--set", "evaluation.every=700"])
    assert args.base.evaluation.every == 140
    assert args.steps == (560,)


@pytest.mark.parametrize(
    ("preset", "steps", "every"),
    [
        ("voc", (14_000,), 2_000),
        ("coco", (30_000,), 10_000),
        ("shapes", (600,), 200),
        ("voc_tiny", (1_000,), 200),
    ],
)
def test_presets_keep_their_own_evaluations(preset, steps, every):
    config = get_preset(preset)
    assert pruning_steps(config.train, config.evaluation.every) == (steps, every)


@pytest.mark.parametrize("warmup", range(0, 100, 7))
@pytest.mark.parametrize("given", [1, 3, 10, 50, 1000])
def test_a_pruning_step_is_evaluated_between_the_middle_and_the_end_of_co_training(warmup, given):
    steps, every = pruning_steps(TrainConfig(iterations=100, warmup=warmup), given)
    assert every <= given
    for step in steps:
        assert step % every == 0
        assert warmup + (100 - warmup) / 2 <= step < 100


def test_co_training_too_short_to_be_judged_has_no_pruning_step():
    assert pruning_steps(TrainConfig(iterations=10, warmup=9), every=5) == ((), 5)


def test_a_run_without_co_training_cannot_be_searched():
    with pytest.raises(ValueError, match=r"train\.warmup must end before train\.iterations = 10, got 10"):
        pruning_steps(TrainConfig(iterations=10, warmup=10), every=5)
