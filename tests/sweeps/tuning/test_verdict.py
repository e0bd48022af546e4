"""What a confirmation says: what the maximum lost, what is gained, and over how many seeds each is said."""

from __future__ import annotations

import pytest

from cosa.config import override
from cosa.config.presets import get_preset
from sweeps.reporting.cells import Cell
from sweeps.tuning.confirm import Confirmed
from sweeps.tuning.record import Record
from sweeps.tuning.verdict import best_config, held_out_gain, over_seeds, verdict

BASE = get_preset("shapes")


def record(number, value, weight, origin="", state="complete"):
    return Record(number, state, origin, {}, {"csc.weight": weight}, value, (), "")


def one(number, searched, *fresh):
    """What fresh seeds 1, 2, ... make of a trial; the trial 0 is the preset."""
    origin = "" if number else "full"
    values = dict(enumerate(fresh, start=1))
    changes = {"csc.weight": 0.1 * number} if number else {}
    return Confirmed(record(number, searched, 0.1, origin), changes, Cell(values), Cell(values))


def test_the_maximum_is_told_with_what_fresh_seeds_left_of_it_and_the_price_of_choosing_it():
    lines = verdict([one(3, 0.50, 0.42, 0.44), one(0, 0.40, 0.38, 0.40)])
    assert lines[0] == (
        "The search's maximum, trial 3, had 50.00 with the search's one seed and has 43.00 ± 1.41 with 2 "
        "fresh seeds: 7.00 points of it were lost."
    )
    assert lines[1] == (
        "The preset, which was not chosen for its value, lost 1.00 by the change of seeds, so that about "
        "6.00 points are the price of choosing a maximum."
    )
    assert lines[2] == (
        "Over the preset, 39.00 ± 1.41 with 2 fresh seeds, trial 3 gains +4.00 ± 0.00 points (n = 2), "
        "where the search promised +10.00."
    )
    assert lines[3].startswith("With n = 2 a gain cannot be told from chance: give --confirm-seeds 3")
    assert len(lines) == 4


def test_of_one_seed_no_deviation_is_told():
    lines = verdict([one(5, 0.48, 0.46), one(3, 0.50, 0.43), one(0, 0.40, 0.39)])
    assert "±" not in " ".join(lines)
    assert "has 43.00 with 1 fresh seed: 7.00 points" in lines[0]
    assert "trial 3 gains +4.00 points (n = 1)" in lines[2]
    assert lines[3].endswith("the highest of 2 is flattering again, by how much one seed cannot say.")
    assert lines[4].startswith("With n = 1 a gain cannot be told from chance")
    assert over_seeds(Cell({1: 0.5})) == "50.00"


def test_a_second_choice_is_measured_on_seeds_that_had_no_say_in_it():
    lucky, steady = one(5, 0.48, 0.60, 0.41, 0.41), one(3, 0.50, 0.44, 0.44, 0.44)
    preset = one(0, 0.40, 0.40, 0.40, 0.40)
    # without seed 1 trial 3 is chosen, +0.04 there; without seeds 2 and 3 trial 5 is, +0.01 there
    gain = held_out_gain([lucky, steady, preset], preset)
    assert gain.values == pytest.approx({1: 0.04, 2: 0.01, 3: 0.01})
    lines = verdict([lucky, steady, preset])
    assert lines[3] == (
        "Of the 2 confirmed trial 5 has the highest mean, +7.33 over the preset; the highest of 2 is "
        "flattering again: on a seed that had no say in the choice it gains +2.00 ± 1.73 points (n = 3)."
    )
    assert lines[4].startswith("That may be chance (p 0.3")


def test_a_gain_that_all_seeds_share_is_more_than_chance():
    lines = verdict([one(3, 0.50, 0.430, 0.460, 0.460), one(0, 0.40, 0.40, 0.41, 0.42)])
    assert lines[-1].startswith("That is more than chance would explain (p 0.0")


def test_a_maximum_that_fresh_seeds_raise_has_lost_nothing():
    lines = verdict([one(3, 0.40, 0.44), one(0, 0.30, 0.40)])
    assert lines[0].endswith("has 44.00 with 1 fresh seed: nothing of it was lost.")
    assert "gained 10.00 by the change of seeds, so that about 6.00 points are the price" in lines[1]


def test_a_preset_that_nothing_beats_is_to_be_kept():
    found = [one(0, 0.40, 0.47, 0.46), one(3, 0.50, 0.43, 0.44)]
    assert verdict(found)[-1] == "No confirmed settings are better than the preset: keep it."
    config, why = best_config(found, [], BASE)
    assert config == BASE
    assert why == "preset, the highest of 2 with 2 fresh seeds"


def test_without_the_preset_only_the_maximum_is_spoken_of():
    assert len(verdict([one(3, 0.50, 0.43)])) == 1
    apart = Confirmed(one(0, 0.4).record, {}, Cell({2: 0.4}), Cell({}))
    assert len(verdict([one(3, 0.50, 0.43), apart])) == 1, "no seed in common"


def test_without_confirmation_the_best_is_the_searchs_maximum_and_called_that():
    assert verdict([]) == []
    records = [record(0, 0.4, 0.1, "full"), record(1, 0.9, 0.7, state="pruned"), record(3, 0.5, 0.2)]
    config, why = best_config([], records, BASE)
    assert config == override(BASE, {"csc.weight": 0.2})
    assert why == "trial 3, the search's maximum, not confirmed"


def test_without_a_finished_trial_there_is_no_best():
    with pytest.raises(ValueError, match="must have a finished trial"):
        best_config([], [record(1, 0.6, 0.7, state="pruned")], BASE)
