"""The search's memory: what is suggested, what is kept, and what a killed process leaves of it."""

from __future__ import annotations

import math
from pathlib import Path

import optuna
import pytest

from cosa.config import Config, override
from cosa.config.presets import get_preset
from cosa.networks.published import pinned
from sweeps.tuning.space import SPACE, Choice, Range, Space
from sweeps.tuning.study import (
    JOURNAL,
    SearchStudy,
    begun,
    in_worst_third,
    last_value,
    open_study,
    origin,
    reason,
    state,
)

BASE = Config()
EARLIER = Path(__file__).with_name("study_of_25ac2bd.journal")
WHOLE = SPACE.resolved(BASE)


def study_of(space=WHOLE, base=BASE, storage=None):
    return SearchStudy(storage or optuna.storages.InMemoryStorage(), space, base)


def score(trial):
    """A smooth stand-in for training, best at csc.weight 0.2."""
    return 0.5 - 0.01 * abs(math.log(trial.params["csc.weight"] / 0.2))


def run(study, trials):
    for _ in range(trials):
        trial = study.ask()
        study.finish(trial.number, score(trial))


def test_rows_come_first_and_none_of_them_twice():
    study = study_of()
    rows = {"full": WHOLE.parameters(BASE, BASE)}
    rows["5b/c2s-x2"] = WHOLE.parameters(override(BASE, {"c2s.weight": 0.2}), BASE)
    study.enqueue(rows)
    study.enqueue(rows)
    run(study, 3)
    assert [origin(trial) for trial in study.trials] == ["full", "5b/c2s-x2", ""]
    assert study.config(study.trial(0)) == pinned(BASE)
    assert study.config(study.trial(1)).c2s.weight == 0.2


def test_what_is_suggested_is_the_same_however_often_the_search_was_started_anew(tmp_path):
    run(undisturbed := study_of(), 14)
    for _ in range(7):
        run(disturbed := open_study(tmp_path, WHOLE, BASE), 2)
    assert [t.params for t in disturbed.trials] == [t.params for t in undisturbed.trials]


def test_another_seed_suggests_something_else():
    studies = [study_of(base=override(BASE, {"train.seed": seed})) for seed in (0, 1)]
    for study in studies:
        run(study, 2)
    assert studies[0].trial(0).params != studies[1].trial(0).params


def test_after_its_start_the_search_closes_in_on_what_is_good():
    run(study := study_of(), 40)
    values = [trial.value for trial in study.trials]
    assert sum(values[20:]) > sum(values[:20])


def test_a_trial_that_was_asked_for_while_the_process_was_killed_gets_the_rest_of_its_settings():
    storage = optuna.storages.InMemoryStorage()
    study_of(storage=storage)
    half = optuna.load_study(study_name="search", storage=storage).ask()
    half.suggest_float("c2s.weight", 0.0125, 0.8, log=True)
    again = study_of(storage=storage)
    assert again.changes(again.trial(0)) == {}
    changes = again.changes(again.complete(0))
    assert changes["c2s.weight"] == half.params["c2s.weight"]
    assert changes["threshold.mode"] in {"dynamic", "fixed"}


def test_a_line_cut_off_by_a_kill_is_dropped_and_the_study_goes_on(tmp_path):
    run(open_study(tmp_path, WHOLE, BASE), 2)
    with (tmp_path / JOURNAL).open("ab") as file:
        file.write(b'{"op_code":4,"work')
    study = open_study(tmp_path, WHOLE, BASE)
    run(study, 1)
    assert len(open_study(tmp_path, WHOLE, BASE).trials) == 3


def test_a_lock_left_by_a_kill_is_taken_over(tmp_path):
    open_study(tmp_path, WHOLE, BASE)
    (tmp_path / f"{JOURNAL}.lock").touch()
    run(open_study(tmp_path, WHOLE, BASE), 1)


def reported(study, *values, row="", step=10):
    """A trial for each of the values at a pruning step; whether each went on."""
    goes_on = []
    for value in values:
        if row:
            study.enqueue({row: study.space.parameters(BASE, BASE)})
        goes_on.append(study.report(study.ask().number, step, value))
    return goes_on


def test_a_trial_stopped_on_its_way_is_told_as_pruned_with_its_values():
    study = study_of()
    assert reported(study, 0.5, 0.4, 0.3, 0.1) == [True, True, True, False]
    trial = optuna.load_study(study_name="search", storage=study._storage).trials[3]
    assert trial.state == optuna.trial.TrialState.PRUNED
    assert trial.intermediate_values == {10: 0.1}
    assert last_value(trial) == 0.1


def test_a_trial_is_judged_once_however_often_it_comes_to_a_step():
    study = study_of()
    assert reported(study, 0.1, 0.9, 0.9, 0.9, 0.9, 0.9)[0], "the first one there goes on"
    assert study.report(0, 10, 0.1), "as before"


