"""What a sweep keeps on disk, and who may write there.

    OUT/.lock                 held by the driver while it runs
    OUT/.stop                 there while the driver waits for its trials to save and stop
    OUT/run.json              the sweep's run in MLflow
    OUT/plan.json             what it was last asked for
    OUT/.tune/                Ray Tune's own notes of the current start, thrown away
    OUT/trials/NAME/          one trial: what the trainer leaves, and
        .lock                 held by the process that trains it
        log.txt               what it printed
        failure.txt           why it failed, while it is failed

A trial is finished exactly where the trainer's `result.json` says so for the same experiment. The locks
belong to the operating system: they end with their process, however it ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from cosa.config import identity, warmup_identity
from sweeps.planning.plan import Trial

RESULT = "result.json"
FAILURE = "failure.txt"
LOG = "log.txt"
STOP = ".stop"
_TAIL = 65_536  # bytes; a line of the journal has a few thousand at most


class FolderInUseError(OSError):
    """Another process holds the folder; the message is one line that says which and what to do."""


@contextlib.contextmanager
def locked(folder: Path, *, wait: float = 0.0) -> Iterator[None]:
    """Hold `folder` against other processes, on this machine and, where the file system can, on others.

    Args:
        folder: Made if it does not exist.
        wait: Seconds to wait for another process to let go.

    Raises:
        FolderInUseError: It did not.
        OSError: The folder cannot be made or written.
    """
    with _lock_file(folder) as file:
        deadline = time.monotonic() + wait
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    file.seek(0)
                    holder = file.read().strip() or "another process"
                    raise FolderInUseError(
                        f"folder must not be in use, got {str(folder)!r}, held by {holder}; "
                        f"wait for it, stop it, or choose another folder"
                    ) from None
                time.sleep(0.2)
        file.truncate(0)
        file.write(f"process {os.getpid()}")
        file.flush()
        yield


def _lock_file(folder: Path) -> TextIO:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return (folder / ".lock").open("a+")
    except OSError as error:
        raise OSError(
            error.errno, f"folder must be writable, got {str(folder)!r} ({error.strerror}); choose another"
        ) from None


@contextlib.contextmanager
def scratch(root: Path) -> Iterator[Path]:
    """An empty folder that all machines of the sweep reach, removed afterwards."""
    folder = root / ".tune"
    shutil.rmtree(folder, ignore_errors=True)  # a driver that was killed left its own
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def trial_folder(root: Path, name: str) -> Path:
    """The folder of the trial called `name`."""
    return root / "trials" / name


def checkpoint(folder: Path, step: int) -> Path:
    """Where the trainer leaves the checkpoint of `step`."""
    from cosa.storage.checkpoint import checkpoint_path  # imports torch

    return checkpoint_path(folder / "checkpoints", step)


def _is_whole(path: Path) -> bool:
    """Whether arms can fork from a checkpoint: a warm-up whose own is lost or torn is not finished."""
    from cosa.storage.checkpoint import is_whole  # imports torch

    return path.is_file() and is_whole(path)


def read_result(root: Path, trial: Trial) -> Mapping[str, Any] | None:
    """What the trainer wrote of a finished trial, or None where it is not finished."""
    folder = trial_folder(root, trial.name)
    try:
        result: dict[str, Any] = json.loads((folder / RESULT).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    if result.get("step") != trial.last_step:
        return None
    if trial.kind == "warmup":
        same = result.get("warmup_identity") == warmup_identity(trial.config)
        return result if same and _is_whole(checkpoint(folder, trial.last_step)) else None
    return result if result.get("identity") == identity(trial.config) else None


def read_step(folder: Path) -> int:
    """The last step in a trial's journal, 0 where there is none yet."""
    try:
        with (folder / "journal.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
            lines = file.read().splitlines()
    except FileNotFoundError:
        return 0
    for line in reversed(lines):
        with contextlib.suppress(json.JSONDecodeError, KeyError, TypeError):  # a line being written
            return int(json.loads(line)["step"])
    return 0


def read_journal(folder: Path) -> Iterator[tuple[int, dict[str, float]]]:
    """A trial's metrics by step, as its journal has them; a torn line is left out."""
    with contextlib.suppress(FileNotFoundError), (folder / "journal.jsonl").open() as file:
        for line in file:
            with contextlib.suppress(json.JSONDecodeError):
                entry = json.loads(line)
                yield int(entry.pop("step")), entry


def read_failure(folder: Path) -> str:
    """Why a trial failed, in one line; empty where it is not known."""
    try:
        return (folder / FAILURE).read_text().strip()
    except FileNotFoundError:
        return ""
