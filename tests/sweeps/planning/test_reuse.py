"""A run that finished elsewhere stands for a trial where settings, data and code are the same, only there."""

from __future__ import annotations

import json
import math

import pytest

from cosa.config import Config, TrainConfig, identity, override
from cosa.data.open import read_fingerprints
from cosa.tracking import TrackingSpec, costs
from sweeps.planning.plan import make_plan
from sweeps.planning.reuse import find_reusable
from sweeps.reporting import grids, results
from sweeps.running import driver, store
from sweeps.running.arguments import read_args
from sweeps.tables import Arm, Table

BASE = Config(train=TrainConfig(iterations=10, warmup=4))
TABLE = Table(name="t", title="", reference="a", arms=(Arm("a"), Arm("b", {"csc.weight": 0.0})))
PLAN = make_plan(BASE, [TABLE], [0])
WARMUP, ARM, OTHER = PLAN.trials
CODE = {"mlflow.source.git.commit": "c0ffee", "cosa.dirty": "false"}
DATA = {"cosa.data_fingerprint": "f00", "cosa.val_fingerprint": "f11"}
METRICS = {"val/assignment/seg_miou": 0.5}


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    """One store for all tests: making one takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


@pytest.fixture
def experiment(request):
    return request.node.name[:100]


@pytest.fixture
def finished(uri, experiment, tmp_path):
    """Tracks a finished run; returns its id."""
    store.initialise_store(uri, experiment)

    def track(config=ARM.config, *, status="FINISHED", metrics=METRICS, step=10, judged=None, **tags):
        out = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        facts = {**CODE, **DATA, "cosa.kind": "trial"}
        facts |= {key.replace("_in_", "."): value for key, value in tags.items()}
        tracker = TrackingSpec(uri=uri, experiment=experiment, tags=facts).tracker()
        tracker.start(config, out=out)
        tracker.log_metrics(metrics, step)
        result = {"identity": identity(config), "step": step, "metrics": METRICS, "seconds": 60.0}
        result |= judged or {}
        tracker.log_text(json.dumps(result), "result.json")
        tracker.finish(status)
        return tracker.run_id

    return track


def look(uri, experiment, code=CODE, data_tags=DATA, taken=None):
    client, experiment_id = costs.find_experiment(uri, experiment)
    return find_reusable(client, experiment_id, PLAN.trials, code, data_tags, taken or {})


def test_the_same_experiment_by_the_same_code_on_the_same_data_is_taken(uri, experiment, finished):
    run_id = finished()
    assert look(uri, experiment)[0] == {ARM.name: run_id}


def test_of_several_the_newest_is_taken(uri, experiment, finished):
    finished()
    newest = finished()
    assert look(uri, experiment)[0] == {ARM.name: newest}


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ({"cosa_in_dirty": "true"}, "they were run by other code, or by code with local changes"),
        ({"mlflow_in_source_in_git_in_commit": "beef"}, "they were run by other code"),
        ({"mlflow_in_source_in_git_in_commit": ""}, "they were run by other code"),
        ({"cosa_in_data_fingerprint": "other"}, "they were trained or judged on other data"),
        ({"cosa_in_val_fingerprint": "other"}, "they were trained or judged on other data"),
    ],
)
def test_other_code_or_data_is_never_taken_and_the_reason_is_told(uri, experiment, finished, tags, reason):
    finished(**tags)
    found, refused = look(uri, experiment)
    assert found == {}
    assert refused.startswith(f"1 trial finished earlier but will run again: {reason}")


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ({}, "the commit of this code is not known"),
        ({**CODE, "cosa.dirty": "true"}, "this code may have local changes: commit them"),
        ({"mlflow.source.git.commit": "c0ffee"}, "this code may have local changes: commit them"),
    ],
    ids=["no commit", "local changes", "a commit by word alone"],
)
def test_code_that_is_not_known_exactly_takes_nothing(uri, experiment, finished, code, reason):
    finished()
    found, refused = look(uri, experiment, code)
    assert (found, refused.endswith(reason)) == ({}, True)


@pytest.mark.parametrize(
    "run",
    [
        {"status": "FAILED"},
        {"config": override(ARM.config, {"csc.weight": 0.3})},
        {"cosa_in_kind": "warmup"},
        {"cosa_in_kind": "sweep"},
        {"step": 4},
        {"metrics": {}},
    ],
    ids=["failed", "another experiment", "a warm-up", "a sweep", "stopped early", "metrics lost"],
)
def test_what_is_no_whole_run_of_the_experiment_is_passed_over(uri, experiment, finished, run):
    finished(**run)
    assert look(uri, experiment) == ({}, "")


def test_a_run_that_was_taken_before_stays_until_it_is_deleted(uri, experiment, finished):
    run_id = finished(cosa_in_dirty="true")
    client, _ = costs.find_experiment(uri, experiment)
    assert look(uri, experiment)[0] == {}
    assert look(uri, experiment, taken={ARM.name: run_id}) == ({ARM.name: run_id}, "")
    client.delete_run(run_id)
    assert look(uri, experiment, taken={ARM.name: run_id}) == ({}, "")


def test_a_warmup_is_trained_only_for_arms_that_are(uri, experiment, finished):
    taken = {ARM.name: finished(), OTHER.name: finished(OTHER.config)}
    assert look(uri, experiment)[0] == taken
    assert PLAN.remaining({ARM.name}) == [WARMUP, OTHER]
    assert PLAN.remaining(taken) == []


def open_new(uri, experiment, folder, reused):
    given = ["--out", str(folder / "new"), "--tracking-uri", uri, "--experiment", experiment]
    return store.open_sweep(read_args("ablation", "", ("3b",), given), PLAN, reused)


def test_the_report_reads_earlier_runs_where_they_are(uri, experiment, finished, tmp_path):
    run_id = finished()
    sweep = open_new(uri, experiment, tmp_path, {ARM.name: run_id})
    found = results.read_results(uri, sweep.run_id)
    (filled,) = found.tables
    rows = {row.arm.name: row for row in filled.rows}
    assert filled.of(rows["a"], "val/assignment/seg_miou")["mean"] == 0.5
    assert rows["a"].runs == {0: run_id}
    assert rows["b"].gaps == ("seed 0: not run yet",)
    assert found.provenance["trials"].startswith("1 of 2 finished, 1 of them in earlier runs")
    assert store.client_of(uri).get_run(sweep.run_id).data.tags["cosa.reused"] == "1"


def test_a_report_averages_the_classes_that_it_is_asked_for(uri, experiment, finished, tmp_path):
    ious = {"background": 0.9, "cat": 0.4, "dog": 0.2, "bird": 0.0}
    per_class = {"seg_iou": ious, "seg_iou_labelled": ious, "cpl_iou": {"cat": 0.6, "bird": 0.1}}
    judged = {"classes": ["cat", "dog", "bird"], "assignment": {"per_class": per_class}}
    kept = {**METRICS, "val/assignment/cpl_cmiou": 0.9}
    earlier = finished(OTHER.config, metrics=kept)  # which did not keep what each class has
    reused = {ARM.name: finished(judged=judged, metrics=kept), OTHER.name: earlier}
    sweep = open_new(uri, experiment, tmp_path, reused)

    found = results.read_results(uri, sweep.run_id, classes=["cat", "dog"])
    (filled,) = found.tables
    means = {key: filled.of(filled.rows[0], key)["mean"] for key in filled.table.metrics}
    assert means["val/assignment/seg_cmiou"] == pytest.approx(0.3)
    assert means["val/assignment/seg_cmiou_labelled"] == pytest.approx(0.3)
    assert means["val/assignment/cpl_cmiou"] == 0.6  # dog is neither in the truth nor predicted
    assert means["val/assignment/seg_miou"] == 0.5
    assert math.isnan(filled.of(filled.rows[1], "val/assignment/cpl_cmiou")["mean"])  # not 0.9 of others
    assert "over cat, dog" in grids.grid(filled, 1).remarks[0]
    with pytest.raises(ValueError, match="judged, got 'car'; did you mean 'cat'"):
        results.read_results(uri, sweep.run_id, classes=["car"])


def test_an_earlier_run_that_was_deleted_is_a_gap(uri, experiment, finished, tmp_path):
    run_id = finished()
    sweep = open_new(uri, experiment, tmp_path, {ARM.name: run_id})
    store.client_of(uri).delete_run(run_id)
    row = results.read_results(uri, sweep.run_id).tables[0].rows[0]
    assert (row.runs, row.gaps) == ({}, ("seed 0: not run yet",))


OWN_TABLE = """
from sweeps.tables import Arm, Table

