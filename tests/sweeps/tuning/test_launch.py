"""What a search starts next and what becomes of its trials, on folders alone: no training."""

from __future__ import annotations

import dataclasses
import json

import optuna
import pytest

from cosa.config import identity, override, warmup_identity
from cosa.config.presets import get_preset
from cosa.tracking import TrackingSpec
from sweeps.planning import folder as folders
from sweeps.planning.plan import trial_of
from sweeps.running.trial import make_spec
from sweeps.tables.metrics import SEG_MIOU
from sweeps.tuning.arguments import Budget, Limits, read_arguments
from sweeps.tuning.launch import StudySearcher
from sweeps.tuning.space import SPACE, Choice, Range, Space
from sweeps.tuning.study import SearchStudy, begun, metric_by_step, origin, reason, state
from tests.sweeps.running.stub_checkpoint import leave_checkpoint

BASE = override(get_preset("shapes"), {"train.iterations": 20, "train.warmup": 8, "evaluation.every": 4})
STEPS = (12, 16)


class Bench:
    """A search whose trials' folders the test writes itself."""

    def __init__(self, root, space=SPACE, trials=100):
        self.root = root
        self.space = space.resolved(BASE)
        self.storage = optuna.storages.InMemoryStorage()
        self.trials = trials
        self.now = 0.0

    def start(self, slots=1, gpus=0.0, limits=None, earlier=(), retry_failed=False):
        """A driver that starts: for the first time, or after one that was killed."""
        self.study = SearchStudy(self.storage, self.space, BASE)
        limits = limits or Limits(trials=self.trials)
        args = read_arguments(["--preset", "shapes", "--out", str(self.root)])
        sweep = dataclasses.replace(args.sweep, retry_failed=retry_failed)
        args = dataclasses.replace(args, sweep=sweep, base=BASE, space=self.space, steps=STEPS, limits=limits)
        self.budget = Budget(limits, self.root / "spent.json", gpus, lambda: self.now)
        return StudySearcher(args, self.study, self.budget, slots, None, dict(earlier))

    def write(self, trial, value=0.5):
        """What the trainer leaves of a finished trial."""
        folder = folders.trial_folder(self.root, trial.name)
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        leave_checkpoint(folders.checkpoint(folder, trial.last_step))
        result = {
            "identity": identity(trial.config),
            "warmup_identity": warmup_identity(trial.config),
            "step": trial.last_step,
            "metrics": value if isinstance(value, dict) else {SEG_MIOU: value},
        }
        (folder / "result.json").write_text(json.dumps(result))

    def journal(self, trial, values):
        """What the trainer leaves of a trial that was cut."""
        folder = folders.trial_folder(self.root, trial.name)
        folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"step": step, SEG_MIOU: value}) for step, value in values.items()]
        (folder / "journal.jsonl").write_text("\n".join([*lines, '{"step": 18, "tra']))

    def finish(self, searcher, trial, value=0.5):
        self.write(trial, value)
        searcher.end(trial, "")


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


def states(bench):
    return [state(trial) for trial in bench.study.trials]


def test_one_warm_up_comes_first_and_carries_every_momentum_of_the_space(bench):
    searcher = bench.start(slots=2)
    warmup = searcher.next_trial()
    assert (warmup.kind, warmup.last_step) == ("warmup", 8)
    assert {*warmup.momenta, BASE.ema.momentum} == set(bench.space.momenta)
    assert searcher.next_trial() is None, "all others fork from it"
    assert len(states(bench)) == 2, "no more are asked for than there are slots"
    bench.finish(searcher, warmup)
    trials = [searcher.next_trial(), searcher.next_trial()]
    assert {trial.warmup for trial in trials} == {warmup.name}
    assert searcher.next_trial() is None, "both slots are taken"


def test_trials_are_begun_until_the_budget_is_spent(tmp_path):
    bench = Bench(tmp_path, trials=3)
    searcher = bench.start()
    while not searcher.exhausted:
        bench.finish(searcher, searcher.next_trial())
    assert states(bench) == ["complete"] * 3
    assert searcher.next_trial() is None


def test_a_trial_among_the_worst_is_stopped_and_its_checkpoints_go(bench):
    searcher = bench.start()
    bench.finish(searcher, searcher.next_trial())
    for value in (0.5, 0.6, 0.7):
        trial = searcher.next_trial()
        assert searcher.report(trial.name, 12, value)
        bench.finish(searcher, trial, value)
    last = searcher.next_trial()
    (folders.trial_folder(bench.root, last.name) / "checkpoints").mkdir(parents=True)
    assert not searcher.report(last.name, 12, 0.1)
    searcher.end(last, "")
    assert states(bench)[:4] == ["complete"] * 3 + ["pruned"]
    assert not (folders.trial_folder(bench.root, last.name) / "checkpoints").exists()


