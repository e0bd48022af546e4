"""What a search found, with fresh seeds: what is confirmed, what it says of the maximum, what is kept."""

from __future__ import annotations

import math

import pytest

from cosa.cli.common import changed_settings
from cosa.cli.training import _training_parser
from cosa.config import from_json, override, to_json
from cosa.presets import get_preset
from sweeps.cells import Cell
from sweeps.search_confirm import (
    Confirmed,
    best_config,
    best_of,
    command,
    confirmed,
    plan_confirmation,
    verdict,
)
from sweeps.search_record import Record
from sweeps.tables.metrics import FREE, LABELLED

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
        return {"metrics": {FREE: found[0], LABELLED: 0.9}} if found[0] is not None else None

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


def test_the_verdict_says_in_numbers_how_biased_the_maximum_was():
    lines = verdict(confirmation(STEADY))
    assert lines[0] == (
        "The search's maximum, trial 3, had 50.00 and has 43.00 ± 0.00 over 2 fresh seeds: the maximum was "
        "7.00 points above its confirmation."
    )
    assert lines[1] == (
        "Over the preset, 39.00 ± 0.00, the best confirmed settings, trial 5, gain +5.00 points (± 0.00 over "
        "the seeds); the search alone promised +10.00."
    )
    assert len(lines) == 2


def test_a_preset_that_nothing_beats_is_to_be_kept():
    found = confirmation(STEADY | {("full", 1): 0.47, ("full", 2): 0.46})
    assert verdict(found)[-1] == "No confirmed settings are better than the preset: keep it."
    config, why = best_config(found, RECORDS, BASE)
    assert config == BASE
    assert why == "preset, the highest mean over fresh seeds"


def test_a_gain_within_the_seeds_deviation_is_called_that():
    found = confirmation(STEADY | {("full", 1): 0.50, ("full", 2): 0.30})
    assert verdict(found)[-1].startswith("That is no more than the seeds' own deviation")


def test_without_confirmation_the_best_is_the_searchs_maximum_and_called_that():
    assert verdict([]) == []
    config, why = best_config([], RECORDS, BASE)
    assert config.csc.weight == 0.2
    assert why == "trial 3, the search's maximum, not confirmed"


def test_without_a_finished_trial_there_is_no_best():
    with pytest.raises(ValueError, match="must have a finished trial"):
        best_config([], [RECORDS[1]], BASE)


def test_a_preset_that_the_search_did_not_finish_has_no_excess():
    one = Confirmed(None, {}, Cell({1: 0.4}), Cell({}))
    assert one.label == "preset"
    assert math.isnan(one.excess)


def test_the_best_settings_come_back_from_their_file_and_from_their_command_line():
    start = get_preset("shapes")
    absolute = {"data.root": "/mnt/data/shapes", "data.cache": "/mnt/data/cache"}
    changes = {"csc.weight": 0.123456789012, "threshold.mode": "fixed", "evaluation.flip": False}
    best = override(start, {**absolute, **changes, "cam.scales": (1.0, 0.5), "csc.epsilon": math.inf})
    assert from_json(to_json(best)) == best

    line = command("shapes", start, best).split()
    assert line[:2] == ["cosa-train", "shapes"]
    assert "--data.root" not in line, "the preset's own, as seen from where it was started"
    given = _training_parser("cosa-train", "shapes").parse_known(line[1:])
    assert override(start, changed_settings(given)) == override(
        best,
        {
            "data.root": start.data.root,
            "data.cache": start.data.cache,
        },
    )
