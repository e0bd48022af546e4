"""The whole state of a run in one file, written whole or not at all.

A checkpoint holds ON, AN, the optimiser, both thresholds with their queues, the step and the config. The
step is also the data position and the state of every random number: data order, augmentations, anchors and
stochastic depth are functions of (seed, step), so a resumed run goes on bit for bit.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

FORMAT = 2
_NAME = re.compile(r"step_(\d{8})\.pt")

State = dict[str, Any]


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, sync it, and rename it to `path`.

    Raises:
        OSError: No permission or no space; `path` is as it was before, the temporary file is gone.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(draft)
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        # torch's writer ends a failed write with a RuntimeError of its own, on top of the OSError
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if not isinstance(cause, OSError):
            raise
        raise write_error(path, cause) from error


def write_error(path: Path, error: OSError) -> OSError:
    """The one line that says what could not be written, why, and what to do."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    full = error.errno in {errno.ENOSPC, errno.EDQUOT}
    remedy = "free some space there" if full else "check the path and its permissions"
    message = f"cannot write {str(path)!r}: {reason}; {remedy}, then run the same command again"
    return OSError(error.errno, message) if error.errno else OSError(message)


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies."""
    return folder / f"step_{step:08d}.pt"


def step_of(path: Path) -> int:
    """The step a checkpoint's name says."""
    found = _NAME.fullmatch(path.name)
    if found is None:
        raise ValueError(f"checkpoint must be called step_<8 digits>.pt, got {path.name!r}")
    return int(found[1])


def save(folder: Path, state: State, *, keep: int) -> Path:
    """Write `state` as the checkpoint of its step, then remove all but the newest `keep` up to that step.

    A later one is no checkpoint of this run's past but one that could not be read: it takes nobody's place.
    """
    path = checkpoint_path(folder, state["step"])

    def write(draft: Path) -> None:
        with draft.open("wb") as file:  # given a path, torch would hide why it could not write
            torch.save({"format": FORMAT, **state}, file)

    write_atomically(path, write)
    past = [old for old in _existing(folder) if step_of(old) <= state["step"]]
    drafts = folder.glob(".step_*.part")  # of a process that was killed while it wrote
    for old in (*past[:-keep], *drafts):
        old.unlink(missing_ok=True)
    return path


def load(path: Path) -> State:
    """The state a checkpoint holds, on the CPU; nothing in it is unpickled but tensors and plain data.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is torn, no checkpoint of ours, or of another format.
    """
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint must exist, got {str(path)!r}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001 (torch's readers have a dozen ways to say "not such a file")
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"checkpoint must be whole, got {str(path)!r} ({reason}); remove it") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"checkpoint must be one of cosa's in format {FORMAT}, got {str(path)!r}")
    return state


def newest(folder: Path, warn: Callable[[str], None]) -> State | None:
    """The newest checkpoint that can be read, or None; each unreadable one is skipped with a line."""
    for path in reversed(_existing(folder)):
        try:
            return load(path)
        except ValueError as error:
            warn(f"skipped a checkpoint: {error}")
    return None


def _existing(folder: Path) -> list[Path]:
    """Checkpoints in `folder`, oldest first."""
    return sorted(path for path in folder.glob("step_*.pt") if _NAME.fullmatch(path.name))
