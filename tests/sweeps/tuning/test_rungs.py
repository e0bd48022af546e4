"""Where a search judges trials on their way, and which of them go on."""

from __future__ import annotations

import math

import pytest

from cosa.config import TrainConfig
from cosa.config.presets import get_preset
from sweeps.tuning.rungs import choose_rungs, decide


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
    rungs = choose_rungs(config.train, config.evaluation.every)
    assert (rungs.steps, rungs.every) == (steps, every)


@pytest.mark.parametrize("warmup", range(0, 100, 7))
@pytest.mark.parametrize("every", [1, 3, 10, 50, 1000])
def test_every_rung_is_evaluated_between_the_middle_and_the_end_of_co_training(warmup, every):
    rungs = choose_rungs(TrainConfig(iterations=100, warmup=warmup), every)
    assert rungs.every <= every
    assert list(rungs.steps) == sorted(set(rungs.steps))
    for step in rungs.steps:
        assert step % rungs.every == 0
        assert warmup + (100 - warmup) / 2 <= step < 100


def test_co_training_too_short_to_be_judged_has_no_rungs():
    rungs = choose_rungs(TrainConfig(iterations=10, warmup=9), every=5)
    assert (rungs.steps, rungs.every) == ((), 5)


def test_a_run_without_co_training_cannot_be_searched():
    with pytest.raises(ValueError, match=r"train\.warmup must end before train\.iterations = 10, got 10"):
        choose_rungs(TrainConfig(iterations=10, warmup=10), every=5)


def test_the_first_three_at_a_rung_go_on_whatever_they_have():
    arrived = []
    for value in (0.5, 0.1, 0.0):
        assert decide(8, value, arrived).kept
        arrived.append(value)


def test_the_worst_third_of_those_that_came_so_far_is_stopped():
    assert not decide(8, 0.2, [0.5, 0.4, 0.3]).kept  # 4th of 4
    assert decide(8, 0.35, [0.5, 0.4, 0.3]).kept  # 3rd of 4
    assert not decide(8, 0.15, [0.5, 0.4, 0.3, 0.2, 0.1]).kept  # 5th of 6
    assert decide(8, 0.25, [0.5, 0.4, 0.3, 0.2, 0.1]).kept  # 4th of 6


def test_made_up_curves_end_with_the_best_ones():
    finals = [0.30, 0.50, 0.20, 0.45, 0.10, 0.60, 0.40, 0.05, 0.55, 0.25]
    kept = [
        final
        for place, final in enumerate(finals)
        if decide(5, final / 2, [f / 2 for f in finals[:place]]).kept
    ]
    assert kept == [0.30, 0.50, 0.20, 0.45, 0.60, 0.40, 0.55, 0.25]


def test_equals_share_their_rank():
    decision = decide(8, 0.4, [0.4, 0.4, 0.4])
    assert (decision.rank, decision.of, decision.kept) == (1, 4, True)


def test_nan_is_worse_than_everything():
    decision = decide(8, math.nan, [0.1, 0.2, 0.3])
    assert (decision.rank, decision.kept) == (4, False)


def test_the_preset_goes_on_in_any_case():
    assert decide(8, 0.0, [0.5] * 9, protected=True).kept
