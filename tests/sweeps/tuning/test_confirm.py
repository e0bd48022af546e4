"""What of a search is confirmed, with which seeds, and how that is read back."""

from __future__ import annotations

import math

import pytest

from cosa.config import override
from cosa.config.presets import get_preset
from sweeps.reporting.cells import Cell
from sweeps.tables.metrics import SEG_MIOU, SEG_MIOU_LABELLED
from sweeps.tuning.confirm import Confirmed, best_of, confirmed, plan_confirmation
from sweeps.tuning.record import Record

BASE = get_preset("shapes")


def record(number, value, changes, origin="", state="complete"):
    return Record(number, state, origin, {}, changes, value, (), "")


FULL = record(0, 0.40, {"csc.weight": 0.1, "ema.momentum": 0.98}, "full")
GOOD = record(3, 0.50, {"csc.weight": 0.2, "ema.momentum": 0.98})
FAIR = record(5, 0.45, {"csc.weight": 0.3, "ema.momentum": 0.99})
RECORDS = [
    FULL,
    record(1, 0.60, {"csc.weight": 0.7}, state="pruned"),
    record(2, 0.30, {"csc.weight": 0.4}),
    GOOD,
    record(4, 0.50, dict(GOOD.changes)),
    FAIR,
]


def confirmation(values):
    """As `confirmed` reads it, from values by arm and seed."""
    plan = plan_confirmation([GOOD, FAIR], BASE, seeds=2)

    def read(trial):
        found = [values.get((row.partition("/")[2], trial.seed)) for row in trial.arms]
        return {"metrics": {SEG_MIOU: found[0], SEG_MIOU_LABELLED: 0.9}} if found[0] is not None else None

    return confirmed(RECORDS, [GOOD, FAIR], plan, read)


STEADY = {
    **{("full", seed): 0.39 for seed in (1, 2)},
    **{("trial-3", seed): 0.43 for seed in (1, 2)},
    **{("trial-5", seed): 0.44 for seed in (1, 2)},
}


def test_the_best_are_finished_distinct_and_not_the_preset():
    assert best_of(RECORDS, 9) == [GOOD, FAIR, RECORDS[2]]
    assert best_of(RECORDS, 1) == [GOOD]
    assert best_of([FULL], 3) == []


def test_confirmation_is_with_seeds_that_the_search_did_not_use_and_shares_its_warm_ups():
    plan = plan_confirmation([GOOD, FAIR], override(BASE, {"train.seed": 7}), seeds=2)
    trials = [t for t in plan.trials if t.kind == "trial"]
    assert sorted((t.seed, t.arm) for t in trials) == [
        (seed, arm) for seed in (8, 9) for arm in ("full", "trial-3", "trial-5")
    ]
    assert [t.seed for t in plan.trials if t.kind == "warmup"] == [8, 9], "one for all momenta of a seed"


def test_confirmed_settings_are_ordered_by_their_means_over_fresh_seeds():
    found = confirmation(STEADY)
    assert [one.label for one in found] == ["trial 5", "trial 3", "preset"]
    assert [round(one.excess, 3) for one in found] == [0.01, 0.07, 0.01]
    assert found[0].labelled.mean == pytest.approx(0.9)


def test_a_preset_that_the_search_did_not_finish_has_no_excess():
    one = Confirmed(None, {}, Cell({1: 0.4}), Cell({}))
    assert one.label == "preset"
    assert math.isnan(one.excess)