def test_a_failed_trial_is_told_and_the_search_goes_on(bench):
    searcher = bench.start()
    bench.finish(searcher, searcher.next_trial())
    trial = searcher.next_trial()
    searcher.end(trial, "RuntimeError: no memory")
    assert reason(bench.study.trial(0)) == "RuntimeError: no memory"
    assert searcher.next_trial().name != trial.name


def test_trials_of_a_warm_up_that_failed_say_so(bench):
    searcher = bench.start()
    searcher.end(searcher.next_trial(), "boom")
    assert states(bench) == ["failed"]
    assert "warmup" in reason(bench.study.trial(0))
    assert "boom" in reason(bench.study.trial(0))


def test_a_search_whose_one_warm_up_failed_ends_and_tries_it_again_when_it_is_started_anew(bench):
    searcher = bench.start()
    warmup = searcher.next_trial()
    searcher.end(warmup, "boom")
    assert searcher.next_trial() is None
    assert searcher.exhausted
    assert bench.start().next_trial() == warmup


def test_a_space_that_varies_the_warm_up_goes_on_where_one_of_them_fails(tmp_path):
    bench = Bench(tmp_path, space=Space(Range("optim.lr", 1e-4, 1e-2, log=True)))
    searcher = bench.start()
    warmup = searcher.next_trial()
    searcher.end(warmup, "boom")
    other = searcher.next_trial()
    assert other.kind == "warmup"
    assert other.name != warmup.name


def test_a_finished_trial_without_its_metric_has_failed(bench):
    searcher = bench.start()
    bench.finish(searcher, searcher.next_trial())
    bench.finish(searcher, searcher.next_trial(), value=float("nan"))
    assert reason(bench.study.trial(0)) == "metric must be finite, got nan"


def test_after_a_kill_what_was_finished_is_told_and_what_ran_goes_on_with_no_trial_twice(bench):
    searcher = bench.start(slots=2)
    bench.finish(searcher, searcher.next_trial())
    done, cut = searcher.next_trial(), searcher.next_trial()
    bench.write(done, 0.7)  # killed before the driver heard of it
    searcher = bench.start(slots=2)
    assert (state(bench.study.trial(0)), bench.study.trial(0).value) == ("complete", 0.7)
    again = searcher.next_trial()
    assert (again.name, again.config) == (cut.name, cut.config)
    assert searcher.next_trial().name not in {cut.name, done.name}
    assert len(bench.study.trials) == 3


def test_after_a_kill_the_warm_up_goes_on_before_its_trials(bench):
    searcher = bench.start()
    warmup = searcher.next_trial()
    searcher = bench.start()
    assert searcher.next_trial() == warmup
    bench.finish(searcher, warmup)
    assert searcher.next_trial().kind == "trial"
    assert len(bench.study.trials) == 1


def test_a_pruning_step_that_the_driver_did_not_hear_of_is_judged_from_the_journal(bench):
    searcher = bench.start()
    bench.finish(searcher, searcher.next_trial())
    for _ in range(3):
        trial = searcher.next_trial()
        searcher.report(trial.name, 12, 0.5)
        bench.finish(searcher, trial)
    cut = searcher.next_trial()
    bench.journal(cut, {8: 0.9, 12: 0.1})
    searcher = bench.start()
    assert states(bench) == ["complete"] * 3 + ["pruned"]
    assert searcher.next_trial().name != cut.name


def test_what_was_tried_before_is_not_trained_again_and_a_space_of_few_points_ends(tmp_path):
    bench = Bench(tmp_path, space=Space(Choice("threshold.mode", ("dynamic", "fixed"))), trials=30)
    searcher = bench.start()
    trained = []
    while not searcher.exhausted:
        trial = searcher.next_trial()
        if trial is None:
            break
        trained.append(trial.name)
        bench.finish(searcher, trial, value=0.1 * len(trained))
    assert len(trained) == 3, "the warm-up and two trials"
    assert len({trial.value for trial in bench.study.trials}) == 2


def test_failed_trials_alone_are_tried_again_where_that_is_asked(bench):
    searcher = bench.start()
    bench.finish(searcher, searcher.next_trial())
    failed = searcher.next_trial()
    searcher.end(failed, "boom")
    bench.finish(searcher, searcher.next_trial())
    bench.study.repeat_failed()
    searcher = bench.start(retry_failed=True)
    assert searcher.next_trial().name == failed.name
    bench.finish(searcher, failed)
    assert searcher.exhausted
    assert states(bench) == ["failed", "complete", "complete"]


def test_a_row_that_finished_in_an_earlier_run_is_not_run_again(bench):
    study = SearchStudy(bench.storage, bench.space, BASE)
    study.enqueue({"full": bench.space.parameters(BASE, BASE)})
    searcher = bench.start(earlier={trial_of(BASE, 0, ("full",)).name: {"metrics": {SEG_MIOU: 0.42}}})
    warmup = searcher.next_trial()
    assert (state(bench.study.trial(0)), bench.study.trial(0).value) == ("complete", 0.42)
    assert warmup.kind == "warmup", "of the next trial"
    assert len(bench.study.trials) == 2


