"""One trial in its process: what the trainer is told, and what is left when it fails."""

from __future__ import annotations

import logging
import socket
import sys

import pytest

from cosa.config import Config, TrainConfig
from cosa.data.open import read_fingerprints
from cosa.evaluation import pseudo_labels
from cosa.storage.files import InUseError, lock
from cosa.tracking import TrackingSpec
from cosa.training import trainer
from sweeps.planning import folder as folders
from sweeps.planning.plan import make_plan
from sweeps.running import trial
from sweeps.tables import Arm, Table

BASE = Config(train=TrainConfig(iterations=10, warmup=4))
TABLE = Table(name="t", title="", reference="a", arms=(Arm("a"), Arm("b", {"csc.weight": 0.0})))
WARMUP, ARM, _ = make_plan(BASE, [TABLE], [0]).trials


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Trains one trial of the sweep in `tmp_path`, by `train` in place of the trainer."""

    def call(one, train):
        monkeypatch.setattr(trainer, "train", train)
        trial.run_trial(trial.make_spec(one, tmp_path, TrackingSpec(), {}), tmp_path, workers=1)

    return call


@pytest.fixture
def seen(run):
    """The run that a trial is."""

    def look(one):
        calls = []
        run(one, lambda spec, **_: calls.append(spec))
        return calls[0]

    return look


def test_a_warmup_stops_where_cotraining_would_start(seen):
    spec = seen(WARMUP)
    assert (spec.config, spec.stop_at, spec.fork_from) == (WARMUP.config, 4, None)


def test_an_arm_forks_from_its_warmups_last_checkpoint(tmp_path, seen):
    spec = seen(ARM)
    place = tmp_path / "trials" / WARMUP.name / "checkpoints" / "step_00000004.pt"
    assert (spec.config, spec.stop_at, spec.fork_from) == (ARM.config, None, place)
    assert spec.out == tmp_path / "trials" / ARM.name


def test_a_failure_leaves_its_reason_in_one_line_and_all_of_it_in_the_log(tmp_path, run):
    def train(spec, **rest):
        sys.stdout.write("a last word\n")
        raise ValueError("loss must stay finite, got nan\nand more")

    with pytest.raises(ValueError, match="must stay finite"):
        run(ARM, train)
    folder = tmp_path / "trials" / ARM.name
    assert folders.read_failure(folder) == "ValueError: loss must stay finite, got nan"
    log = (folder / "log.txt").read_text()
    assert "a last word" in log
    assert "Traceback" in log
    assert "and more" in log


def test_a_new_start_forgets_the_old_reason(tmp_path, run):
    def broken(spec, **rest):
        raise RuntimeError

    with pytest.raises(RuntimeError):
        run(ARM, broken)
    run(ARM, lambda *_, **__: None)
    assert folders.read_failure(tmp_path / "trials" / ARM.name) == ""


def test_warnings_of_the_trainer_reach_the_log_and_no_other_trials(tmp_path, run, monkeypatch):
    # the command line, run in this process by another test, keeps cosa's records to itself
    monkeypatch.setattr(logging.getLogger("cosa"), "propagate", True)
    run(ARM, lambda *_, **__: logging.getLogger("cosa.training.trainer").warning("skipped one"))
    logging.getLogger("cosa.training.trainer").warning("of somebody else")
    log = (tmp_path / "trials" / ARM.name / "log.txt").read_text()
    assert "skipped one" in log
    assert "of somebody else" not in log


def test_standard_output_is_given_back(run):
    before = sys.stdout
    run(ARM, lambda *_, **__: None)
    assert sys.stdout is before


def test_a_folder_that_is_being_trained_in_is_left_alone(tmp_path, run, monkeypatch):
    monkeypatch.setattr(trial, "LOCK_SECONDS", 0.0)
    with lock(tmp_path / "trials" / ARM.name / ".lock"), pytest.raises(InUseError):
        run(ARM, lambda *_, **__: pytest.fail("trained beside another process"))


def test_a_trial_on_a_machine_with_other_data_than_the_sweeps_fails_naming_it(tmp_path, tiny_config):
    one = make_plan(tiny_config, [TABLE], [0]).trials[0]
    seen = read_fingerprints(tiny_config.data)
    spec = trial.make_spec(one, tmp_path, TrackingSpec(), {**seen, "cosa.data_fingerprint": "f00"})
    with pytest.raises(ValueError, match="must be the same on every machine"):
        trial.run_trial(spec, tmp_path, workers=1)
    reason = folders.read_failure(tmp_path / "trials" / one.name)
    assert f"on {socket.gethostname()}: 24 images to train on; copy them there again" in reason


# Pseudo-labels

NETWORK = {"network.architecture": "upernet", "network.encoder": "resnet18", "network.pretrained": False}
TAUGHT = Table(name="t", title="", reference="full", arms=(Arm("full"), Arm("upernet", NETWORK)))


@pytest.fixture
def begin(tmp_path, tiny_config):
    """Runs trials of the sweep in `tmp_path`, for real; a trained model and its pseudo-labels."""
    full, labels, _ = make_plan(tiny_config, [TAUGHT], [0]).trials
    seen = read_fingerprints(tiny_config.data)

    def run(one, **more):
        return trial.run_trial(
            trial.make_spec(one, tmp_path, TrackingSpec(), seen, **more), tmp_path, workers=1
        )

    run(full)
    return full, labels, run


def test_pseudo_labels_of_a_trial_s_network_are_a_trial_of_their_own(begin, tmp_path):
    _, labels, run = begin
    assert folders.read_result(tmp_path, labels) is None

    assert run(labels)

    result = folders.read_result(tmp_path, labels)
    folder = folders.trial_folder(tmp_path, labels.name)
    assert result["metrics"].keys() == {"pseudo_labels/miou"}
    assert len([*(folder / "labels").glob("*.png")]) == 24
    (folder / "labels" / "pseudo_labels.json").unlink()
    assert folders.read_result(tmp_path, labels) is None


def test_pseudo_labels_go_on_with_the_image_where_they_were_stopped(begin, tmp_path, monkeypatch):
    _, labels, run = begin
    written = []
    index_png = pseudo_labels.index_png
    monkeypatch.setattr(pseudo_labels, "index_png", lambda c: written.append(1) or index_png(c))
    stop = trial.StopFile(tmp_path / folders.STOP)
    monkeypatch.setattr("cosa.training.stop._LOOK_SECONDS", 0.0)
    stop.give()

    assert not run(labels)
    stop.path.unlink()
    assert run(labels)

    assert 0 < written.index(1) + 1 < len(written) == 24


def test_pseudo_labels_of_a_model_that_is_gone_fail_in_one_line(begin, tmp_path):
    full, labels, run = begin

    with pytest.raises(FileNotFoundError, match="model must be"):
        run(labels, reused={full.name: "0" * 32})

    reason = folders.read_failure(folders.trial_folder(tmp_path, labels.name))
    assert reason.startswith("FileNotFoundError: model must be a run's folder")
    assert folders.read_result(tmp_path, labels) is None
