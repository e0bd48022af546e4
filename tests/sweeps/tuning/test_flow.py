"""What a search starts next and what becomes of its trials, on folders alone: no Ray, no training."""

from __future__ import annotations

import json

import optuna
import pytest

from cosa.config import identity, override, warmup_identity
from cosa.config.presets import get_preset
from sweeps.planning import folder as folders
from sweeps.tables.metrics import SEG_MIOU
from sweeps.tuning.budget import Budget, Ledger
from sweeps.tuning.flow import Flow
from sweeps.tuning.space import SPACE, Choice, Range, Space
from sweeps.tuning.study import SearchStudy
from tests.sweeps.running.stub_checkpoint import leave_checkpoint

BASE = override(get_preset("shapes"), {"train.iterations": 20, "train.warmup": 8, "evaluation.every": 4})
RUNGS = (12, 16)


class Bench:
    """A search whose trials' folders the test writes itself."""

    def __init__(self, root, space=SPACE, trials=100):
        self.root = root
        self.space = space.resolved(BASE)
        self.storage = optuna.storages.InMemoryStorage()
        self.trials = trials
        self.now = 0.0

    def start(self, slots=1, gpus=0.0, **options):
        """A driver that starts: for the first time, or after one that was killed."""
        self.study = SearchStudy(self.storage, self.space, BASE, seed=0)
        return Flow(
            self.study,
            BASE,
            self.root,
            rungs=RUNGS,
            momenta=self.space.momenta,
            ledger=Ledger(self.root / "spent.json", gpus, lambda: self.now),
            slots=slots,
            **{"budget": Budget(trials=self.trials), **options},
        )

    def write(self, trial, value=0.5):
        """What the trainer leaves of a finished trial."""
        folder = folders.trial_folder(self.root, trial.name)
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        leave_checkpoint(folders.checkpoint(folder, trial.last_step))
        result = {
            "identity": identity(trial.config),
            "warmup_identity": warmup_identity(trial.config),
            "step": trial.last_step,
            "metrics": {SEG_MIOU: value},
        }
        (folder / "result.json").write_text(json.dumps(result))

    def journal(self, trial, values):
        """What the trainer leaves of a trial that was cut."""
        folder = folders.trial_folder(self.root, trial.name)
        folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"step": step, SEG_MIOU: value}) for step, value in values.items()]
        (folder / "journal.jsonl").write_text("\n".join([*lines, '{"step": 18, "tra']))

    def finish(self, flow, trial, value=0.5):
        self.write(trial, value)
        flow.end(trial.name, failed=False)


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


def states(bench):
    return [record.state for record in bench.study.records()]


def test_one_warm_up_comes_first_and_carries_every_momentum_of_the_space(bench):
    flow = bench.start(slots=2)
    warmup = flow.start_next()
    assert (warmup.kind, warmup.last_step) == ("warmup", 8)
    assert {*warmup.momenta, BASE.ema.momentum} == set(bench.space.momenta)
    assert flow.start_next() is None, "all others fork from it"
    assert len(states(bench)) == 2, "no more are asked for than there are slots"
    bench.finish(flow, warmup)
    trials = [flow.start_next(), flow.start_next()]
    assert {trial.warmup for trial in trials} == {warmup.name}
    assert flow.start_next() is None, "both slots are taken"


def test_trials_are_begun_until_the_budget_is_spent(tmp_path):
    bench = Bench(tmp_path, trials=3)
    flow = bench.start()
    while not flow.exhausted:
        bench.finish(flow, flow.start_next())
    assert states(bench) == ["complete"] * 3
    assert flow.start_next() is None


def test_a_trial_among_the_worst_is_stopped_and_its_checkpoints_go(bench):
    flow = bench.start()
    bench.finish(flow, flow.start_next())
    for value in (0.5, 0.6, 0.7):
        trial = flow.start_next()
        assert flow.rung(trial.name, 12, value)
        bench.finish(flow, trial, value)
    last = flow.start_next()
    (folders.trial_folder(bench.root, last.name) / "checkpoints").mkdir(parents=True)
    assert not flow.rung(last.name, 12, 0.1)
    flow.end(last.name, failed=False)
    assert states(bench)[:4] == ["complete"] * 3 + ["pruned"]
    assert not (folders.trial_folder(bench.root, last.name) / "checkpoints").exists()


