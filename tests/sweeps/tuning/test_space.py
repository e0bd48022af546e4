"""The space of a search: its bounds, its conditional settings, the rows of the paper inside it."""

from __future__ import annotations

import math
import random

import pytest

from cosa.config import Config, flatten, override
from cosa.config.presets import get_preset
from sweeps.tables import get_table, times
from sweeps.tuning.space import SPACE, Choice, Momentum, Range, Space, half_life, read_space, rows_inside


class Dice:
    """Suggests at random and remembers what it was asked for."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.asked = {}

    def suggest_float(self, name, low, high, *, log=False):
        value = (
            math.exp(self.random.uniform(math.log(low), math.log(high)))
            if log
            else self.random.uniform(low, high)
        )
        self.asked[name] = min(max(value, low), high)
        return self.asked[name]

    def suggest_categorical(self, name, choices):
        self.asked[name] = self.random.choice(choices)
        return self.asked[name]


@pytest.mark.parametrize("preset", ["shapes", "voc", "voc_tiny", "coco", "folder"])
def test_whatever_is_suggested_is_a_valid_config_near_the_preset(preset):
    base = get_preset(preset)
    space, own = SPACE.resolved(base), flatten(base)
    for seed in range(40):
        config = override(base, space.suggest(Dice(seed)))
        for name in ("c2s.weight", "s2c.weight", "csc.weight"):
            assert own[name] / 8 <= flatten(config)[name] <= own[name] * 8
        assert config.csc.epsilon > -math.log(config.raw.alpha), "smaller ones would contrast nothing"


def test_the_fixed_threshold_is_varied_only_where_it_is_read():
    space = SPACE.resolved(Config())
    dice = [Dice(seed) for seed in range(20)]
    changes = [space.suggest(die) for die in dice]
    assert {c["threshold.mode"] for c in changes} == {"fixed", "dynamic"}
    for die, change in zip(dice, changes, strict=True):
        fixed = change["threshold.mode"] == "fixed"
        assert ("threshold.xi" in change) is fixed
        assert ("threshold.xi" in die.asked) is fixed


def test_the_half_life_of_the_papers_momentum():
    assert half_life(0.5) == 1
    assert half_life(0.9994) == pytest.approx(1154.9, abs=0.1)
    assert half_life(1.0) == math.inf


def test_a_half_life_becomes_the_momentum_whose_own_is_nearest_as_a_ratio():
    momentum = Momentum((0.5, 0.5**0.25))  # half-lives of 1 and 4 steps: 2 is in the middle

    assert momentum.marks() == {0: "1", 0.5: "2", 1: "4"}
    assert momentum.place(0.5**0.5) == pytest.approx(0.5)
    assert momentum.value(1.9) == 0.5
    assert momentum.value(2.1) == 0.5**0.25


def test_a_warm_up_knows_beforehand_every_momentum_that_a_trial_may_ask_for():
    space = SPACE.resolved(Config())
    assert {space.suggest(Dice(seed))["ema.momentum"] for seed in range(60)} == set(space.momenta)


def test_momenta_that_a_short_run_has_not_are_left_out():
    space = SPACE.resolved(override(Config(), {"ema.momentum": 0.6}))
    assert all(0 < momentum < 1 for momentum in space.momenta)
    assert 0.6 in space.momenta


def test_parameters_of_a_config_bring_it_back():
    base = get_preset("voc")
    space = SPACE.resolved(base)
    for arm in get_table("5d").resolved(base).arms[:5]:
        config = override(base, arm.changes)
        parameters = space.parameters(config, base)
        assert override(base, space.changes(parameters)) == config


def test_rows_of_the_paper_are_taken_in_order_once_each_as_far_as_they_lie_inside():
    base = get_preset("voc")
    space = SPACE.resolved(base)
    rows = {
        "full": base,
        "3b/no-DT": override(base, {"threshold.mode": "fixed"}),
        "5a/full": base,
        "3b/no-CSC": override(base, {"csc.weight": 0.0}),
        "3b/no-RAW": override(base, {"raw.enabled": False}),
        "5d/frozen": override(base, {"ema.momentum": 1.0}),
        "5c/no-filter": override(base, {"csc.epsilon": math.inf}),
        "5b/c2s-x4": override(base, {"c2s.weight": 0.4}),
    }
    inside, outside = rows_inside(rows, space, base, most=9)
    assert list(inside) == ["full", "3b/no-DT", "5b/c2s-x4"]
    assert outside == ["3b/no-CSC", "3b/no-RAW", "5d/frozen", "5c/no-filter"]
    assert inside["3b/no-DT"]["threshold.xi"] == base.threshold.xi
    assert "threshold.xi" not in inside["full"]
    assert list(rows_inside(rows, space, base, most=2)[0]) == ["full", "3b/no-DT"]


@pytest.mark.parametrize(
    ("dimensions", "message"),
    [
        ((), "one or more dimensions"),
        ((Range("csc.weigth", 0.1, 1.0),), "did you mean 'csc.weight'"),
        ((Range("csc.weight", 0.1, 1.0), Choice("csc.weight", (1.0,))), "got 'csc.weight' twice"),
        ((Range("threshold.xi", 0.1, 0.9, when=("threshold.mode", "fixed")),), "further up in the space"),
        ((Choice("train.seed", (0, 1)),), "must not hold train.seed"),
    ],
)
def test_a_space_that_makes_no_sense_is_refused(dimensions, message):
    with pytest.raises(ValueError, match=message):
        Space(*dimensions)


@pytest.mark.parametrize(
    ("dimension", "message"),
    [
        (Range("csc.weight", 0.5, 0.5), "finite low < high"),
        (Range("csc.weight", 0.0, 0.5, log=True), "finite 0 < low < high"),
        (Range("threshold.xi", 0.5, 1.5), "threshold.xi must lie in"),
        (Range("csc.weight", times(-1), times(2)), "csc.weight must be finite and >= 0"),
        (Choice("threshold.mode", ("dynamic", "fixd")), "did you mean 'fixed'"),
    ],
)
def test_a_range_against_its_settings_law_is_refused_for_the_preset(dimension, message):
    with pytest.raises(ValueError, match=message):
        Space(dimension).resolved(Config())


def test_a_space_of_ones_own_is_a_file_of_ten_lines(tmp_path):
    path = tmp_path / "my_space.py"
    path.write_text(
        "from sweeps.tuning.space import Range, Space\n"
        "from sweeps.tables import times\n"
        'SPACE = Space(Range("optim.lr", times(0.5), times(2), log=True))\n'
    )
    space = read_space(path).resolved(Config())
    assert space.texts() == {"optim.lr": "[3e-05, 0.00012] log"}


@pytest.mark.parametrize(
    ("text", "message"), [("1 / 0", "ZeroDivisionError"), ("SPACE = 3", "SPACE = Space\\(...\\), got int")]
)
def test_a_file_without_a_space_is_refused(tmp_path, text, message):
    path = tmp_path / "my_space.py"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_space(path)


def test_a_missing_space_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="--space must name a file that exists"):
        read_space(tmp_path / "none.py")