TABLE = Table(name="t", title="Two", reference="a", arms=(Arm("a"), Arm("b", {"csc.weight": 0.0})))
"""


@pytest.fixture
def sweep(uri, experiment, finished, tmp_path, monkeypatch, shapes_root, capsys):
    """A command line both of whose trials finished in earlier runs; calling it returns code and output."""
    (tmp_path / "t.py").write_text(OWN_TABLE)
    arguments = [
        *("--tables", str(tmp_path / "t.py"), "--out", str(tmp_path / "new"), "--tracking-uri", uri),
        *("--experiment", experiment, "--set", f"data.root={shapes_root}", "train.iterations=10"),
        *("train.warmup=4", "optim.lr_warmup=0"),
    ]
    args = read_args("ablation", "", (), arguments)
    tags = {name.replace(".", "_in_"): tag for name, tag in read_fingerprints(args.base.data).items()}
    for trial in make_plan(args.base, args.tables, args.seeds).trials:
        if trial.kind == "trial":
            finished(trial.config, **tags)
    monkeypatch.setattr(driver, "source_tags", lambda: CODE)

    def call(*more):
        code = driver.main("ablation", "", (), [*arguments, *more])
        return code, capsys.readouterr().out

    return call


def test_a_sweep_of_trials_that_all_finished_earlier_trains_nothing_and_reports_them(sweep, tmp_path):
    code, output = sweep()
    assert code == 0
    assert "finished already: 0; taken from earlier runs: 2; left to train: 0 trials, 0 iterations" in output
    assert not (tmp_path / "new" / "trials").exists()
    table = (tmp_path / "new" / "tables.csv").read_text()
    assert table.count(",50.0000,") >= 2
    assert "2 of 2 finished, 2 of them in earlier runs" in (tmp_path / "new" / "report.html").read_text()


def test_what_was_taken_stays_though_the_code_has_changed_since(sweep, monkeypatch):
    sweep()
    monkeypatch.setattr(driver, "source_tags", lambda: {**CODE, "mlflow.source.git.commit": "beef"})
    code, output = sweep("--retry-failed")
    assert (code, "nothing has failed" in output) == (0, True)


def test_a_dry_run_counts_what_will_be_taken_and_fresh_forbids_it(sweep):
    assert "taken from earlier runs: 2" in sweep("--dry-run")[1]
    assert "earlier" not in sweep("--dry-run", "--fresh")[1]