def until_exhausted(bench, searcher, seconds):
    """Run one after the other, each for so long; returns how many trials were trained."""
    trained = 0
    while not searcher.exhausted:
        trial = searcher.next_trial()
        bench.now += seconds
        trained += trial.kind == "trial"
        bench.finish(searcher, trial, 0.5)
    return trained


def test_hours_end_a_search_once_the_trial_that_crosses_them_is_done(bench):
    searcher = bench.start(limits=Limits(hours=1))
    assert until_exhausted(bench, searcher, seconds=1000) == 3, (
        "warm-up, then trials begun at 1000, 2000, 3000 s"
    )
    assert states(bench) == ["complete"] * 3
    assert bench.start(limits=Limits(hours=1)).exhausted, "hours of earlier starts count"
    assert not bench.start(limits=Limits(hours=2)).exhausted


def test_gpu_hours_count_what_every_running_trial_holds_the_warm_up_included(bench):
    searcher = bench.start(gpus=2.0, limits=Limits(gpu_hours=1))
    assert until_exhausted(bench, searcher, seconds=500) == 3, (
        "at 1000 GPU-seconds each, the warm-up among them"
    )
    assert bench.budget.gpu_seconds == 4 * 500 * 2
    assert bench.budget.seconds == 2000


def test_retrying_what_failed_needs_no_budget_and_counts_no_trial_anew(tmp_path):
    bench = Bench(tmp_path, trials=2)
    searcher = bench.start()
    bench.finish(searcher, searcher.next_trial())
    first = searcher.next_trial()
    searcher.end(first, "boom")
    bench.finish(searcher, searcher.next_trial())
    assert searcher.exhausted, "the budget is spent"

    bench.study.repeat_failed()
    bench.study.repeat_failed()
    searcher = bench.start(retry_failed=True)
    assert until_exhausted(bench, searcher, seconds=1) == 1
    assert states(bench) == ["failed", "complete", "complete"]
    assert begun(bench.study.trials) == 2


def test_nothing_waits_where_nothing_failed(bench):
    searcher = bench.start()
    bench.finish(searcher, searcher.next_trial())
    bench.finish(searcher, searcher.next_trial())
    assert bench.study.repeat_failed() == 0
    assert bench.start(retry_failed=True).exhausted


def test_tune_is_told_of_a_trial_but_not_where_it_is_tracked(bench):
    searcher = bench.start()
    tracking = TrackingSpec(uri="postgresql://me:secret@host/runs", run_name="a trial")
    searcher._make = lambda trial: make_spec(trial, bench.root, tracking, {})

    told = searcher.suggest("tune-1")

    assert told["spec"].tracking.run_name == "a trial"
    assert "secret" not in repr(told)


ON = "val/online/seg_miou"
SOURCES = Space(Choice("cam.source", ("assignment", "online")), Range("csc.weight", 0.01, 1.0))
WITH_AN, WITHOUT_AN = ({"cam.source": source, "csc.weight": 0.3} for source in ("assignment", "online"))


def warmed_up_for_both(folder):
    """A search whose next two trials are one with an assignment network and one without."""
    bench = Bench(folder, space=SOURCES)
    searcher = bench.start()
    bench.study.enqueue({"with": WITH_AN, "without": WITHOUT_AN})
    bench.finish(searcher, searcher.next_trial())
    return bench, searcher


def test_a_trial_without_an_assignment_network_is_judged_on_on_at_its_end(tmp_path):
    bench, searcher = warmed_up_for_both(tmp_path)
    for _ in range(2):
        trial = searcher.next_trial()
        bench.write(trial, {SEG_MIOU: 0.6, ON: 0.4})
        searcher.end(trial, "")
    assert {origin(trial): trial.value for trial in bench.study.trials} == {"with": 0.6, "without": 0.4}


def test_a_trial_without_an_assignment_network_is_judged_on_on_on_its_way(tmp_path):
    bench, searcher = warmed_up_for_both(tmp_path)
    for _ in range(2):
        trial = searcher.next_trial()
        searcher._names["tune"] = trial.name
        assert not searcher.should_stop("tune", {"step": 12, "assignment": 0.6, "online": 0.4})
        bench.finish(searcher, trial)
    on_way = {origin(trial): trial.intermediate_values for trial in bench.study.trials}
    assert on_way == {"with": {12: 0.6}, "without": {12: 0.4}}


def test_a_journal_is_read_for_the_network_that_its_run_is_judged_on(tmp_path):
    line = json.dumps({"step": 12, SEG_MIOU: 0.6, ON: 0.4})
    (tmp_path / "journal.jsonl").write_text(line + "\n")
    assert metric_by_step(tmp_path, STEPS, BASE) == {12: 0.6}
    assert metric_by_step(tmp_path, STEPS, override(BASE, {"cam.source": "online"})) == {12: 0.4}
