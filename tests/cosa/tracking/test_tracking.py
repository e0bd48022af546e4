"""Tracking in a real MLflow store (SQLite in a temporary folder): what is kept, and where."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from cosa.config import Config, identity, override
from cosa.storage.files import mask
from cosa.storage.run_folder import TRAINING_TAG, VALIDATION_TAG, read_metrics
from cosa.tracking import (
    MlflowTracker,
    Tracker,
    TrackingError,
    TrackingSpec,
    initialise_store,
    provenance,
    resolve_uri,
    sqlite_uri,
    ui_hint,
    ui_steps,
)
from cosa.tracking.provenance import environment_tags, source_tags


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store that all tests of this file write to: its first migration takes seconds."""
    found = f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"
    initialise_store(found, "tests")
    return found


@pytest.fixture
def client(uri: str) -> MlflowClient:
    return MlflowClient(uri)


def _tracker(uri: str, **more: Any) -> MlflowTracker:
    return MlflowTracker(TrackingSpec(**{"uri": uri, "experiment": "tests", "system_metrics": False} | more))


def _tracked(tracker: MlflowTracker, out: Path, config: Config | None = None, **start: Any) -> str:
    """Start a run and return its id."""
    tracker.start(config or Config(), out=out, **start)
    tracker.settle()
    assert tracker.run_id is not None
    return tracker.run_id


def _run(client: MlflowClient, run_id: str) -> Run:
    return client.get_run(run_id)


def _history(client: MlflowClient, run_id: str, name: str) -> list[tuple[int, float]]:
    return sorted((point.step, point.value) for point in client.get_metric_history(run_id, name))


def test_a_run_keeps_its_settings_under_their_dotted_names(
    uri: str, client: MlflowClient, tmp_path: Path
) -> None:
    config = override(Config(), {"csc.weight": 0.2, "cam.scales": (1.0, 0.5)})

    params = _run(client, _tracked(_tracker(uri), tmp_path, config)).data.params

    assert params["csc.weight"] == "0.2"
    assert params["cam.scales"] == "1.0,0.5"


def test_a_run_keeps_its_config_as_an_artifact(uri: str, client: MlflowClient, tmp_path: Path) -> None:
    run_id = _tracked(_tracker(uri), tmp_path)

    path = client.download_artifacts(run_id, "config.json")

    assert json.loads(Path(path).read_text())["csc.weight"] == 0.1


def test_a_run_says_what_it_was_made_with(uri: str, client: MlflowClient, tmp_path: Path) -> None:
    tracker = _tracker(uri, tags={"arm": "full"})

    tags = _run(client, _tracked(tracker, tmp_path, tags={TRAINING_TAG: "abc"})).data.tags

    assert tags[TRAINING_TAG] == "abc"
    assert tags["arm"] == "full"
    assert tags["cosa.identity"] == identity(Config())
    assert {"cosa.version.torch", "cosa.version.python", "cosa.host.cpus", "cosa.host.gpus"} <= set(tags)


def test_a_run_names_the_data_it_reads_as_mlflows_datasets(
    uri: str, client: MlflowClient, tmp_path: Path
) -> None:
    config = override(Config(), {"data.root": "/data/pictures"})

    run_id = _tracked(_tracker(uri), tmp_path, config, tags={TRAINING_TAG: "abc", VALIDATION_TAG: "def"})

    found = {
        found.dataset.name: (
            found.dataset.digest,
            found.dataset.source,
            found.tags[0].key,
            found.tags[0].value,
        )
        for found in _run(client, run_id).inputs.dataset_inputs
    }
    source, context = '{"uri": "/data/pictures"}', "mlflow.data.context"
    assert found == {
        "pictures train_aug": ("abc", source, context, "training"),
        "pictures val": ("def", source, context, "validation"),
    }


def test_a_run_without_validation_names_none(uri: str, client: MlflowClient, tmp_path: Path) -> None:
    run_id = _tracked(_tracker(uri), tmp_path, tags={TRAINING_TAG: "abc", VALIDATION_TAG: ""})

    assert [one.dataset.digest for one in _run(client, run_id).inputs.dataset_inputs] == ["abc"]


