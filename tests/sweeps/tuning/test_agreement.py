"""Whether the metric on the way says anything of the end."""

from __future__ import annotations

import pytest

from sweeps.tuning.agreement import agreements, told


def trials(ends, step=6):
    """Trials by (value on the way, end)."""
    return [({step: value}, end) for value, end in ends]


def test_the_same_order_agrees_by_one_and_the_opposite_one_by_minus_one():
    (same,) = agreements(trials([(0.1 * i, i) for i in range(10)]))
    (opposite,) = agreements(trials([(-0.1 * i, i) for i in range(10)]))
    assert (same.step, same.count, same.correlation) == (6, 10, pytest.approx(1))
    assert opposite.correlation == pytest.approx(-1)


def test_two_neighbours_that_change_places_are_worked_out_by_hand():
    ends = [1, 0, 2, 3, 4, 5, 6, 7, 8, 9]
    (found,) = agreements(trials(list(enumerate(ends))))
    assert found.correlation == pytest.approx(1 - 6 * 2 / (10 * 99))  # 1 - 6 sum d^2 / n (n^2 - 1)


def test_hopeless_trials_can_make_all_of_the_agreement():
    good = [((7 * i) % 10, 50 + i) for i in range(10)]
    hopeless = [(-10 - i, i) for i in range(10)]
    (found,) = agreements(trials(hopeless + good))
    assert found.correlation > 0.6
    (alone,) = agreements(trials(good))
    assert found.among_best == pytest.approx(alone.correlation)
    assert found.among_best < 0.3


def test_few_trials_say_nothing():
    assert agreements(trials([(i, i) for i in range(9)])) == []
    assert agreements(trials([(i, i) for i in range(19)]))[0].among_best is None


def test_values_that_are_all_equal_agree_with_nothing():
    assert agreements(trials([(1, i) for i in range(10)]))[0].correlation == 0


def test_steps_are_told_in_their_order_and_rungs_are_named():
    found = agreements([({5: i, 8: i}, i) for i in range(10)])
    lines = told(found, 10, rungs=(8,))
    assert lines[0].startswith(
        "At 5 of 10 iterations the order of 10 finished trials agrees with their last one by 1.00 ("
    )
    assert lines[1].startswith("At the rung of 8 of 10 iterations")
