"""A tracking store that is away, and runs that are killed: everything is delivered, once and in order.

The store is a real one in SQLite. It is taken away by moving its folder, which a real server's tests do by
killing it (tests/faults/test_tracking_outage.py).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric

from cosa import cli
from cosa.config import Config
from cosa.storage.files import read_lines
from cosa.storage.run_folder import TRAINING_TAG, read_metrics
from cosa.tracking import (
    MlflowTracker,
    RunGoneError,
    StillRunningError,
    Tracker,
    TrackingError,
    TrackingSpec,
    find_tracked,
    initialise_store,
    read_run_id,
    sync_run,
    sync_status,
)
from cosa.tracking.journal import add_entry, read_state, write_state
from cosa.tracking.sync import KEY_TAG, RunSync
from tests.reading import ROOT


class Store:
    """A SQLite store whose folder can be taken away and brought back."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.uri = f"sqlite:///{folder}/mlflow.db"
        self.client = MlflowClient(self.uri)
        self._gone = False

    def go(self) -> None:
        self.folder.rename(self.folder.with_suffix(".away"))
        self.folder.touch()  # a file, where a folder is to be
        self._gone = True

    def come_back(self) -> None:
        if self._gone:
            self.folder.unlink()
            self.folder.with_suffix(".away").rename(self.folder)
            self._gone = False

    def history(self, run_id: str, name: str) -> list[tuple[int, float]]:
        """In the order in which the store has them."""
        return [(point.step, point.value) for point in self.client.get_metric_history(run_id, name)]

    def runs(self) -> list[str]:
        experiment = self.client.get_experiment_by_name("tests")
        return [run.info.run_id for run in self.client.search_runs([experiment.experiment_id])]

    def status(self, run_id: str) -> str:
        return str(self.client.get_run(run_id).info.status)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty store, to be copied: its first migration takes seconds."""
    folder = tmp_path_factory.mktemp("fresh")
    initialise_store(f"sqlite:///{folder}/mlflow.db", "tests")
    return folder


@pytest.fixture
def store(fresh: Path, tmp_path: Path) -> Iterator[Store]:
    shutil.copytree(fresh, tmp_path / "store")
    found = Store(tmp_path / "store")
    place = (tmp_path / "store" / "mlartifacts").as_uri()
    experiment = found.client.get_experiment_by_name("tests")
    found.client.rename_experiment(experiment.experiment_id, "elsewhere")
    found.client.create_experiment("tests", artifact_location=place)
    yield found
    found.come_back()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "run"


def begin(store: Store, out: Path) -> MlflowTracker:
    tracker = MlflowTracker(TrackingSpec(uri=store.uri, experiment="tests", system_metrics=False))
    tracker.start(Config(), out=out)
    return tracker


def die(tracker: MlflowTracker) -> None:
    """Leave a tracker as a killed process leaves it: no last word, and the lock is free."""
    assert tracker._syncer is not None
    tracker._syncer.stop()


def deliver_again(out: Path) -> None:
    """Forget how much was delivered, as a process does that dies between giving and noting."""
    state = read_state(out)
    state.journal = state.rewound = 0
    write_state(out, state)
    add_entry(out, 0, kind="finish", status="FINISHED")
    sync_run(out)


def test_a_run_opens_and_ends_while_the_store_is_away(
    store: Store, out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store.go()

    tracker = begin(store, out)
    tracker.log_metrics({"loss": 1.0}, 1)
    tracker.finish()

    assert tracker.run_id is None
    assert "training goes on" in caplog.messages[0]
    assert caplog.messages[-1].endswith(f"later: cosa-track flush {out}")
    assert len(caplog.messages) == 2
    assert sync_status(out).left == sync_status(out).entries == 4  # open, config.json, a metric, the end


def test_what_a_run_left_is_delivered_later(store: Store, out: Path) -> None:
    store.go()
    tracker = begin(store, out)
    for step in range(5):
        tracker.log_metrics({"loss": step / 2}, step)
    (out / "panel.png").write_bytes(b"picture")
    tracker.log_artifact(out / "panel.png", "panels")
    tracker.finish("FAILED")
    store.come_back()

    found = sync_run(out)

    assert (found.left, found.delivered) == (0, 9)
    assert store.runs() == [found.run_id] == [read_run_id(out)]
    assert store.history(found.run_id, "loss") == [(step, step / 2) for step in range(5)]
    assert store.status(found.run_id) == "FAILED"
    kept = {item.path for item in store.client.list_artifacts(found.run_id)}
    assert kept == {"config.json", "panels"}


def test_data_and_what_the_machine_did_are_delivered_later_and_once(store: Store, out: Path) -> None:
    store.go()
    tracker = MlflowTracker(TrackingSpec(uri=store.uri, experiment="tests"))
    tracker.start(Config(), out=out, tags={TRAINING_TAG: "abc"})
    tracker.log_metrics({"loss": 1.0}, 1)
    tracker.finish()
    store.come_back()

    sync_run(out)
    deliver_again(out)

    (run_id,) = store.runs()
    run = store.client.get_run(run_id)
    assert [found.dataset.digest for found in run.inputs.dataset_inputs] == ["abc"]
    ((step, used),) = store.history(run_id, "system/system_memory_usage_megabytes")
    assert step == 1
    assert used > 0


def test_a_store_that_comes_back_while_a_run_goes_on_gets_what_it_missed(store: Store, out: Path) -> None:
    tracker = begin(store, out)
    tracker.log_metrics({"loss": 1.0}, 1)
    tracker.settle()
    store.go()
    tracker.log_metrics({"loss": 2.0}, 2)
    with pytest.raises(TrackingError, match="must answer"):
        tracker.settle()
    store.come_back()
    tracker.log_metrics({"loss": 3.0}, 3)

    tracker.finish()

    assert tracker.run_id is not None
    assert store.history(tracker.run_id, "loss") == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert sync_status(out).left == 0


def test_an_outage_costs_one_warning(store: Store, out: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = begin(store, out)
    store.go()

    for step in range(3):
        tracker.log_metrics({"loss": 1.0}, step)
        with pytest.raises(TrackingError):
            tracker.settle()
    tracker.log_metrics({"loss": 1.0}, 3)

    assert len(caplog.messages) == 1
    die(tracker)


def test_the_moments_are_those_of_training_and_not_of_delivery(store: Store, out: Path) -> None:
    store.go()
    tracker = begin(store, out)
    tracker.log_metrics({"loss": 1.0}, 1)
    tracker.finish()
    store.come_back()

    run_id = sync_run(out).run_id

    lines = [line.content for line in read_lines(out / "journal.jsonl")]
    told = {line.get("kind", "metrics"): line["time"] for line in lines}
    run = store.client.get_run(run_id)
    assert (run.info.start_time, run.info.end_time) == (told["open"], told["finish"])
    assert store.client.get_metric_history(run_id, "loss")[0].timestamp == told["metrics"]


def test_delivering_all_of_it_again_changes_nothing(store: Store, out: Path) -> None:
    tracker = begin(store, out)
    for step in range(10):
        tracker.log_metrics({"loss": step / 2, "odd": float("nan")}, step)
    tracker.finish()
    assert tracker.run_id is not None

    deliver_again(out)

    assert store.runs() == [tracker.run_id]
    assert store.history(tracker.run_id, "loss") == [(step, step / 2) for step in range(10)]


def test_a_run_whose_id_was_never_noted_is_found_again(store: Store, out: Path) -> None:
    tracker = begin(store, out)
    tracker.log_metrics({"loss": 1.0}, 1)
    tracker.settle()
    die(tracker)
    (out / "run.json").write_text('{"run_id": "ab')

    found = sync_run(out)

    assert store.runs() == [tracker.run_id] == [found.run_id]
    assert store.history(found.run_id, "loss") == [(1, 1.0)]


def test_a_run_that_a_lost_request_made_is_removed(store: Store, out: Path) -> None:
    tracker = begin(store, out)
    tracker.settle()
    assert tracker.run_id is not None
    own = store.client.get_run(tracker.run_id)
    store.client.create_run(own.info.experiment_id, tags={KEY_TAG: own.data.tags[KEY_TAG]})

    tracker.finish()

    assert store.runs() == [tracker.run_id]


def test_a_killed_process_loses_nothing_and_is_closed_as_killed(store: Store, out: Path) -> None:
    program = f"""
