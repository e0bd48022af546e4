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
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from cosa import cli
from cosa.config import Config
from cosa.tracking import (
    InUseError,
    MlflowTracker,
    RunGoneError,
    TrackingError,
    find_journals,
    flush,
    initialise_store,
    read_run_id,
    standing,
)
from cosa.tracking.journal import Journal, read_account, read_entries, write_account
from cosa.tracking.sync import KEY_TAG
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
    tracker = MlflowTracker(store.uri, "tests")
    tracker.start(Config(), out=out)
    return tracker


def die(tracker: MlflowTracker) -> None:
    """Leave a tracker as a killed process leaves it: no last word, and the lock is free."""
    assert tracker._courier is not None
    tracker._courier.end()


def deliver_again(out: Path) -> None:
    """Forget how much was delivered, as a process does that dies between giving and noting."""
    account = read_account(out)
    account.position = 0
    write_account(out, account)
    Journal(out).add("finish", status="FINISHED")
    flush(out)


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
    assert standing(out).left == standing(out).entries == 4  # open, config.json, a metric, the end


def test_what_a_run_left_is_delivered_later(store: Store, out: Path) -> None:
    store.go()
    tracker = begin(store, out)
    for step in range(5):
        tracker.log_metrics({"loss": step / 2}, step)
    (out / "panel.png").write_bytes(b"picture")
    tracker.log_artifact(out / "panel.png", "panels")
    tracker.finish("FAILED")
    store.come_back()

    found = flush(out)

    assert (found.left, found.delivered) == (0, 9)
    assert store.runs() == [found.run_id] == [read_run_id(out)]
    assert store.history(found.run_id, "loss") == [(step, step / 2) for step in range(5)]
    assert store.status(found.run_id) == "FAILED"
    kept = {item.path for item in store.client.list_artifacts(found.run_id)}
    assert kept == {"config.json", "panels"}


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
    assert standing(out).left == 0


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

    run_id = flush(out).run_id

    told = {entry.kind: entry.content["time"] for entry in read_entries(out)}
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

    found = flush(out)

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
from cosa.tracking import MlflowTracker
tracker = MlflowTracker({store.uri!r}, "tests")
tracker.start(Config(), out=Path({str(out)!r}))
for step in range(50):
    tracker.log_metrics({{"loss": step / 2}}, step)
os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL

    found = flush(out)

    assert store.history(found.run_id, "loss") == [(step, step / 2) for step in range(50)]
    assert (store.runs(), store.status(found.run_id)) == ([found.run_id], "KILLED")


def test_a_resumed_run_delivers_once_what_it_trains_again(store: Store, out: Path) -> None:
    store.go()
    tracker = begin(store, out)
    for step in (1, 2, 3):
        tracker.log_metrics({"loss": step / 2}, step)
    die(tracker)
    store.come_back()

    again = MlflowTracker(store.uri, "tests")
    again.start(Config(), out=out, resume_step=1)
    for step in (2, 3, 4):
        again.log_metrics({"loss": step / 2}, step)
    again.finish()

    assert store.runs() == [again.run_id]
    assert again.run_id is not None
    assert store.history(again.run_id, "loss") == [(1, 0.5), (2, 1.0), (3, 1.5), (4, 2.0)]
    assert store.client.get_run(again.run_id).data.tags["cosa.resumed_at"] == "1"


def test_a_line_that_a_killed_process_left_torn_is_passed_over(store: Store, out: Path) -> None:
    tracker = begin(store, out)
    tracker.settle()
    die(tracker)
    with (out / "tracking" / "journal.jsonl").open("a") as file:
        file.write('{"kind": "metrics", "st')

    again = begin(store, out)
    again.log_metrics({"loss": 1.0}, 1)
    again.finish()

    assert again.run_id is not None
    assert store.history(again.run_id, "loss") == [(1, 1.0)]