@pytest.mark.parametrize("wanted", [True, False])
def test_metrics_come_with_those_of_the_machine_unless_they_are_left_out(
    uri: str, client: MlflowClient, tmp_path: Path, wanted: bool
) -> None:
    tracker = _tracker(uri, system_metrics=wanted)
    run_id = _tracked(tracker, tmp_path)

    tracker.log_metrics({"loss": 1.0}, 7)
    tracker.settle()

    metrics = _run(client, run_id).data.metrics
    assert metrics["loss"] == 1.0
    assert TrackingSpec().system_metrics
    if wanted:
        assert 0 <= metrics["system/cpu_utilization_percentage"] <= 100
        assert [step for step, _ in _history(client, run_id, "system/system_memory_usage_percentage")] == [7]
    assert any(name.startswith("system/") for name in metrics) == wanted


def test_what_a_run_took_is_a_metric_and_no_step_of_its_journal(
    uri: str, client: MlflowClient, tmp_path: Path
) -> None:
    tracker = _tracker(uri)
    run_id = _tracked(tracker, tmp_path)

    tracker.log_metrics({"loss": 1.0}, 7)
    tracker.log_costs({"cost/seconds": 2.5})
    tracker.settle()

    assert _history(client, run_id, "cost/seconds") == [(7, 2.5)]
    assert list(read_metrics(tmp_path)) == [(7, {"loss": 1.0})]


def test_a_new_experiment_opens_as_training_of_models(uri: str, client: MlflowClient) -> None:
    experiment = client.get_experiment(initialise_store(uri, "new"))

    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"


def test_a_run_is_nested_under_its_parent(uri: str, client: MlflowClient, tmp_path: Path) -> None:
    parent = _tracked(_tracker(uri), tmp_path / "parent")

    child = _tracked(_tracker(uri, parent_run_id=parent), tmp_path / "child")

    assert _run(client, child).data.tags["mlflow.parentRunId"] == parent


def test_a_run_is_called_like_its_folder(uri: str, client: MlflowClient, tmp_path: Path) -> None:
    run_id = _tracked(_tracker(uri), tmp_path / "shapes-1234")

    assert _run(client, run_id).info.run_name == "shapes-1234"


def test_metrics_keep_their_steps(uri: str, client: MlflowClient, tmp_path: Path) -> None:
    tracker = _tracker(uri)
    run_id = _tracked(tracker, tmp_path)

    for step in (10, 20):
        tracker.log_metrics({"train/loss/c2s": step / 10, "val/assignment/seg_miou": 0.5}, step)
    tracker.settle()

    assert _history(client, run_id, "train/loss/c2s") == [(10, 1.0), (20, 2.0)]


def test_more_metrics_than_one_request_takes_all_arrive(
    uri: str, client: MlflowClient, tmp_path: Path
) -> None:
    tracker = _tracker(uri)
    run_id = _tracked(tracker, tmp_path)

    tracker.log_metrics({f"metric {i}": float(i) for i in range(1500)}, 1)
    tracker.settle()

    found = _run(client, run_id).data.metrics
    assert len([name for name in found if name.startswith("metric ")]) == 1500


def test_a_class_name_that_mlflow_refuses_is_made_fit(uri: str, client: MlflowClient, tmp_path: Path) -> None:
    tracker = _tracker(uri)
    run_id = _tracked(tracker, tmp_path)

    tracker.log_metrics({"iou/café (old)": 0.5}, 1)
    tracker.settle()

    assert _run(client, run_id).data.metrics == {"iou/caf_ _old_": 0.5}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_becomes_a_tag_and_no_metric(
    uri: str, client: MlflowClient, tmp_path: Path, value: float
) -> None:
    tracker = _tracker(uri)
    run_id = _tracked(tracker, tmp_path)

    tracker.log_metrics({"odd": value, "even": 1.0}, 3)
    tracker.log_metrics({"odd": value, "even": 1.0}, 4)
    tracker.settle()

    data = _run(client, run_id).data
    assert data.metrics == {"even": 1.0}
    assert data.tags["cosa.non_finite.odd"] == f"{value} at step 3"