import os, signal
from pathlib import Path
from cosa.config import Config
from cosa.tracking import MlflowTracker, TrackingSpec
tracker = MlflowTracker(TrackingSpec(uri={store.uri!r}, experiment="tests"))
tracker.start(Config(), out=Path({str(out)!r}))
for step in range(50):
    tracker.log_metrics({{"loss": step / 2}}, step)
os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL

    found = sync_run(out)

    assert store.history(found.run_id, "loss") == [(step, step / 2) for step in range(50)]
    assert (store.runs(), store.status(found.run_id)) == ([found.run_id], "KILLED")


def test_a_resumed_run_delivers_once_what_it_trains_again(store: Store, out: Path) -> None:
    store.go()
    tracker = begin(store, out)
    for step in (1, 2, 3):
        tracker.log_metrics({"loss": step / 2}, step)
    die(tracker)
    store.come_back()

    again = MlflowTracker(TrackingSpec(uri=store.uri, experiment="tests", system_metrics=False))
    again.start(Config(), out=out, resume_step=1)
    for step in (2, 3, 4):
        again.log_metrics({"loss": step / 2}, step)
    again.finish()

    assert store.runs() == [again.run_id]
    assert again.run_id is not None
    assert store.history(again.run_id, "loss") == [(1, 0.5), (2, 1.0), (3, 1.5), (4, 2.0)]
    assert store.client.get_run(again.run_id).data.tags["cosa.resumed_at"] == "1"