def test_the_preset_is_never_stopped(bench):
    study = SearchStudy(bench.storage, bench.space, BASE, seed=0)
    for _ in range(4):
        number = study.ask().number
        study.decided(number, study_decision(12, 0.9))
        study.finish(number, 0.9)
    study.enqueue({"full": bench.space.parameters(BASE, BASE)})
    flow = bench.start()
    bench.finish(flow, flow.start_next())
    assert flow.rung(flow.start_next().name, 12, 0.0)


def study_decision(step, value):
    from sweeps.tuning.rungs import decide

    return decide(step, value, [])


def test_a_failed_trial_is_told_and_the_search_goes_on(bench):
    flow = bench.start()
    bench.finish(flow, flow.start_next())
    trial = flow.start_next()
    flow.end(trial.name, failed=True, reason="RuntimeError: no memory")
    assert bench.study.record(0).reason == "RuntimeError: no memory"
    assert flow.start_next().name != trial.name


def test_trials_of_a_warm_up_that_failed_say_so(bench):
    flow = bench.start()
    flow.end(flow.start_next().name, failed=True, reason="boom")
    assert states(bench) == ["failed"]
    assert "warmup" in bench.study.record(0).reason
    assert "boom" in bench.study.record(0).reason


def test_a_search_whose_one_warm_up_failed_ends_and_tries_it_again_when_it_is_started_anew(bench):
    flow = bench.start()
    warmup = flow.start_next()
    flow.end(warmup.name, failed=True, reason="boom")
    assert flow.start_next() is None
    assert flow.exhausted
    assert bench.start().start_next() == warmup


def test_a_space_that_varies_the_warm_up_goes_on_where_one_of_them_fails(tmp_path):
    bench = Bench(tmp_path, space=Space(Range("optim.lr", 1e-4, 1e-2, log=True)))
    flow = bench.start()
    warmup = flow.start_next()
    flow.end(warmup.name, failed=True, reason="boom")
    other = flow.start_next()
    assert other.kind == "warmup"
    assert other.name != warmup.name


def test_a_finished_trial_without_its_metric_has_failed(bench):
    flow = bench.start()
    bench.finish(flow, flow.start_next())
    bench.finish(flow, flow.start_next(), value=float("nan"))
    assert bench.study.record(0).reason == "metric must be finite, got nan"


def test_after_a_kill_what_was_finished_is_told_and_what_ran_goes_on_with_no_trial_twice(bench):
    flow = bench.start(slots=2)
    bench.finish(flow, flow.start_next())
    done, cut = flow.start_next(), flow.start_next()
    bench.write(done, 0.7)  # killed before the driver heard of it
    flow = bench.start(slots=2)
    assert (bench.study.record(0).state, bench.study.record(0).value) == ("complete", 0.7)
    again = flow.start_next()
    assert (again.name, again.config) == (cut.name, cut.config)
    assert flow.start_next().name not in {cut.name, done.name}
    assert len(bench.study.records()) == 3


def test_after_a_kill_the_warm_up_goes_on_before_its_trials(bench):
    flow = bench.start()
    warmup = flow.start_next()
    flow = bench.start()
    assert flow.start_next() == warmup
    bench.finish(flow, warmup)
    assert flow.start_next().kind == "trial"
    assert len(bench.study.records()) == 1


def test_a_rung_that_the_driver_did_not_hear_of_is_judged_from_the_journal(bench):
    flow = bench.start()
    bench.finish(flow, flow.start_next())
    for _ in range(3):
        trial = flow.start_next()
        flow.rung(trial.name, 12, 0.5)
        bench.finish(flow, trial)
    cut = flow.start_next()
    bench.journal(cut, {8: 0.9, 12: 0.1})
    flow = bench.start()
    assert states(bench) == ["complete"] * 3 + ["pruned"]
    assert flow.start_next().name != cut.name


def test_a_rung_is_judged_once_however_often_it_is_reached(bench):
    flow = bench.start()
    bench.finish(flow, flow.start_next())
    early = flow.start_next()
    assert flow.rung(early.name, 12, 0.1), "the first one there goes on"
    for _ in range(5):
        number = bench.study.ask().number
        bench.study.decided(number, study_decision(12, 0.9))
        bench.study.finish(number, 0.9)
    flow = bench.start()
    assert flow.start_next().name == early.name
    assert flow.rung(early.name, 12, 0.1), "as before the kill"
    assert [(d.step, d.of) for d in bench.study.record(0).decisions] == [(12, 1)]