def test_files_and_texts_are_kept_in_their_folders(uri: str, client: MlflowClient, tmp_path: Path) -> None:
    tracker = _tracker(uri)
    run_id = _tracked(tracker, tmp_path / "run")
    (tmp_path / "panel.png").write_bytes(b"picture")

    tracker.log_artifact(tmp_path / "panel.png", "panels")
    tracker.log_text("words", "notes/first.txt")
    tracker.settle()

    assert [item.path for item in client.list_artifacts(run_id, "panels")] == ["panels/panel.png"]
    assert [item.path for item in client.list_artifacts(run_id, "notes")] == ["notes/first.txt"]


def test_artifacts_lie_beside_a_sqlite_store_wherever_one_stands(
    uri: str, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    run_id = _tracked(_tracker(uri), tmp_path)

    store = Path(uri.removeprefix("sqlite:///")).parent
    assert _run(client, run_id).info.artifact_uri.startswith((store / "mlartifacts").as_uri())


@pytest.mark.parametrize("status", ["FINISHED", "FAILED", "KILLED"])
def test_a_run_ends_with_its_status(uri: str, client: MlflowClient, tmp_path: Path, status: Any) -> None:
    tracker = _tracker(uri)
    run_id = _tracked(tracker, tmp_path)

    tracker.finish(status)

    assert _run(client, run_id).info.status == status


def test_a_resumed_run_goes_on_in_its_own_run(uri: str, client: MlflowClient, tmp_path: Path) -> None:
    first = _tracker(uri)
    run_id = _tracked(first, tmp_path)
    first.finish("FAILED")

    again = _tracked(_tracker(uri), tmp_path, resume_step=10)

    assert again == run_id
    assert _run(client, run_id).info.status == "RUNNING"


def test_a_resumed_run_writes_no_step_twice(uri: str, client: MlflowClient, tmp_path: Path) -> None:
    first = _tracker(uri)
    run_id = _tracked(first, tmp_path)
    first.log_metrics({"loss": 1.0}, 10)
    first.log_metrics({"loss": 2.0}, 20)
    first.finish("FAILED")

    second = _tracker(uri)
    _tracked(second, tmp_path, resume_step=10)
    second.log_metrics({"loss": 2.0, "new": 5.0}, 20)
    second.log_metrics({"loss": 3.0}, 30)
    second.settle()

    assert _history(client, run_id, "loss") == [(10, 1.0), (20, 2.0), (30, 3.0)]
    assert _history(client, run_id, "new") == [(20, 5.0)]


def test_a_resumed_run_keeps_the_params_it_began_with(uri: str, client: MlflowClient, tmp_path: Path) -> None:
    first = _tracker(uri)
    run_id = _tracked(first, tmp_path)
    first.finish()
    elsewhere = override(Config(), {"data.root": "another"})

    _tracked(_tracker(uri), tmp_path, elsewhere)

    assert _run(client, run_id).data.params["data.root"] == Config().data.root


def test_a_run_is_closed_from_outside_when_its_process_is_gone(
    uri: str, client: MlflowClient, tmp_path: Path
) -> None:
    tracker = _tracker(uri)
    run_id = _tracked(tracker, tmp_path)
    tracker._syncer.stop()

    TrackingSpec(uri=uri).close(tmp_path, "KILLED")

    assert _run(client, run_id).info.status == "KILLED"


def test_a_value_longer_than_mlflow_takes_is_cut(uri: str, client: MlflowClient, tmp_path: Path) -> None:
    config = override(Config(), {"evaluation.coexistence": ("bird" * 2000,)})

    params = _run(client, _tracked(_tracker(uri), tmp_path, config)).data.params

    assert params["evaluation.coexistence"] == "bird" * 1500


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port that nobody listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


@pytest.mark.parametrize("scheme", ["http", "postgresql"])
def test_an_unreachable_store_is_one_line_that_names_it_and_no_password(
    scheme: str, closed_port: int
) -> None:
    uri = f"{scheme}://me:secret@127.0.0.1:{closed_port}"

    with pytest.raises(TrackingError, match="must answer") as caught:
        initialise_store(uri, "tests")

    message = str(caught.value)
    assert f"{scheme}://***@127.0.0.1:{closed_port}" in message
    assert "\n" not in message
    assert "secret" not in message


def test_a_store_in_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(TrackingError, match="check the file and its folder"):
        initialise_store(f"sqlite:///{tmp_path}/file/mlflow.db", "tests")


def test_an_experiment_that_was_deleted_is_refused(uri: str, client: MlflowClient) -> None:
    client.delete_experiment(initialise_store(uri, "gone"))

    with pytest.raises(TrackingError, match="must not be deleted, got 'gone'"):
        initialise_store(uri, "gone")


def test_initialising_a_store_again_changes_nothing(uri: str) -> None:
    assert initialise_store(uri, "tests") == initialise_store(uri, "tests")


@pytest.mark.parametrize("uri", ["runs/mlflow.db", "file:///tmp/mlruns", "ftp://host", ""])
def test_a_uri_of_no_known_store_is_refused(uri: str) -> None:
    with pytest.raises(ValueError, match="tracking URI must start with"):
        resolve_uri(uri)


def test_a_relative_sqlite_file_is_taken_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    assert resolve_uri("sqlite:///runs/mlflow.db") == f"sqlite:///{tmp_path}/runs/mlflow.db"


@pytest.mark.parametrize("folder", ["a?b", "a%25b", "a%3Fb"])
def test_a_path_that_no_uri_can_hold_is_refused(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / folder
    place.mkdir()
    law = "must hold no \\? and no % before two hexadecimal digits"
    with pytest.raises(ValueError, match=law):
        sqlite_uri(place / "mlflow.db")
    monkeypatch.chdir(place)
    with pytest.raises(ValueError, match=law):
        resolve_uri("sqlite:///mlflow.db")


@pytest.mark.parametrize("folder", ["100%", "50% off", "#1", "ä & ö; [x]"])
def test_a_path_with_other_signs_makes_a_store_where_it_says(folder: str, tmp_path: Path) -> None:
    initialise_store(sqlite_uri(tmp_path / folder / "mlflow.db"), "tests")

    assert (tmp_path / folder / "mlflow.db").is_file()


@pytest.mark.parametrize(
    "uri",
    [
        "sqlite:////full/path.db",
        "sqlite:////full/path.db?timeout=20",
        "http://host:5000",
        "postgresql+psycopg://h/db",
    ],
)
def test_other_uris_stay_as_they_are(uri: str) -> None:
    assert resolve_uri(uri) == uri


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://me:secret@host:5000/x", "http://***@host:5000/x"),
        ("see https://token@host and http://a:b@c", "see https://***@host and http://***@c"),
        ("postgresql://me:p@ss@host/db", "postgresql://***@host/db"),
        ("http://host/?password=secret&x=1", "http://host/?password=***&x=1"),
        ("sqlite:////full/path@home.db", "sqlite:////full/path@home.db"),
        ("http://host:5000", "http://host:5000"),
    ],
)
def test_passwords_are_masked_and_nothing_else(text: str, shown: str) -> None:
    assert mask(text) == shown


