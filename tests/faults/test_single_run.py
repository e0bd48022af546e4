"""`cosa-train` is killed, stopped, starved of disk and fed torn checkpoints, and ends as if nothing were."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults import account
from tests.faults.runs import (
    EVERY,
    STEPS,
    end,
    finish,
    last_step,
    newest_checkpoint,
    start,
    tracked_steps,
    train_command,
    wait_until,
    what_counts,
)

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]


def _cut(out: Path, data: Path, step: int, number: signal.Signals) -> tuple[int, int]:
    """Start a run and send it a signal at `step`: its exit code, and the last step that it had done."""
    log = out.parent / "log"
    process = start(train_command(out, data), log)
    wait_until(lambda: last_step(out) >= step, process, log)
    code = end(process, number)
    return code, last_step(out)


def _step(path: Path | None) -> int:
    return 0 if path is None else int(path.stem.removeprefix("step_"))


@pytest.mark.parametrize("step", [3, 17, 31])
def test_a_killed_run_goes_on_from_its_last_checkpoint(
    step: int, data: Path, undisturbed: object, tmp_path: Path
) -> None:
    fault, out = "kill -9 of cosa-train", tmp_path / "run"
    account.tried(fault)
    code, reached = _cut(out, data, step, signal.SIGKILL)
    assert code == -signal.SIGKILL
    repeated = reached - _step(newest_checkpoint(out))

    finish(train_command(out, data), tmp_path / "log")

    assert what_counts(out) == undisturbed
    (steps,) = tracked_steps(f"sqlite:///{tmp_path}/mlflow.db").values()
    assert steps == [*range(1, STEPS + 1)]
    assert repeated <= EVERY
    account.survived(fault, repeated)


@pytest.mark.parametrize("step", [8, 23])
def test_a_run_told_to_stop_saves_first_and_repeats_nothing(
    step: int, data: Path, undisturbed: object, tmp_path: Path
) -> None:
    fault, out = "SIGTERM with notice to cosa-train", tmp_path / "run"
    account.tried(fault)
    code, reached = _cut(out, data, step, signal.SIGTERM)
    assert code == 143
    assert f"stopped after step {reached} of {STEPS}" in (tmp_path / "log").read_text()
    assert _step(newest_checkpoint(out)) == reached

    finish(train_command(out, data), tmp_path / "log")

    assert what_counts(out) == undisturbed
    account.survived(fault, 0)


@pytest.mark.parametrize("damage", ["torn", "flipped", "empty"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before_it(
    damage: str, data: Path, undisturbed: object, tmp_path: Path
) -> None:
    fault, out = f"newest checkpoint {damage}", tmp_path / "run"
    account.tried(fault)
    _, reached = _cut(out, data, 4 * EVERY + 2, signal.SIGKILL)
    newest = newest_checkpoint(out)
    assert newest is not None
    content = bytearray(newest.read_bytes())
    match damage:
        case "torn":
            content = content[: len(content) // 2]
        case "flipped":
            content[len(content) // 2] ^= 0x10
        case "empty":
            content.clear()
    newest.write_bytes(content)

    printed = finish(train_command(out, data), tmp_path / "log")

    assert "skipped a checkpoint" in printed
    assert newest.name in printed
    assert what_counts(out) == undisturbed
    account.survived(fault, reached - (_step(newest) - EVERY))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MB; skipped where we may not mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount a small file system")
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", folder]
    mounted = subprocess.run(command, check=False, capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a small file system here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_costs_nothing_that_was_written(
    data: Path, undisturbed: object, small_disk: Path, tmp_path: Path
) -> None:
    fault, out, log = "output disk full", small_disk / "run", tmp_path / "log"
    account.tried(fault)
    command = train_command(out, data, "--tracking-uri", f"sqlite:///{tmp_path}/mlflow.db")
    process = start(command, log)
    wait_until(lambda: _step(newest_checkpoint(out)) >= 2 * EVERY, process, log)
    with (small_disk / "filler").open("wb") as filler:
        try:
            while True:
                filler.write(bytes(65536))
                filler.flush()
        except OSError:
            pass
    assert process.wait(240) == 2
    last_line = log.read_text().strip().splitlines()[-1]
    assert "No space left on device; free some space there, then run the same command again" in last_line
    reached = last_step(out)

    (small_disk / "filler").unlink()
    kept = _step(newest_checkpoint(out))
    finish(command, log)

    assert what_counts(out) == undisturbed
    account.survived(fault, max(0, reached - kept))
