"""A run kept in a bucket outlives its machine, a torn object, and a server that is away for a while."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults import account
from tests.faults.runs import (
    EVERY,
    PATIENCE,
    STEPS,
    end,
    finish,
    last_step,
    start,
    train_command,
    wait_until,
    what_counts,
)
from tests.s3 import BUCKET, S3Server, serving

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with serving() as running:
        yield running


@pytest.fixture
def name(tmp_path: Path) -> str:
    """A run of each test's own."""
    return f"faults/{tmp_path.name}"


def working_folder(place: Path, name: str) -> Path:
    """Where a run started in `place` works."""
    return place / "runs" / "s3" / BUCKET / name


def command(name: str, data: Path, *more: str) -> list[str]:
    known = train_command(Path("OUT"), data, "--tracking-uri", "none", *more)
    return [f"s3://{BUCKET}/{name}" if part == "OUT" else part for part in known]


def steps_there(server: S3Server, name: str) -> list[int]:
    """Steps of the checkpoints that lie in the bucket with their hashes."""
    names = server.names(name)
    states = [item for item in names if item.endswith(".pt") and f"{item}.sha256" in names]
    return [int(item.removeprefix("checkpoints/step_").removesuffix(".pt")) for item in states]


def lose_machine(name: str, data: Path, server: S3Server, place: Path, *more: str) -> tuple[int, int]:
    """Kill -9 a run in its middle and remove its folder: its last step, and the newest one in the bucket."""
    folder, log = working_folder(place, name), place / "log"
    process = start(command(name, data, *more), log, folder=place)
    wait_until(lambda: last_step(folder) >= 3 * EVERY + 2, process, log)
    end(process, signal.SIGKILL)
    reached = last_step(folder)
    shutil.rmtree(folder)
    return reached, steps_there(server, name)[-1]


def test_a_run_whose_machine_is_gone_goes_on_from_the_bucket(
    data: Path, undisturbed: object, server: S3Server, name: str, tmp_path: Path
) -> None:
    fault = "machine gone, run kept in a bucket"
    account.tried(fault)
    reached, kept = lose_machine(name, data, server, tmp_path)

    finish(command(name, data), tmp_path / "log", folder=tmp_path)

    assert what_counts(working_folder(tmp_path, name)) == undisturbed
    assert reached - kept <= EVERY
    account.survived(fault, reached - kept)


def test_a_torn_object_gives_way_to_the_one_before_it(
    data: Path, undisturbed: object, server: S3Server, name: str, tmp_path: Path
) -> None:
    fault = "newest checkpoint in the bucket torn"
    account.tried(fault)
    reached, kept = lose_machine(name, data, server, tmp_path)
    torn, files = f"{BUCKET}/{name}/checkpoints/step_{kept:08d}.pt", server.files()
    files.pipe_file(torn, files.cat_file(torn)[:-100])

    printed = finish(command(name, data), tmp_path / "log", folder=tmp_path)

    assert f"skipped a checkpoint: s3://{torn} is torn" in printed
    assert what_counts(working_folder(tmp_path, name)) == undisturbed
    account.survived(fault, reached - (kept - EVERY))


def test_a_bucket_that_is_away_for_a_while_gets_everything(
    data: Path, undisturbed: object, server: S3Server, name: str, tmp_path: Path
) -> None:
    fault, log = "bucket away for a while", tmp_path / "log"
    account.tried(fault)
    process = start(command(name, data), log, folder=tmp_path)
    wait_until(lambda: EVERY in steps_there(server, name), process, log)
    server.kill()
    wait_until(lambda: "takes nothing, training goes on" in log.read_text(), process, log)
    server.start()
    assert process.wait(PATIENCE) == 0, log.read_text()[-3000:]
    assert "answers again and has everything" in log.read_text()
    shutil.rmtree(working_folder(tmp_path, name))

    finish(command(name, data), log, folder=tmp_path)

    assert what_counts(working_folder(tmp_path, name)) == undisturbed
    account.survived(fault, 0)


def test_two_workers_go_on_from_the_bucket(data: Path, server: S3Server, name: str, tmp_path: Path) -> None:
    """Ray's group is lost with its driver: one process goes on from what the two left."""
    fault = "driver of two workers gone, run kept in a bucket"
    account.tried(fault)
    reached, kept = lose_machine(name, data, server, tmp_path, "--workers", "2")

    finish(command(name, data), tmp_path / "log", folder=tmp_path)

    folder = working_folder(tmp_path, name)
    assert last_step(folder) == STEPS
    assert "result.json" in server.names(name)
    account.survived(fault, reached - kept)