def test_no_tag_and_no_file_holds_a_password(uri: str, client: MlflowClient, tmp_path: Path) -> None:
    tracker = MlflowTracker(
        TrackingSpec(uri=uri, experiment="tests", tags={"origin": "http://me:secret@host"})
    )

    run_id = _tracked(tracker, tmp_path)

    assert "secret" not in str(_run(client, run_id).data.tags)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """As much of an MLflow server as one run asks for, at an address with a password."""
    info = {"run_id": "abc", "experiment_id": "1", "artifact_uri": tmp_path.as_uri(), "status": "RUNNING"}
    answers = {
        "experiments/search": {"experiments": []},
        "experiments/get-by-name": {"experiment": {"experiment_id": "1", "lifecycle_stage": "active"}},
        "runs/search": {"runs": []},
        "runs/create": {"run": {"info": info, "data": {}}},
        "runs/get": {"run": {"info": info, "data": {}}},
        "runs/update": {"run_info": info},
    }

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"] or 0))
            name = self.path.partition("?")[0].partition("/mlflow/")[2]
            body = json.dumps(answers.get(name, {})).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET  # noqa: N815 (the name that the base calls)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (its name in the base)
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield f"http://me:secret@127.0.0.1:{found.server_port}"
        found.shutdown()


