"""The folders say what is finished and what remains."""

from __future__ import annotations

import dataclasses
import json

import pytest

from cosa.config import Config, TrainConfig, identity, warmup_identity
from sweeps.planning import folder as folders
from sweeps.planning.plan import make_plan
from sweeps.tables import Arm, Table
from tests.sweeps.running.stub_checkpoint import leave_checkpoint

BASE = Config(train=TrainConfig(iterations=10, warmup=4))
TABLE = Table(name="t", title="", reference="a", arms=(Arm("a"), Arm("b", {"csc.weight": 0.0})))
PLAN = make_plan(BASE, [TABLE], [0])
WARMUP, TRIAL, OTHER = PLAN.trials


def leave_result(root, trial, **changes):
    folder = folders.trial_folder(root, trial.name)
    folder.mkdir(parents=True, exist_ok=True)
    result = {
        "identity": identity(trial.config),
        "warmup_identity": warmup_identity(trial.config),
        "step": trial.last_step,
        **changes,
    }
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def test_a_trial_with_its_own_result_is_finished(tmp_path):
    leave_result(tmp_path, TRIAL)
    assert folders.read_result(tmp_path, TRIAL)["step"] == 10


def test_a_trial_without_a_result_is_not_finished(tmp_path):
    assert folders.read_result(tmp_path, TRIAL) is None


@pytest.mark.parametrize("change", [{"identity": identity(OTHER.config)}, {"step": 9}])
def test_a_result_of_another_experiment_or_step_does_not_count(tmp_path, change):
    leave_result(tmp_path, TRIAL, **change)
    assert folders.read_result(tmp_path, TRIAL) is None


def test_a_torn_result_does_not_count(tmp_path):
    folder = leave_result(tmp_path, TRIAL)
    (folder / "result.json").write_text('{"identity": "')
    assert folders.read_result(tmp_path, TRIAL) is None


def test_a_warmup_is_finished_only_while_its_checkpoint_is_whole_to_fork_from(tmp_path):
    folder = leave_result(tmp_path, WARMUP, identity="of another arm")
    assert folders.read_result(tmp_path, WARMUP) is None
    path = folders.checkpoint(folder, WARMUP.last_step)
    path.parent.mkdir()
    leave_checkpoint(path)
    assert folders.read_result(tmp_path, WARMUP) is not None
    path.write_bytes(b"torn")
    assert folders.read_result(tmp_path, WARMUP) is None


def test_the_step_is_that_of_the_journals_last_whole_line(tmp_path):
    journal = tmp_path / "journal.jsonl"
    journal.write_text('{"step": 20, "train/loss/total": 1.0}\n{"step": 40}\n{"step": 6')
    assert folders.read_step(tmp_path) == 40


def test_the_step_of_a_long_journal_is_found_at_its_end(tmp_path):
    lines = [json.dumps({"step": step, "x": "y" * 500}) for step in range(2_000)]
    (tmp_path / "journal.jsonl").write_text("\n".join(lines) + "\n")
    assert folders.read_step(tmp_path) == 1_999


def test_without_a_journal_no_step_is_done(tmp_path):
    assert folders.read_step(tmp_path) == 0


def test_the_state_names_what_is_finished_what_failed_and_what_remains(tmp_path):
    leave_result(tmp_path, TRIAL, metrics={"m": 0.5})
    failed = folders.trial_folder(tmp_path, OTHER.name)
    failed.mkdir(parents=True)
    (failed / "failure.txt").write_text("ValueError: no\n")

    state = folders.read_state(tmp_path, PLAN)

    assert state.results[TRIAL.name]["metrics"] == {"m": 0.5}
    assert (state.finished, state.failures) == ({TRIAL.name}, {OTHER.name: "ValueError: no"})
    assert state.remaining == [WARMUP, OTHER]


def test_a_state_grows_by_what_finishes_and_by_what_earlier_runs_stand_for(tmp_path):
    state = folders.read_state(tmp_path, PLAN)

    assert state.after({TRIAL.name: {"step": 10}}).remaining == [WARMUP, OTHER]
    assert dataclasses.replace(state, reused={TRIAL.name: "abc", OTHER.name: "def"}).remaining == []


# Pseudo-labels

NETWORK = {
    "network.architecture": "deeplabv3plus",
    "network.encoder": "resnet18",
    "network.pretrained": False,
    "network.aux_head": False,
}
MASKS = {**NETWORK, "segmentation.supervision": "masks"}
CHAIN = make_plan(
    BASE,
    [Table(name="t", title="", reference="a", arms=(Arm("a"), Arm("b", NETWORK), Arm("c", MASKS)))],
    [0],
)
FULL, LABELS, TAUGHT, SUPERVISED = CHAIN.trials


def leave_labels(root, fingerprint="f00"):
    labels = leave_result(root, LABELS) / "labels"
    labels.mkdir(exist_ok=True)
    (labels / "pseudo_labels.json").write_text(json.dumps({"fingerprint": fingerprint}))
    return labels


def test_a_network_s_experiment_is_known_once_its_pseudo_labels_are_written(tmp_path):
    assert folders.with_labels(tmp_path, TAUGHT) == TAUGHT

    labels = leave_labels(tmp_path)

    found = folders.with_labels(tmp_path, TAUGHT)
    assert (found.name, found.source) == (TAUGHT.name, LABELS.name)
    assert found.config.segmentation.labels == str(labels)
    assert found.config.segmentation.labels_fingerprint == "f00"
    assert found.identity != TAUGHT.identity


def test_what_learns_from_masks_or_from_nothing_is_left_as_it_is(tmp_path):
    leave_labels(tmp_path)

    assert [folders.with_labels(tmp_path, trial) for trial in (FULL, LABELS, SUPERVISED)] == [
        *(FULL, LABELS, SUPERVISED)
    ]
    assert SUPERVISED.after is None


def test_a_network_is_finished_for_the_pseudo_labels_that_there_are_alone(tmp_path):
    leave_labels(tmp_path)
    leave_result(tmp_path, folders.with_labels(tmp_path, TAUGHT))
    assert folders.read_result(tmp_path, TAUGHT)["step"] == 10

    leave_labels(tmp_path, fingerprint="changed")

    assert folders.read_result(tmp_path, TAUGHT) is None


def test_the_state_of_a_chain_has_what_was_written_in_its_plan(tmp_path):
    leave_result(tmp_path, FULL)
    leave_labels(tmp_path)

    state = folders.read_state(tmp_path, CHAIN)

    assert state.results.keys() == {FULL.name, LABELS.name}
    assert [trial.name for trial in state.remaining] == [TAUGHT.name, SUPERVISED.name]
    assert state.plan.named(TAUGHT.name) == folders.with_labels(tmp_path, TAUGHT)
