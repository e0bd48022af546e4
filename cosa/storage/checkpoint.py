"""The whole state of a run in one file, written whole or not at all.

A checkpoint holds ON, AN, the optimiser, both thresholds with their queues, the step and the config. The
step is also the data position and the state of every random number: data order, augmentations, anchors and
stochastic depth are functions of (seed, step), so a resumed run goes on bit for bit.

Beside `step_00000400.pt` lies `step_00000400.pt.sha256`, as `sha256sum -c` reads it. It is there first, so
that a checkpoint without its hash, or with another one, is torn: it is passed over, and counts for nothing.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from cosa.config import Config, from_json, warmup_identity
from cosa.storage.files import digest, one_line, write_atomically

FORMAT = 2
_NAME = re.compile(r"step_(\d{8})\.pt")

State = dict[str, Any]


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies."""
    return folder / f"step_{step:08d}.pt"


def step_of(path: Path) -> int:
    """The step a checkpoint's name says."""
    found = _NAME.fullmatch(path.name)
    if found is None:
        raise ValueError(f"checkpoint must be called step_<8 digits>.pt, got {path.name!r}")
    return int(found[1])


def hash_path(path: Path) -> Path:
    """Where the hash of a checkpoint lies."""
    return path.with_name(f"{path.name}.sha256")


def save(folder: Path, state: State, *, keep: int) -> Path:
    """Write `state` as the checkpoint of its step, then remove those before the newest `keep` whole ones.

    A later one is no checkpoint of this run's past but one that could not be read: it takes nobody's place.
    """
    path = checkpoint_path(folder, state["step"])

    def write(draft: Path) -> None:
        with draft.open("wb") as file:  # given a path, torch would hide why it could not write
            torch.save({"format": FORMAT, **state}, file)
        line = f"{digest(draft)}  {path.name}\n"
        write_atomically(hash_path(path), line)

    write_atomically(path, write)
    past = [old for old in existing(folder) if step_of(old) <= state["step"]]
    if len(past) > keep:
        # Each is read again before it takes an older one's place: a disk may have lost it since.
        whole = [path, *itertools.islice(filter(is_whole, reversed(past[:-1])), keep - 1)]
        for old in past[: past.index(whole[-1])] if len(whole) == keep else ():
            remove(old)
    for draft in folder.glob(".step_*.part"):  # of a process that was killed while it wrote
        draft.unlink(missing_ok=True)
    return path


def remove(path: Path) -> None:
    """Remove a checkpoint, its hash first: what is left of a removal cut short is torn."""
    hash_path(path).unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def is_whole(path: Path) -> bool:
    """Whether a checkpoint is there and, byte for byte, what was written."""
    try:
        return hash_path(path).read_bytes()[:64] == digest(path).encode()
    except FileNotFoundError:
        return False


def load(path: Path) -> State:
    """The state a checkpoint holds, on the CPU; nothing in it is unpickled but tensors and plain data.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not the bytes that were written, no checkpoint of ours or of another format, or
            holds more than data.
    """
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint must exist, got {str(path)!r}")
    if not is_whole(path):
        hashed = hash_path(path)
        wrong = f"which is not what {hashed.name} says; remove it"
        if not hashed.exists():
            wrong = f"without its hash {hashed.name}; bring that too, or take another"
        raise ValueError(f"checkpoint must be whole, got {str(path)!r}, {wrong}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001 (torch's readers have a dozen ways to say "not such a file")
        raise ValueError(
            f"checkpoint must hold nothing but tensors and plain data, got {str(path)!r} "
            f"({one_line(error, kind=False)}); remove it"
        ) from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"checkpoint must be one of cosa's in format {FORMAT}, got {str(path)!r}")
    return state


def newest(folder: Path, warn: Callable[[str], None]) -> State | None:
    """The newest checkpoint that can be read, or None; each unreadable one is skipped with a line."""
    for path in reversed(existing(folder)):
        try:
            return load(path)
        except ValueError as error:
            warn(f"skipped a checkpoint: {error}")
    return None


def existing(folder: Path) -> list[Path]:
    """Checkpoints in `folder`, oldest first."""
    return sorted(path for path in folder.glob("step_*.pt") if _NAME.fullmatch(path.name))


def load_warmup(path: Path, config: Config) -> tuple[State, float | None]:
    """The state of a shared warm-up, checked to be the one that `config` would train itself.

    A run forked from it is bit for bit the run trained from its beginning, as the warm-up reads nothing of
    co-training. With the state comes the momentum of the follower that is to be AN; None where it is the
    warm-up's own.

    Raises:
        ValueError: It is another warm-up, not at its end, or carries no AN of that momentum.
        FileNotFoundError: There is no such checkpoint.
    """
    saved = load(path)
    trained = from_json(saved["config"])
    if warmup_identity(trained) != warmup_identity(config) or saved["step"] != config.train.warmup:
        raise ValueError(
            f"fork_from must be this run's own warm-up after {config.train.warmup} steps, got {str(path)!r} "
            f"after {saved['step']} steps of warm-up {warmup_identity(trained)} instead of "
            f"{warmup_identity(config)}"
        )
    momentum = config.ema.momentum
    if momentum == trained.ema.momentum:
        return saved, None
    require_momenta(path, saved, [momentum])
    return saved, momentum


def require_momenta(where: Path, saved: State, wanted: Sequence[float]) -> None:
    """Refuse a checkpoint that lacks an AN of one of the momenta `wanted`."""
    missing = [momentum for momentum in wanted if repr(momentum) not in saved["followers"]]
    if missing:
        raise ValueError(
            f"warm-up must carry an AN of momentum {missing[0]!r}, got only "
            f"{', '.join(saved['followers']) or 'its own'} in {str(where)!r}; train it in a new folder"
        )


def require_classes(where: Path, saved: State, classes: Sequence[str]) -> None:
    """Refuse a checkpoint of other classes, or of the same in another order: each of its outputs is one.

    Raises:
        ValueError: Names the first class that differs.
    """
    before = tuple(saved["classes"])
    if before != tuple(classes):
        pairs = itertools.zip_longest(before, classes, fillvalue="none")
        place, (old, new) = next((n, pair) for n, pair in enumerate(pairs, 1) if pair[0] != pair[1])
        raise ValueError(
            f"classes must be those that {str(where)!r} was trained on, got {new!r} instead of {old!r} as "
            f"class {place} ({len(classes)} classes, {len(before)} before); bring back the names and their "
            "order, or train in a new folder"
        )
