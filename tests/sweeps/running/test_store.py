"""The sweep in MLflow: one parent for life, runs that say what became of their trials."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from cosa.config import Config, TrainConfig, identity, override, warmup_identity
from cosa.tracking import TrackingError, costs, read_run_id
from cosa.tracking.journal import add_entry
from sweeps import runs
from sweeps.planning import folder as folders
from sweeps.planning.folder import SweepState
from sweeps.planning.plan import make_plan
from sweeps.reporting import results
from sweeps.running import store
from sweeps.running.arguments import read_args
from sweeps.tables import Arm, Table, get_table

BASE = Config(train=TrainConfig(iterations=10, warmup=4))
FULL, OTHER = Arm("full"), Arm("no-CSC", {"csc.weight": 0.0})
TABLE = Table(name="3b", title="", arms=(FULL, OTHER))
PLAN = make_plan(BASE, [TABLE], [0])
WARMUP, TRIAL, FAILING = PLAN.trials
METRICS = dict.fromkeys(("val/assignment/seg_miou", "val/assignment/cpl_miou"), 0.5)


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    """One store for all tests: making one takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


@pytest.fixture
def root(tmp_path):
    return tmp_path / "sweep"


def open_sweep(uri, root, plan=PLAN, experiment="test"):
    given = ["--preset", "voc", "--out", str(root), "--tracking-uri", uri, "--experiment", experiment]
    given.append("--no-system-metrics")  # of the machine that tests it
    return store.open_sweep(read_args("ablation", "", ("3b",), given), plan)


def train(sweep, root, trial, status="FINISHED"):
    """What the trainer leaves of a trial, with its run closed as `status` or left open."""
    folder = folders.trial_folder(root, trial.name)
    tracker = sweep.spec(trial).tracker()
    tracker.start(trial.config, out=folder, tags={"cosa.data_fingerprint": "f00"}, resume_step=0)
    tracker.log_metrics(METRICS, 10)
    if status:
        tracker.finish(status)
    else:
        tracker.settle()
        tracker._syncer.stop()  # its process was killed
    return tracker.run_id


def result_of(trial):
    return {
        "identity": identity(trial.config),
        "warmup_identity": warmup_identity(trial.config),
        "step": trial.last_step,
        "metrics": METRICS,
        "data_fingerprint": "f00",
    }


def sync(sweep, *finished, plan=PLAN, failures=None):
    results = {trial.name: result_of(trial) for trial in finished}
    sweep.sync(SweepState(plan, results, {}), failures or {})


def read(uri, run_id):
    return store.client_of(uri).get_run(run_id)


def test_the_same_folder_opens_the_same_parent_run(uri, root):
    first = open_sweep(uri, root)
    first.tracker.finish("KILLED")
    assert open_sweep(uri, root).run_id == first.run_id
    assert read(uri, first.run_id).data.tags["cosa.kind"] == "sweep"


def test_a_sweep_stays_in_the_store_it_began_with(uri, root, tmp_path):
    open_sweep(uri, root)
    with pytest.raises(ValueError, match=r"--tracking-uri must stay sqlite:.* for the sweep in"):
        open_sweep(f"sqlite:///{tmp_path}/other.db", root)


def test_a_trials_run_is_nested_and_tagged_by_table_arm_and_seed(uri, root):
    sweep = open_sweep(uri, root)
    tags = read(uri, train(sweep, root, TRIAL)).data.tags
    expected = {
        "mlflow.parentRunId": sweep.run_id,
        "mlflow.runName": "full, seed 0",
        "mlflow.source.name": "sweeps/ablation.py",
        "cosa.kind": "trial",
        "cosa.sweep": "sweep",
        "cosa.preset": "voc",
        "cosa.tables": "3b",
        "cosa.arms": "3b/full",
        "cosa.arm": "full",
        "cosa.changes": "none",
        "cosa.seed": "0",
        "cosa.identity": identity(TRIAL.config),
        "cosa.warmup_identity": warmup_identity(TRIAL.config),
    }
    assert {key: tags[key] for key in expected} == expected


def test_a_run_says_what_its_arm_changes(uri, root):
    sweep = open_sweep(uri, root)
    assert read(uri, train(sweep, root, FAILING)).data.tags["cosa.changes"] == "csc.weight=0.0"


def test_a_warmups_run_fills_no_row(uri, root):
    tags = read(uri, train(open_sweep(uri, root), root, WARMUP)).data.tags
    assert (tags["cosa.kind"], tags["cosa.arm"]) == ("warmup", "warm-up")
    assert "cosa.arms" not in tags


