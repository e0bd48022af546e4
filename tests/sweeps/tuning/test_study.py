"""The search's memory: what is suggested, what is kept, and what a killed process leaves of it."""

from __future__ import annotations

import math

import optuna
import pytest

from cosa.config import Config, override
from sweeps.tuning.rungs import decide
from sweeps.tuning.space import SPACE, Choice, Range, Space
from sweeps.tuning.study import JOURNAL, SearchStudy, open_study

BASE = Config()
WHOLE = SPACE.resolved(BASE)


def study_of(space=WHOLE, base=BASE, storage=None, seed=0):
    return SearchStudy(storage or optuna.storages.InMemoryStorage(), space, base, seed)


def score(record):
    """A smooth stand-in for training, best at csc.weight 0.2."""
    return 0.5 - 0.01 * abs(math.log(record.changes["csc.weight"] / 0.2))


def run(study, trials):
    for _ in range(trials):
        record = study.ask()
        study.finish(record.number, score(record))


def test_rows_come_first_and_none_of_them_twice():
    study = study_of()
    rows = {"full": WHOLE.parameters(BASE, BASE)}
    rows["5b/c2s-x2"] = WHOLE.parameters(override(BASE, {"c2s.weight": 0.2}), BASE)
    study.enqueue(rows)
    study.enqueue(rows)
    run(study, 3)
    assert [record.origin for record in study.records()] == ["full", "5b/c2s-x2", ""]
    assert study.config(study.record(0)) == BASE
    assert study.config(study.record(1)).c2s.weight == 0.2


def test_what_is_suggested_is_the_same_however_often_the_search_was_started_anew(tmp_path):
    run(undisturbed := study_of(), 14)
    for _ in range(7):
        run(disturbed := open_study(tmp_path, WHOLE, BASE, seed=0), 2)
    assert [r.changes for r in disturbed.records()] == [r.changes for r in undisturbed.records()]


def test_another_seed_suggests_something_else():
    studies = [study_of(seed=seed) for seed in (0, 1)]
    for study in studies:
        run(study, 2)
    assert studies[0].record(0).changes != studies[1].record(0).changes


def test_after_its_start_the_search_closes_in_on_what_is_good():
    run(study := study_of(), 40)
    values = [record.value for record in study.records()]
    assert sum(values[20:]) > sum(values[:20])


def test_a_trial_that_was_asked_for_while_the_process_was_killed_gets_the_rest_of_its_settings():
    storage = optuna.storages.InMemoryStorage()
    study_of(storage=storage)
    half = optuna.load_study(study_name="search", storage=storage).ask()
    half.suggest_float("c2s.weight", 0.0125, 0.8, log=True)
    again = study_of(storage=storage)
    assert again.record(0).changes == {}
    again.complete(0)
    assert again.record(0).changes["c2s.weight"] == half.params["c2s.weight"]
    assert again.record(0).changes["threshold.mode"] in {"dynamic", "fixed"}


def test_a_line_cut_off_by_a_kill_is_dropped_and_the_study_goes_on(tmp_path):
    run(open_study(tmp_path, WHOLE, BASE, seed=0), 2)
    with (tmp_path / JOURNAL).open("ab") as file:
        file.write(b'{"op_code":4,"work')
    study = open_study(tmp_path, WHOLE, BASE, seed=0)
    run(study, 1)
    assert len(open_study(tmp_path, WHOLE, BASE, seed=0).records()) == 3


def test_a_lock_left_by_a_kill_is_taken_over(tmp_path):
    open_study(tmp_path, WHOLE, BASE, seed=0)
    (tmp_path / f"{JOURNAL}.lock").touch()
    run(open_study(tmp_path, WHOLE, BASE, seed=0), 1)


def test_a_trial_stopped_at_a_rung_is_told_as_pruned_with_its_values():
    study = study_of()
    number = study.ask().number
    study.decided(number, decide(10, 0.3, []))
    study.decided(number, decide(20, 0.1, [0.5] * 5))
    record = study.record(number)
    assert (record.state, record.last_value) == ("pruned", 0.1)
    assert [(d.step, d.value, d.kept) for d in record.decisions] == [(10, 0.3, True), (20, 0.1, False)]
    frozen = optuna.load_study(study_name="search", storage=study._storage).trials[0]
    assert frozen.state == optuna.trial.TrialState.PRUNED
    assert frozen.intermediate_values == {10: 0.3, 20: 0.1}


def test_a_metric_that_is_not_finite_is_a_failure_with_its_reason():
    study = study_of()
    study.finish(study.ask().number, math.nan)
    assert (study.record(0).state, study.record(0).reason) == ("failed", "metric must be finite, got nan")


def test_what_failed_is_tried_again_once():
    study = study_of()
    study.fail(study.ask().number, "out of memory")
    assert study.repeat_failed() == 1
    assert study.repeat_failed() == 1, "it waits already"
    record = study.ask()
    assert (record.repeats, record.changes) == (0, study.record(0).changes)
    study.finish(record.number, 0.5)
    assert study.repeat_failed() == 0


def test_a_study_of_another_space_is_refused_with_the_difference(tmp_path):
    space = Space(Range("csc.weight", 0.1, 0.4), Choice("threshold.mode", ("dynamic", "fixed")))
    open_study(tmp_path, space, BASE, seed=0)
    other = Space(Range("csc.weight", 0.1, 0.5), Range("csc.tau", 0.1, 1.0))
    with pytest.raises(ValueError, match="study must be of this space") as error:
        open_study(tmp_path, other, BASE, seed=0)
    text = str(error.value)
    assert "csc.weight: [0.1, 0.4] -> [0.1, 0.5]" in text
    assert "threshold.mode: one of dynamic, fixed -> not varied" in text
    assert "csc.tau: not varied -> [0.1, 1]" in text
    assert text.endswith("choose another --out")
    assert "\n" not in text


def test_a_study_of_other_settings_is_refused_but_not_one_on_another_machine(tmp_path):
    open_study(tmp_path, WHOLE, BASE, seed=0)
    open_study(tmp_path, WHOLE, override(BASE, {"data.loader_workers": 9, "data.root": "/new"}), seed=0)
    with pytest.raises(ValueError, match=r"train\.iterations: 20000 -> 100"):
        open_study(tmp_path, WHOLE, override(BASE, {"train.iterations": 100, "train.warmup": 1}), seed=0)


def test_importance_sees_what_matters():
    run(study := study_of(Space(Range("csc.weight", 0.05, 0.8), Range("csc.tau", 0.1, 1.0))), 30)
    importances = study.importances()
    assert importances["csc.weight"] > 5 * importances["csc.tau"]


def test_of_too_few_trials_nothing_is_said_about_importance():
    assert study_of().importances() == {}