def test_a_decision_that_the_study_had_no_time_to_hear_is_carried_out(bench):
    flow = bench.start()
    bench.finish(flow, flow.start_next())
    trial = flow.start_next()
    bench.journal(trial, {12: 0.1})
    decision = {"step": 12, "value": 0.1, "rank": 4, "of": 4, "kept": False}
    bench.storage.set_trial_user_attr(0, "decisions", [decision])
    bench.start()
    assert states(bench) == ["pruned"]


def test_what_was_tried_before_is_not_trained_again_and_a_space_of_few_points_ends(tmp_path):
    bench = Bench(tmp_path, space=Space(Choice("threshold.mode", ("dynamic", "fixed"))), trials=30)
    flow = bench.start()
    trained = []
    while not flow.exhausted:
        trial = flow.start_next()
        if trial is None:
            break
        trained.append(trial.name)
        bench.finish(flow, trial, value=0.1 * len(trained))
    assert len(trained) == 3, "the warm-up and two trials"
    assert len({record.value for record in bench.study.records()}) == 2


def test_failed_trials_alone_are_tried_again_where_that_is_asked(bench):
    flow = bench.start()
    bench.finish(flow, flow.start_next())
    failed = flow.start_next()
    flow.end(failed.name, failed=True, reason="boom")
    bench.finish(flow, flow.start_next())
    bench.study.repeat_failed()
    flow = bench.start(waiting_only=True)
    assert flow.start_next().name == failed.name
    bench.finish(flow, failed)
    assert flow.exhausted
    assert states(bench) == ["failed", "complete", "complete"]


def test_a_row_that_finished_in_an_earlier_run_is_not_run_again(bench):
    from sweeps.tuning.flow import alone

    study = SearchStudy(bench.storage, bench.space, BASE, seed=0)
    study.enqueue({"full": bench.space.parameters(BASE, BASE)})
    flow = bench.start(earlier={alone(BASE, "full").name: 0.42})
    warmup = flow.start_next()
    assert (bench.study.record(0).state, bench.study.record(0).value) == ("complete", 0.42)
    assert warmup.kind == "warmup", "of the next trial"
    assert len(bench.study.records()) == 2


def until_exhausted(bench, flow, seconds):
    """Run one after the other, each for so long; returns how many trials were trained."""
    trained = 0
    while not flow.exhausted:
        trial = flow.start_next()
        bench.now += seconds
        trained += trial.kind == "trial"
        bench.finish(flow, trial, 0.5)
    return trained


def test_hours_end_a_search_once_the_trial_that_crosses_them_is_done(bench):
    flow = bench.start(budget=Budget(hours=1))
    assert until_exhausted(bench, flow, seconds=1000) == 3, "warm-up, then trials begun at 1000, 2000, 3000 s"
    assert states(bench) == ["complete"] * 3
    assert bench.start(budget=Budget(hours=1)).exhausted, "hours of earlier starts count"
    assert not bench.start(budget=Budget(hours=2)).exhausted


def test_gpu_hours_count_what_every_running_trial_holds_the_warm_up_included(bench):
    flow = bench.start(gpus=2.0, budget=Budget(gpu_hours=1))
    assert until_exhausted(bench, flow, seconds=500) == 3, "at 1000 GPU-seconds each, the warm-up among them"
    assert flow.spent.gpu_seconds == 4 * 500 * 2
    assert flow.spent.seconds == 2000


def test_retrying_what_failed_needs_no_budget_and_counts_no_trial_anew(tmp_path):
    bench = Bench(tmp_path, trials=2)
    flow = bench.start()
    bench.finish(flow, flow.start_next())
    first = flow.start_next()
    flow.end(first.name, failed=True, reason="boom")
    bench.finish(flow, flow.start_next())
    assert flow.exhausted, "the budget is spent"

    bench.study.repeat_failed()
    bench.study.repeat_failed()
    flow = bench.start(waiting_only=True)
    assert until_exhausted(bench, flow, seconds=1) == 1
    assert states(bench) == ["failed", "complete", "complete"]
    assert flow.spent.trials == 2


def test_nothing_waits_where_nothing_failed(bench):
    flow = bench.start()
    bench.finish(flow, flow.start_next())
    bench.finish(flow, flow.start_next())
    assert bench.study.repeat_failed() == 0
    assert bench.start(waiting_only=True).exhausted