def test_a_run_left_open_by_a_killed_trial_is_finished_once(uri, root):
    sweep = open_sweep(uri, root)
    run_id = train(sweep, root, TRIAL, status=None)
    sync(sweep, TRIAL)
    run = read(uri, run_id)
    assert run.info.status == "FINISHED"
    assert read_run_id(folders.trial_folder(root, TRIAL.name)) == run_id
    assert len(store.client_of(uri).get_metric_history(run_id, "val/assignment/seg_miou")) == 1


def test_what_trials_left_in_their_journals_is_collected(uri, root):
    sweep = open_sweep(uri, root)
    folder = folders.trial_folder(root, TRIAL.name)
    train(sweep, root, TRIAL, status=None)
    add_entry(folder, 12, **{"train/loss/total": 0.25})  # told when its syncer was gone already
    sync(sweep)
    run = read(uri, read_run_id(folder))
    assert (run.info.status, run.data.metrics["train/loss/total"]) == ("KILLED", 0.25)
    sync(sweep, TRIAL)
    assert read(uri, run.info.run_id).info.status == "FINISHED"


def test_collecting_from_a_store_that_is_away_names_what_to_do(uri, root, tmp_path):
    sweep = open_sweep(uri, root)
    train(sweep, root, TRIAL, status=None)
    (tmp_path / "file").touch()
    away = dataclasses.replace(sweep, uri=f"sqlite:///{tmp_path}/file/mlflow.db")
    with pytest.raises(
        TrackingError, match=r"nothing is lost: run the same .* or: cosa-track flush .*/sweep"
    ):
        sync(away)


def test_a_trial_names_its_warmups_run_that_was_made_after_it(uri, root):
    sweep = open_sweep(uri, root)
    run_id = train(sweep, root, TRIAL)
    warmup = train(sweep, root, WARMUP)
    sync(sweep, TRIAL)
    assert read(uri, run_id).data.tags["cosa.forked_from"] == warmup


def test_the_run_of_an_arm_names_the_run_it_is_forked_from_or_its_name_while_no_id_is_told(uri, root):
    sweep = open_sweep(uri, root)
    assert sweep.spec(TRIAL).tags["cosa.forked_from"] == WARMUP.name
    warmup = train(sweep, root, WARMUP)
    assert sweep.spec(TRIAL).tags["cosa.forked_from"] == warmup
    assert "cosa.forked_from" not in sweep.spec(WARMUP).tags


def test_a_warmup_whose_folder_is_gone_leaves_its_id_on_the_runs_that_know_it(uri, root):
    sweep = open_sweep(uri, root)
    warmup, run_id = train(sweep, root, WARMUP), train(sweep, root, TRIAL)
    shutil.rmtree(folders.trial_folder(root, WARMUP.name))
    sync(sweep, TRIAL)
    assert read(uri, run_id).data.tags["cosa.forked_from"] == warmup


def test_a_sweep_is_stopped_by_what_stops_it_and_not_by_its_store(uri, root, monkeypatch, caplog):
    from mlflow.exceptions import MlflowException

    def gone(uri):
        raise MlflowException("Max retries exceeded")

    sweep = open_sweep(uri, root)
    monkeypatch.setattr(store, "client_of", gone)
    sweep.stop("KILLED")
    assert "must answer" in caplog.text


def test_the_parent_shows_how_the_sweep_stands_and_then_its_tables_with_a_link(uri, root, tmp_path):
    sweep = open_sweep(uri, root)
    sweep.tell({"sweep/done": 2, "sweep/failed": 1, "sweep/running": 3}, "2 of 6 done")
    sweep.tracker.settle()
    run = read(uri, sweep.run_id)
    assert run.data.metrics == {"sweep/done": 2, "sweep/failed": 1, "sweep/running": 3}
    assert run.data.tags["mlflow.note.content"].startswith("2 of 6 done")

    page = tmp_path / "report.html"
    page.write_text("a page")
    sweep.close("### Table 3b", [page], failed=False)
    link = f"(#/experiments/{run.info.experiment_id}/runs/{sweep.run_id}/artifacts/report/report.html)"
    note = read(uri, sweep.run_id).data.tags["mlflow.note.content"]
    assert link in note
    assert note.endswith("### Table 3b")


def test_a_deleted_run_is_written_again_from_the_result(uri, root):
    sweep = open_sweep(uri, root)
    store.client_of(uri).delete_run(train(sweep, root, TRIAL))
    sync(sweep, TRIAL)
    run = read(uri, read_run_id(folders.trial_folder(root, TRIAL.name)))
    assert (run.info.status, run.data.metrics) == ("FINISHED", METRICS)