def test_a_run_that_goes_back_while_another_process_syncs_it_is_there_once(store: Store, out: Path) -> None:
    tracker = begin(store, out)
    die(tracker)
    for step in range(1, 6):
        add_entry(out, step, loss=step / 2)
    other = RunSync(out, store.uri, deque())
    other.run()

    again = Tracker()
    again.start(Config(), out=out, resume_step=2)
    for step in range(3, 8):
        again.log_metrics({"loss": step / 2 + 100, "new": 1.0}, step)
    other.run()

    run_id = other.state.run_id
    new = [(step, step / 2 + 100) for step in (6, 7)]
    assert store.history(run_id, "loss") == [(step, step / 2) for step in range(1, 6)] + new
    assert [step for step, _ in store.history(run_id, "new")] == [3, 4, 5, 6, 7]
    assert sync_status(out).left == 0


def test_a_run_that_goes_on_without_being_tracked_loses_nothing(store: Store, out: Path) -> None:
    tracker = begin(store, out)
    for step in (1, 2, 3):
        tracker.log_metrics({"loss": step / 2}, step)
    tracker.settle()
    die(tracker)

    alone = Tracker()
    alone.start(Config(), out=out, resume_step=1)
    for step in (2, 3, 4):
        alone.log_metrics({"loss": step / 2}, step)
    found = sync_run(out)

    assert store.history(found.run_id, "loss") == [(1, 0.5), (2, 1.0), (3, 1.5), (4, 2.0)]


def test_a_run_that_was_not_tracked_at_first_brings_its_history(store: Store, out: Path) -> None:
    alone = Tracker()
    alone.start(Config(), out=out, resume_step=0)
    alone.log_metrics({"loss": 0.5}, 1)
    assert find_tracked(out) == []

    tracker = MlflowTracker(TrackingSpec(uri=store.uri, experiment="tests", system_metrics=False))
    tracker.start(Config(), out=out, resume_step=1)
    tracker.log_metrics({"loss": 1.0}, 2)
    tracker.finish()

    assert tracker.run_id is not None
    assert store.history(tracker.run_id, "loss") == [(1, 0.5), (2, 1.0)]


def test_a_line_that_a_killed_process_left_torn_is_passed_over(store: Store, out: Path) -> None:
    tracker = begin(store, out)
    tracker.settle()
    die(tracker)
    with (out / "journal.jsonl").open("a") as file:
        file.write('{"step": 1, "lo')

    again = begin(store, out)
    again.log_metrics({"loss": 1.0}, 1)
    again.finish()

    assert again.run_id is not None
    assert store.history(again.run_id, "loss") == [(1, 1.0)]


@pytest.fixture
def old(store: Store, out: Path) -> str:
    """A run that commit 25ac2bd began, and its id: it had two journals, and the store was given half of it.

    A file waits there, two more steps and a file were told, and it was killed between its own journal of step
    50 and its tracker's.
    """
    shutil.copytree(Path(__file__).parent / "old_run", out)
    lines = [line.content for line in read_lines(out / "tracking" / "journal.jsonl")]
    experiment = store.client.get_experiment_by_name("tests").experiment_id
    run = store.client.create_run(experiment, tags={KEY_TAG: lines[0]["key"]})
    for line in lines[2:4]:
        metrics = [Metric(name, value, line["time"], line["step"]) for name, value in line["metrics"].items()]
        store.client.log_batch(run.info.run_id, metrics=metrics)
    known = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({**known, "run_id": run.info.run_id}))
    return str(run.info.run_id)


def test_a_run_of_the_time_of_two_journals_is_given_to_the_store_once(
    store: Store, out: Path, old: str
) -> None:
    assert (sync_status(out).left, sync_status(out).closed) == (4, False)

    found = sync_run(out, store.uri)

    assert (found.run_id, found.left, store.status(old)) == (old, 0, "KILLED")
    assert store.runs() == [old]
    assert store.history(old, "train/loss/total") == [(step, step / 100) for step in range(10, 50, 10)]
    assert store.history(old, "val/assignment/iou/caf_") == [(40, 0.5)]
    kept = [item.path for item in store.client.list_artifacts(old, "panels")]
    assert kept == ["panels/step_20.png", "panels/step_40.png"]
    assert sync_run(out, store.uri).delivered == 0


