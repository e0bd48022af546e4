"""The folders say what is finished, and the locks who may write."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from cosa.config import Config, TrainConfig, identity, warmup_identity
from sweeps.planning import folder as folders
from sweeps.planning.plan import make_plan
from sweeps.tables import Arm, Table
from tests.sweeps.running.stub_checkpoint import leave_checkpoint

BASE = Config(train=TrainConfig(iterations=10, warmup=4))
TABLE = Table(name="t", title="", reference="a", arms=(Arm("a"), Arm("b", {"csc.weight": 0.0})))
WARMUP, TRIAL, OTHER = make_plan(BASE, [TABLE], [0]).trials


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


HOLD = """
import sys, time
from pathlib import Path
from sweeps.planning.folder import locked
from tests.sweeps.running.stub_checkpoint import leave_checkpoint
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_folder_in_use_names_its_holder(tmp_path, holder):
    message = f"must not be in use, got '{tmp_path}', held by process {holder.pid}"
    with pytest.raises(folders.FolderInUseError, match=message), folders.locked(tmp_path):
        pass


def test_a_killed_holder_lets_go(tmp_path, holder):
    holder.kill()
    with folders.locked(tmp_path, wait=10):
        pass


def test_waiting_for_a_folder_ends(tmp_path, holder):
    with pytest.raises(folders.FolderInUseError), folders.locked(tmp_path, wait=0.3):
        pass


def test_a_folder_can_be_held_again_afterwards(tmp_path):
    for _ in range(2):
        with folders.locked(tmp_path / "new"):
            pass


def test_a_folder_that_cannot_be_made_is_told_in_one_line(tmp_path):
    (tmp_path / "file").touch()
    law = r"folder must be writable, got '.*file/sweep' \(Not a directory\)"
    with pytest.raises(OSError, match=law), folders.locked(tmp_path / "file" / "sweep"):
        pass