def test_a_run_that_is_written_again_has_its_histories_and_files(uri, root):
    sweep = open_sweep(uri, root)
    warmup_run = train(sweep, root, WARMUP)
    store.client_of(uri).delete_run(train(sweep, root, TRIAL))
    folder = folders.trial_folder(root, TRIAL.name)
    shutil.rmtree(folder / "tracking")  # what it was told is lost, too
    for name in ("analysis/step_00000006.json", "panels/step_00000006.png", "model/classes.json"):
        (folder / name).parent.mkdir()
        (folder / name).write_text("{}")
    lines = [{"step": step, "time": step, "val/assignment/seg_miou": step / 20} for step in (6, 8)]
    (folder / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 1')
    (folder / "result.json").write_text("{}")
    sync(sweep, TRIAL)
    run_id, client = read_run_id(folder), store.client_of(uri)
    history = client.get_metric_history(run_id, "val/assignment/seg_miou")
    assert [(point.step, point.value) for point in history] == [(6, 0.3), (8, 0.4), (10, 0.5)]
    kept = {
        item.path for name in ("analysis", "panels", "model") for item in client.list_artifacts(run_id, name)
    }
    assert kept == {"analysis/step_00000006.json", "panels/step_00000006.png", "model/classes.json"}
    assert read(uri, run_id).data.tags["cosa.forked_from"] == warmup_run


def test_a_run_of_an_oracle_that_is_written_again_says_so(uri, root):
    oracle = Table(name="4a", title="", reference="GT", arms=(Arm("GT", {"s2c.source": "gt"}),))
    plan = make_plan(BASE, [oracle], [0])
    sweep = open_sweep(uri, root, plan)
    sync(sweep, plan.trials[0], plan=plan)
    run_id = read_run_id(folders.trial_folder(root, plan.trials[0].name))
    assert read(uri, run_id).data.tags["cosa.oracle"] == "gt"


def test_figures_keep_their_folder_in_the_report(uri, root, tmp_path):
    sweep = open_sweep(uri, root)
    (tmp_path / "figures").mkdir()
    files = [tmp_path / "tables.md", tmp_path / "figures" / "fig9-left.svg"]
    for path in files:
        path.write_text("x")
    sweep.close("", files, failed=False)
    client = store.client_of(uri)
    assert [item.path for item in client.list_artifacts(sweep.run_id, "report/figures")] == [
        "report/figures/fig9-left.svg"
    ]


def test_an_experiment_of_another_project_is_refused(uri, root):
    client = store.client_of(uri)
    client.create_run(client.create_experiment("theirs"), run_name="their-run")
    with pytest.raises(ValueError, match="got 'theirs' with runs of another project such as 'their-run'"):
        open_sweep(uri, root, experiment="theirs")
    assert not (root / "run.json").exists()


def test_an_experiment_opens_as_training_runs_in_the_ui(uri, root):
    open_sweep(uri, root)
    tags = store.client_of(uri).get_experiment_by_name("test").tags
    assert tags["mlflow.experimentKind"] == "custom_model_development"


def test_a_store_that_is_not_there_is_not_made(tmp_path):
    assert costs.find_experiment(f"sqlite:///{tmp_path}/none.db", "test") is None
    assert not list(tmp_path.iterdir())


def test_a_finished_trial_is_retagged_when_more_tables_hold_it(uri, root):
    sweep = open_sweep(uri, root)
    run_id = train(sweep, root, TRIAL)
    sweep.tracker.finish()
    both = make_plan(BASE, [get_table("3a"), get_table("3b")], [0])
    again = open_sweep(uri, root, both)
    sync(again, both.named(TRIAL.name), plan=both)
    assert read(uri, run_id).data.tags["cosa.arms"] == "3a/full 3b/full"


def test_a_failed_trials_run_carries_its_reason_until_it_finishes(uri, root):
    sweep = open_sweep(uri, root)
    run_id = train(sweep, root, TRIAL, status="FAILED")
    sync(sweep, failures={TRIAL.name: "NonFiniteLossError: c2s", FAILING.name: "never started"})
    assert read(uri, run_id).data.tags["cosa.failure"] == "NonFiniteLossError: c2s"
    train(sweep, root, TRIAL)
    sync(sweep, TRIAL)
    assert "cosa.failure" not in read(uri, run_id).data.tags


def test_what_interrupts_a_sweep_closes_its_run_as_killed_and_what_breaks_it_as_failed(uri, root):
    for error, status in ((KeyboardInterrupt, "KILLED"), (OSError, "FAILED")):
        with pytest.raises(error), open_sweep(uri, root) as sweep:
            raise error
        assert read(uri, sweep.run_id).info.status == status


def test_a_sync_brings_the_store_to_what_the_folders_say(uri, root):
    sweep = open_sweep(uri, root)
    run_id = train(sweep, root, TRIAL, status=None)
    state = SweepState(PLAN, {TRIAL.name: {**result_of(TRIAL), "seconds": 1800.0}}, {})
    sweep.sync(state, {FAILING.name: "never started"})
    assert read(uri, run_id).info.status == "FINISHED"
    assert sweep.failures() == {FAILING.name: "never started"}
    assert read(uri, sweep.run_id).data.tags["cosa.training_hours"] == "0.500"


def test_stopping_closes_the_runs_that_were_training_and_no_others(uri, root):
    sweep = open_sweep(uri, root)
    done, cut = train(sweep, root, WARMUP), train(sweep, root, TRIAL, status=None)
    sweep.stop("KILLED")
    states = [read(uri, run_id).info.status for run_id in (done, cut, sweep.run_id)]
    assert states == ["FINISHED", "KILLED", "KILLED"]


def test_results_are_read_back_with_the_reasons_of_what_failed(uri, root):
    sweep = open_sweep(uri, root)
    train(sweep, root, TRIAL)
    sync(sweep, failures={FAILING.name: "OutOfMemoryError: too large"})
    found = results.read_results(uri, sweep.run_id)
    rows = {row.arm.name: row for row in found.tables[0].rows}
    filled = found.tables[0]
    assert filled.of(rows["full"], "val/assignment/seg_miou")["mean"] == 0.5
    assert rows["no-CSC"].gaps == ("seed 0: failed (OutOfMemoryError: too large)",)
    assert found.provenance["data"] == "fingerprint f00"
    assert found.provenance["trials"].startswith("1 of 2 finished")
    assert found.standing is not None  # its run is open


def test_a_sweep_that_reports_before_it_closes_its_run_says_that_it_has_finished(uri, root):
    sweep = open_sweep(uri, root)
    sweep.tell({"sweep/done": 2, "sweep/failed": 0, "sweep/running": 0}, "2 of 2 done")
    sweep.tracker.settle(60)
    assert results.read_results(uri, sweep.run_id).provenance["state"].startswith("2 done, 0 failed")
    found = results.read_results(uri, sweep.run_id, status="FINISHED")
    assert (found.standing, found.provenance["state"]) == (None, "finished")


def test_a_trial_outside_of_the_plan_does_not_count(uri, root):
    sweep = open_sweep(uri, root)
    changed = make_plan(override(BASE, {"c2s.weight": 0.2}), [TABLE], [0]).trials[1]
    train(sweep, root, changed)
    rows = results.read_results(uri, sweep.run_id).tables[0].rows
    assert [dict(row.runs) for row in rows if row.arm.name == "full"] == [{}]


def test_a_sweep_is_found_by_name_and_a_wrong_name_by_its_nearest(uri, root):
    run_id = open_sweep(uri, root.with_name("ablation-voc")).run_id
    assert runs.find_sweep(uri, "test", "ablation-voc") == run_id
    with pytest.raises(ValueError, match="got 'ablatoin-voc'; did you mean 'ablation-voc'"):
        runs.find_sweep(uri, "test", "ablatoin-voc")


def test_a_report_makes_no_store_where_there_is_none(tmp_path):
    with pytest.raises(ValueError, match="must name a store that exists"):
        runs.find_sweep(f"sqlite:///{tmp_path}/none.db", "test", "")
    assert not list(tmp_path.iterdir())


def test_a_store_that_goes_away_is_told_in_one_line(uri, root, monkeypatch):
    from mlflow.exceptions import MlflowException

    def gone(uri):
        raise MlflowException("Max retries exceeded")

    sweep = open_sweep(uri, root)
    monkeypatch.setattr(store, "client_of", gone)
    with pytest.raises(TrackingError, match=r"tracking store must answer, got none .*Max retries exceeded"):
        sweep.tag("a", "b")


def test_the_plan_is_kept_with_the_parent(uri, root, tmp_path):
    run_id = open_sweep(uri, root).run_id
    path = store.client_of(uri).download_artifacts(run_id, "plan.json", str(tmp_path))
    content = json.loads(Path(path).read_text())
    assert [trial["name"] for trial in content["trials"]] == [trial.name for trial in PLAN.trials]