def test_a_run_older_than_its_journal_gets_no_step_twice(store: Store, out: Path) -> None:
    experiment = store.client.get_experiment_by_name("tests")
    run_id = store.client.create_run(experiment.experiment_id).info.run_id
    for step in (10, 20):
        store.client.log_metric(run_id, "loss", 1.0, step=step)
    out.mkdir()
    (out / "run.json").write_text(json.dumps({"run_id": run_id, "tracking_uri": store.uri}))

    tracker = begin(store, out)
    for step in (20, 30):
        tracker.log_metrics({"loss": 2.0}, step)
    tracker.finish()

    assert store.runs() == [run_id]
    assert store.history(run_id, "loss") == [(10, 1.0), (20, 1.0), (30, 2.0)]


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
        flush(out)

    store.client.restore_run(tracker.run_id)
    flush(out)

    assert store.history(tracker.run_id, "loss") == [(1, 1.0)]


def test_an_entry_that_the_store_refuses_takes_no_other_with_it(store: Store, out: Path) -> None:
    store.go()
    tracker = begin(store, out)
    tracker.log_metrics({"loss": 1.0}, 1)
    tracker.log_metrics({"x" * 300: 1.0}, 2)  # MLflow takes names of 250 characters
    tracker.log_metrics({"loss": 3.0}, 3)
    tracker.finish()
    store.come_back()

    found = flush(out)

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
    assert (flush(out).delivered, standing(out).left) == (1, 0)
    assert [item.path for item in store.client.list_artifacts(run_id, "panels")] == ["panels/panel.png"]


def test_a_text_that_changes_is_kept_as_it_was_last(store: Store, out: Path, tmp_path: Path) -> None:
    store.go()
    tracker = begin(store, out)
    tracker.log_text("first", "notes/plan.txt")
    tracker.log_text("second", "notes/plan.txt")
    tracker.finish()
    store.come_back()

    run_id = flush(out).run_id

    path = store.client.download_artifacts(run_id, "notes/plan.txt", str(tmp_path))
    assert Path(path).read_text() == "second"


def test_a_run_that_goes_on_is_not_delivered_by_another(store: Store, out: Path) -> None:
    tracker = begin(store, out)
    tracker.settle()

    with pytest.raises(InUseError, match="must have ended"):
        flush(out, wait=0.0)

    tracker.finish()


def test_a_run_is_not_delivered_to_a_store_that_does_not_have_it(
    store: Store, fresh: Path, out: Path
) -> None:
    tracker = begin(store, out)
    tracker.settle()
    tracker.log_metrics({"loss": 1.0}, 1)
    die(tracker)

    with pytest.raises(RunGoneError, match="must be that of the run"):
        flush(out, f"sqlite:///{fresh}/mlflow.db")


def test_a_store_may_move_with_its_runs(store: Store, out: Path, tmp_path: Path) -> None:
    tracker = begin(store, out)
    tracker.settle()
    store.go()
    tracker.log_metrics({"loss": 1.0}, 1)
    tracker.finish()
    store.come_back()
    shutil.copytree(store.folder, tmp_path / "moved")

    found = flush(out, f"sqlite:///{tmp_path}/moved/mlflow.db")

    assert found.left == 0
    assert Store(tmp_path / "moved").history(found.run_id, "loss") == [(1, 1.0)]


def test_a_password_is_asked_for_and_never_kept(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = "http://me:secret@127.0.0.1:9"
    tracker = MlflowTracker(uri, "tests")
    tracker.start(Config(), out=out)
    tracker.finish()
    kept = "".join(path.read_text() for path in out.rglob("*") if path.is_file())
    assert "secret" not in kept

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ValueError, match="has a password, which is not kept"):
        flush(out)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(TrackingError, match=r"http://\*\*\*@127.0.0.1:9"):
        flush(out)


def test_journals_are_found_in_any_folder_above(store: Store, tmp_path: Path) -> None:
    for name in ("a", "trials/b"):
        die(begin(store, tmp_path / "sweep" / name))

    assert find_journals(tmp_path) == [tmp_path / "sweep" / "a", tmp_path / "sweep" / "trials" / "b"]
    assert find_journals(tmp_path / "sweep" / "a") == [tmp_path / "sweep" / "a"]


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