def test_a_run_of_the_time_of_two_journals_goes_on(store: Store, out: Path, old: str) -> None:
    again = MlflowTracker(TrackingSpec(uri=store.uri, experiment="tests", system_metrics=False))
    again.start(Config(), out=out, resume_step=20)
    for step in range(30, 70, 10):
        again.log_metrics({"train/loss/total": step / 100, "val/assignment/iou/café": float("nan")}, step)
    again.finish()

    assert (again.run_id, sync_status(out).left, store.status(old)) == (old, 0, "FINISHED")
    assert store.history(old, "train/loss/total") == [(step, step / 100) for step in range(10, 70, 10)]
    assert [step for step, _ in read_metrics(out)] == [10, 20, 30, 40, 50, 60]


def test_a_run_of_the_time_of_two_journals_that_the_store_never_saw_is_made(
    store: Store, out: Path, old: str
) -> None:
    store.client.delete_run(old)
    (out / "run.json").unlink()

    found = sync_run(out, store.uri)

    assert store.runs() == [found.run_id]
    steps = range(10, 50, 10)
    assert store.history(found.run_id, "train/loss/total") == [(step, step / 100) for step in steps]
    odd = store.client.get_run(found.run_id).data.tags["cosa.non_finite.val/assignment/iou/caf_"]
    assert odd == "nan at step 20"


def test_a_run_that_was_deleted_begins_anew_with_all_it_had(store: Store, out: Path) -> None:
    first = begin(store, out)
    first.log_metrics({"loss": 1.0}, 1)
    first.finish()
    assert first.run_id is not None
    store.client.delete_run(first.run_id)

    second = begin(store, out)
    second.log_metrics({"loss": 2.0}, 2)
    second.finish()

    assert second.run_id is not None
    assert second.run_id != first.run_id
    assert store.history(second.run_id, "loss") == [(1, 1.0), (2, 2.0)]


def test_a_run_that_is_deleted_while_it_trains_keeps_the_rest_in_its_journal(store: Store, out: Path) -> None:
    tracker = begin(store, out)
    tracker.settle()
    assert tracker.run_id is not None
    store.client.delete_run(tracker.run_id)
    tracker.log_metrics({"loss": 1.0}, 1)
    tracker.finish()
    with pytest.raises(RunGoneError, match="restore it with `mlflow runs restore`"):
        sync_run(out)

    store.client.restore_run(tracker.run_id)
    sync_run(out)

    assert store.history(tracker.run_id, "loss") == [(1, 1.0)]


def test_an_entry_that_the_store_refuses_takes_no_other_with_it(store: Store, out: Path) -> None:
    store.go()
    tracker = begin(store, out)
    tracker.log_metrics({"loss": 1.0}, 1)
    tracker.log_metrics({"x" * 300: 1.0}, 2)  # MLflow takes names of 250 characters
    tracker.log_metrics({"loss": 3.0}, 3)
    tracker.finish()
    store.come_back()

    found = sync_run(out)

    assert store.history(found.run_id, "loss") == [(1, 1.0), (3, 3.0)]
    assert "refused and left out" in found.notes[0]
    assert found.left == 0


