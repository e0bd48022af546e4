"""A sweep is told to stop, loses a trial's folder or the checkpoint its arms fork from, and ends the same."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest

from cosa.tracking import read_run_id
from tests.cosa.runs import read_journal
from tests.faults import account
from tests.faults.runs import (
    SWEEP_WARMUP,
    end,
    finish,
    last_step,
    newest_checkpoint,
    rows,
    run_tags,
    start,
    sweep_command,
    tracked_steps,
    wait_until,
)

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]


def trials(folder: Path, kind: str) -> list[Path]:
    """The folders of a sweep's warm-ups or trials."""
    return sorted((folder / "sweep" / "trials").glob(f"{kind}-*"))


@pytest.mark.parametrize("kind", ["warmup", "trial"])
def test_a_sweep_told_to_stop_has_its_trials_save_first(
    kind: str, data: Path, undisturbed_sweep: Path, tmp_path: Path
) -> None:
    fault = "SIGTERM with notice to a sweep's driver"
    account.tried(fault)
    process = start(sweep_command(tmp_path, data), tmp_path / "log")
    enough = 7 if kind == "warmup" else SWEEP_WARMUP + 7

    def running() -> bool:
        return any(last_step(out) >= enough for out in trials(tmp_path, kind))

    wait_until(running, process, tmp_path / "log")
    assert end(process, signal.SIGTERM) == 130
    printed = (tmp_path / "log").read_text()
    assert "interrupted; this goes on from here" in printed
    for out in trials(tmp_path, kind):
        newest = newest_checkpoint(out)
        assert newest is not None
        assert int(newest.stem.removeprefix("step_")) == last_step(out)

    finish(sweep_command(tmp_path, data), tmp_path / "log")

    assert rows(tmp_path) == rows(undisturbed_sweep)
    for steps in tracked_steps(f"sqlite:///{tmp_path}/mlflow.db").values():
        assert len(steps) == len(set(steps))
    account.survived(fault, 0)


def _begin_anew(undisturbed_sweep: Path, data: Path, folder: Path) -> list[Path]:
    """A finished sweep in a folder of its own; the folders of its two arms."""
    finish(sweep_command(folder, data), folder / "log")
    assert rows(folder) == rows(undisturbed_sweep)
    return trials(folder, "trial")


def test_a_trial_whose_folder_is_deleted_is_trained_again_and_counted_once(
    data: Path, undisturbed_sweep: Path, tmp_path: Path
) -> None:
    fault = "a finished trial's folder deleted"
    arms = _begin_anew(undisturbed_sweep, data, tmp_path)
    account.tried(fault)
    shutil.rmtree(arms[0])

    # With --fresh, or a clean checkout would take the trial from MLflow.
    printed = finish([*sweep_command(tmp_path, data), "--fresh"], tmp_path / "log")

    assert "1 trials to run" in printed
    assert rows(tmp_path) == rows(undisturbed_sweep)
    account.survived(fault, len(read_journal(arms[0])))


def test_arms_are_not_lost_with_the_checkpoint_that_they_fork_from(
    data: Path, undisturbed_sweep: Path, tmp_path: Path
) -> None:
    fault = "shared warm-up's checkpoint torn, an arm deleted"
    arms = _begin_anew(undisturbed_sweep, data, tmp_path)
    account.tried(fault)
    shutil.rmtree(arms[0])
    (warmup,) = trials(tmp_path, "warmup")
    newest = newest_checkpoint(warmup)
    assert newest is not None
    newest.write_bytes(newest.read_bytes()[:5000])
    older = newest.with_name(f"step_{SWEEP_WARMUP - 5:08d}.pt")
    assert older.is_file()

    printed = finish([*sweep_command(tmp_path, data), "--fresh"], tmp_path / "log")

    assert "2 trials to run" in printed
    assert rows(tmp_path) == rows(undisturbed_sweep)
    tags = run_tags(f"sqlite:///{tmp_path}/mlflow.db", read_run_id(warmup))
    resumed_at = int(tags["cosa.resumed_at"])
    account.survived(fault, SWEEP_WARMUP - resumed_at + len(read_journal(arms[0])))