def test_a_judgement_that_the_study_had_no_time_to_hear_is_carried_out():
    study = study_of()
    number = study.ask().number
    study._storage.set_trial_user_attr(study._id(number), "pruned_at", 10)
    assert not study.report(number, 10, 0.9)
    assert state(study.trial(number)) == "pruned"


def test_the_preset_is_never_stopped():
    study = study_of()
    reported(study, *[0.9] * 9)
    assert reported(study, 0.0, row="full") == [True]


def test_the_first_three_at_a_step_go_on_whatever_they_have():
    assert not any(in_worst_third(value, others) for value, others in ((0.5, []), (0.1, [0.5]), (0, [1, 1])))


def test_the_worst_third_of_those_that_came_so_far_is_stopped():
    assert in_worst_third(0.2, [0.5, 0.4, 0.3])  # 4th of 4
    assert not in_worst_third(0.35, [0.5, 0.4, 0.3])  # 3rd of 4
    assert in_worst_third(0.15, [0.5, 0.4, 0.3, 0.2, 0.1])  # 5th of 6
    assert not in_worst_third(0.25, [0.5, 0.4, 0.3, 0.2, 0.1])  # 4th of 6


def test_made_up_curves_end_with_the_best_ones():
    finals = [0.30, 0.50, 0.20, 0.45, 0.10, 0.60, 0.40, 0.05, 0.55, 0.25]
    goes_on = reported(study_of(), *(final / 2 for final in finals))
    kept = [final for final, on in zip(finals, goes_on, strict=True) if on]
    assert kept == [0.30, 0.50, 0.20, 0.45, 0.60, 0.40, 0.55, 0.25]


def test_equals_share_their_rank_and_nan_is_worse_than_everything():
    assert not in_worst_third(0.4, [0.4, 0.4, 0.4])
    assert in_worst_third(math.nan, [0.1, 0.2, 0.3])


def test_a_metric_that_is_not_finite_is_a_failure_with_its_reason():
    study = study_of()
    study.finish(study.ask().number, math.nan)
    trial = study.trial(0)
    assert (state(trial), reason(trial)) == ("failed", "metric must be finite, got nan")


def test_what_failed_is_tried_again_once():
    study = study_of()
    study.fail(study.ask().number, "out of memory")
    assert study.repeat_failed() == 1
    assert study.repeat_failed() == 1, "it waits already"
    again = study.ask()
    assert again.params == study.trial(0).params
    assert begun(study.trials) == 1
    study.finish(again.number, 0.5)
    assert study.repeat_failed() == 0


def test_a_study_of_another_space_is_refused_with_the_difference(tmp_path):
    space = Space(Range("csc.weight", 0.1, 0.4), Choice("threshold.mode", ("dynamic", "fixed")))
    open_study(tmp_path, space, BASE)
    other = Space(Range("csc.weight", 0.1, 0.5), Range("csc.tau", 0.1, 1.0))
    with pytest.raises(ValueError, match="study must be of this space") as error:
        open_study(tmp_path, other, BASE)
    text = str(error.value)
    assert "csc.weight: [0.1, 0.4] -> [0.1, 0.5]" in text
    assert "threshold.mode: one of dynamic, fixed -> not varied" in text
    assert "csc.tau: not varied -> [0.1, 1]" in text
    assert text.endswith("choose another --out")
    assert "\n" not in text


def test_a_study_of_other_settings_is_refused_but_not_one_on_another_machine(tmp_path):
    open_study(tmp_path, WHOLE, BASE)
    open_study(tmp_path, WHOLE, override(BASE, {"data.loader_workers": 9, "data.root": "/new"}))
    with pytest.raises(ValueError, match=r"train\.iterations: 20000 -> 100"):
        open_study(tmp_path, WHOLE, override(BASE, {"train.iterations": 100, "train.warmup": 1}))


def test_importance_sees_what_matters():
    run(study := study_of(Space(Range("csc.weight", 0.05, 0.8), Range("csc.tau", 0.1, 1.0))), 30)
    importances = study.importances()
    assert importances["csc.weight"] > 5 * importances["csc.tau"]


def test_of_too_few_trials_nothing_is_said_about_importance():
    assert study_of().importances() == {}


def test_a_study_that_commit_25ac2bd_wrote_goes_on(tmp_path):
    base = pinned(get_preset("shapes"))
    (tmp_path / JOURNAL).write_bytes(EARLIER.read_bytes())
    study = open_study(tmp_path, SPACE.resolved(base), base)
    assert [state(trial) for trial in study.trials] == [
        *("complete", "complete", "complete", "pruned", "complete", "failed", "running")
    ]
    assert [round(last_value(t), 2) for t in study.trials[:5]] == [0.40, 0.42, 0.44, 0.20, 0.46]
    assert (origin(study.trial(0)), study.config(study.trial(0))) == ("full", base)
    assert reason(study.trial(5)) == "RuntimeError: no memory"
    assert begun(study.trials) == 6, "one is a failed one tried again"
    assert study.report(6, 600, 0.0), "it has its judgement from before"
    run(study, 1)