def test_a_file_that_is_gone_stops_nothing(store: Store, out: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = begin(store, out)

    tracker.log_artifact(out / "missing.png")
    tracker.log_metrics({"loss": 1.0}, 1)
    tracker.finish()

    assert tracker.run_id is not None
    assert "missing.png" in caplog.text
    assert store.history(tracker.run_id, "loss") == [(1, 1.0)]


def test_a_file_that_cannot_be_kept_waits_and_holds_nothing_up(
    store: Store, out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = begin(store, out)
    tracker.settle()
    run_id = tracker.run_id
    assert run_id is not None
    artifacts = Path(store.client.get_run(run_id).info.artifact_uri.removeprefix("file://"))
    shutil.rmtree(artifacts)
    artifacts.touch()
    (out / "panel.png").write_bytes(b"picture")

    tracker.log_artifact(out / "panel.png", "panels")
    tracker.log_metrics({"loss": 1.0}, 1)
    tracker.finish()

    assert store.history(run_id, "loss") == [(1, 1.0)]
    assert "a file waits to be kept, 'panel.png'" in caplog.text
    assert "1 entries are not delivered yet" in caplog.text
    artifacts.unlink()
    assert (sync_run(out).delivered, sync_status(out).left) == (1, 0)
    assert [item.path for item in store.client.list_artifacts(run_id, "panels")] == ["panels/panel.png"]


def test_a_text_that_changes_is_kept_as_it_was_last(store: Store, out: Path, tmp_path: Path) -> None:
    store.go()
    tracker = begin(store, out)
    tracker.log_text("first", "notes/plan.txt")
    tracker.log_text("second", "notes/plan.txt")
    tracker.finish()
    store.come_back()

    run_id = sync_run(out).run_id

    path = store.client.download_artifacts(run_id, "notes/plan.txt", str(tmp_path))
    assert Path(path).read_text() == "second"


def test_a_run_that_goes_on_is_not_delivered_by_another(store: Store, out: Path) -> None:
    tracker = begin(store, out)
    tracker.settle()

    with pytest.raises(StillRunningError, match="must have ended"):
        sync_run(out, wait=0.0)

    tracker.finish()


def test_a_run_is_not_delivered_to_a_store_that_does_not_have_it(
    store: Store, fresh: Path, out: Path
) -> None:
    tracker = begin(store, out)
    tracker.settle()
    tracker.log_metrics({"loss": 1.0}, 1)
    die(tracker)

    with pytest.raises(RunGoneError, match="must be that of the run"):
        sync_run(out, f"sqlite:///{fresh}/mlflow.db")


def test_a_store_may_move_with_its_runs(store: Store, out: Path, tmp_path: Path) -> None:
    tracker = begin(store, out)
    tracker.settle()
    store.go()
    tracker.log_metrics({"loss": 1.0}, 1)
    tracker.finish()
    store.come_back()
    shutil.copytree(store.folder, tmp_path / "moved")

    found = sync_run(out, f"sqlite:///{tmp_path}/moved/mlflow.db")

    assert found.left == 0
    assert Store(tmp_path / "moved").history(found.run_id, "loss") == [(1, 1.0)]


def test_a_password_is_asked_for_and_never_kept(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = "http://me:secret@127.0.0.1:9"
    tracker = MlflowTracker(TrackingSpec(uri=uri, experiment="tests"))
    tracker.start(Config(), out=out)
    tracker.finish()
    kept = "".join(path.read_text() for path in out.rglob("*") if path.is_file())
    assert "secret" not in kept

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ValueError, match="has a password, which is not kept"):
        sync_run(out)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(TrackingError, match=r"http://\*\*\*@127.0.0.1:9"):
        sync_run(out)


def test_journals_are_found_in_any_folder_above(store: Store, tmp_path: Path) -> None:
    for name in ("a", "trials/b"):
        die(begin(store, tmp_path / "sweep" / name))

    assert find_tracked(tmp_path) == [tmp_path / "sweep" / "a", tmp_path / "sweep" / "trials" / "b"]
    assert find_tracked(tmp_path / "sweep" / "a") == [tmp_path / "sweep" / "a"]


@pytest.fixture
def left(store: Store, tmp_path: Path) -> Path:
    """A sweep's folder with two runs that the store has seen nothing of."""
    store.go()
    for name in ("one", "two"):
        tracker = begin(store, tmp_path / "sweep" / name)
        tracker.log_metrics({"loss": 1.0}, 1)
        tracker.finish()
    return tmp_path / "sweep"


def test_the_command_delivers_what_runs_left(
    store: Store, left: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store.come_back()

    assert cli.track(["flush", str(left)]) == 0

    lines = capsys.readouterr().out.splitlines()
    ids = [read_run_id(left / name) for name in ("one", "two")]
    assert lines == [
        f"one: 4 entries delivered to run {ids[0]}",
        f"two: 4 entries delivered to run {ids[1]}",
    ]
    assert sorted(store.runs()) == sorted(ids)
    assert cli.track(["flush", str(left)]) == 0
    assert capsys.readouterr().out.splitlines() == ["one: all is there", "two: all is there"]


def test_the_command_ends_with_one_line_where_the_store_does_not_answer(
    left: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.track(["flush", str(left)]) == cli.FAILED

    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("cosa-track: error: tracking store must answer, got none from sqlite:")
    assert last == "cosa-track: 8 entries are left; the same command delivers them later"


def test_the_command_shows_what_is_left(left: Path, store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.track(["status", str(left)]) == 0

    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"one: 4 of 4 entries left, run not made yet in {store.uri}"


def test_a_folder_without_a_tracked_run_is_told_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.track(["flush", str(tmp_path)]) == cli.MISTAKE
    assert "DIR must hold a run that was tracked" in capsys.readouterr().err