def test_a_whole_run_on_a_server_shows_nobody_its_password(
    server: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    tracker = _tracker(server)

    assert _tracked(tracker, tmp_path / "run") == "abc"
    tracker.log_metrics({"loss": 1.0}, 1)
    tracker.finish()

    shown = capfd.readouterr()
    kept = "".join(path.read_text() for path in tmp_path.rglob("*.json*"))
    assert "config.json" in [path.name for path in tmp_path.iterdir()]
    assert "secret" not in shown.out + shown.err + caplog.text + kept


def test_the_hint_names_the_command_for_a_file_and_the_address_of_a_server() -> None:
    assert ui_hint("sqlite:////runs/mlflow.db") == "mlflow ui --backend-store-uri sqlite:////runs/mlflow.db"
    page = "#/experiments?workflowType=machine_learning"
    assert ui_hint("http://me:secret@host:5000") == f"http://***@host:5000/{page}"
    assert ui_steps("sqlite:////runs/mlflow.db").endswith(f"mlflow.db, then http://127.0.0.1:5000/{page}")


def test_a_spec_without_a_uri_keeps_a_journal_and_nothing_else() -> None:
    assert type(TrackingSpec().tracker()) is Tracker


def test_a_tracker_that_never_started_ends_quietly() -> None:
    _tracker("http://host").finish("FAILED")


def test_the_environment_names_no_host_no_user_and_no_folder() -> None:
    import getpass
    import platform

    values = " ".join(environment_tags().values())

    assert str(Path.home()) not in values
    assert platform.node() not in values
    assert f" {getpass.getuser()} " not in f" {values} "


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of one commit that cosa seems to run from."""
    source = tmp_path / "cosa" / "provenance.py"
    source.parent.mkdir()
    source.write_text("first = 1\n")
    monkeypatch.setattr(provenance, "__file__", str(source))
    identity = ["-c", "user.name=me", "-c", "user.email=me@example.org"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "first"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    return source


def test_the_commit_is_known_and_clean(checkout: Path) -> None:
    head = subprocess.run(
        ["git", "-C", str(checkout.parent), "rev-parse", "HEAD"], check=True, capture_output=True, text=True
    )

    assert source_tags() == {"mlflow.source.git.commit": head.stdout.strip(), "cosa.dirty": "false"}


def test_a_changed_file_makes_the_commit_dirty(checkout: Path) -> None:
    checkout.write_text("second = 2\n")

    assert source_tags()["cosa.dirty"] == "true"


def test_a_file_that_git_does_not_know_has_no_commit(checkout: Path) -> None:
    checkout.with_name("untracked.py").write_text("")
    provenance.__file__ = str(checkout.with_name("untracked.py"))

    assert source_tags() == {}


def _initialise(uri: str, before: str = "") -> subprocess.Popen[bytes]:
    program = f"from cosa.tracking import initialise_store\n{before}\ninitialise_store({uri!r}, 'cosa')"
    return subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL)


def test_a_store_whose_making_was_killed_is_made_anew(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    killed = "import os, alembic.command as c; c.upgrade = lambda *a, **k: os._exit(9)"

    assert _initialise(uri, killed).wait(120) == 9
    assert not (tmp_path / "mlflow.db").exists()
    assert initialise_store(uri, "cosa")
    assert not list(tmp_path.glob("*.part*"))


def test_several_that_start_where_there_is_no_store_yet_share_the_one_that_is_made(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"

    started = [_initialise(uri) for _ in range(3)]

    assert [process.wait(200) for process in started] == [0, 0, 0]


def test_a_tracker_that_is_never_started_keeps_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tracker = Tracker()

    tracker.log_metrics({"loss": 1.0}, 1)
    tracker.log_artifact(tmp_path / "none.png")
    tracker.log_text("words", "notes.txt")
    tracker.finish()

    assert tracker.run_id is None
    assert list(tmp_path.iterdir()) == []
