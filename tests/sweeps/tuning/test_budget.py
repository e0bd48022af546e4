"""What a search may cost, and how that is counted over several starts."""

from __future__ import annotations

import pytest

from sweeps.tuning.budget import Budget, Ledger, Spent, read_spent


@pytest.mark.parametrize(
    ("budget", "spent", "left"),
    [
        (Budget(trials=3), Spent(2, 1e9, 1e9), True),
        (Budget(trials=3), Spent(3, 0, 0), False),
        (Budget(hours=0.5), Spent(99, 1799, 0), True),
        (Budget(hours=0.5), Spent(0, 1800, 0), False),
        (Budget(gpu_hours=2), Spent(99, 1e9, 7199), True),
        (Budget(gpu_hours=2), Spent(0, 0, 7200), False),
        (Budget(trials=3, hours=1), Spent(1, 3600, 0), False),
    ],
)
def test_the_first_limit_reached_ends_the_search(budget, spent, left):
    assert budget.left(spent) is left


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
        Budget(**limits)


def test_a_ledger_counts_hours_of_wall_time_and_of_gpus_over_restarts(tmp_path):
    now = 100.0
    ledger = Ledger(tmp_path / "spent.json", gpus=0.5, clock=lambda: now)
    now = 110.0
    ledger.note(running=4)
    now = 115.0
    ledger.note(running=0)
    now = 7.0  # another process, whose clock starts anew
    again = Ledger(tmp_path / "spent.json", gpus=0.5, clock=lambda: now)
    now = 9.0
    again.note(running=1)
    assert read_spent(tmp_path / "spent.json") == (17.0, 10 * 4 * 0.5 + 2 * 0.5)


def test_nothing_is_spent_where_there_is_no_ledger(tmp_path):
    assert read_spent(tmp_path / "spent.json") == (0.0, 0.0)
