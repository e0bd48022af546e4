"""What the layouts share: finding files by name, reading many at a time, and telling all that is wrong.

Bad data is told to a `OnProblem`. Training passes `refuse`, which raises the first thing; a check of a whole
data set collects them, and reading goes on without the image.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from cosa.storage.files import lock
from cosa.structures import IGNORE

_THREADS = 8  # files are read in parallel: most of the wait is the disk's, and decoding frees the GIL
_MOST_PROCESSES = 16
_WORTH_A_PROCESS = 256  # items of milliseconds each, for the seconds that it takes to start
_AT_A_TIME = 32  # items that a process is handed

T = TypeVar("T")
R = TypeVar("R")

OnProblem = Callable[[Exception], None]
"""Is told each thing that is wrong with a data set. Where it returns, reading goes on without that image."""


def refuse(error: Exception) -> None:
    """Raise the first thing that is wrong: the way to read data that is to be used."""
    raise error


def found(
    names: Sequence[str], files: Mapping[str, Path], law: str, remedy: str, on_problem: OnProblem
) -> tuple[str, ...]:
    """The names that have a file; of the others one problem tells, with a note for each."""
    missing = [name for name in names if name not in files]
    if missing:
        error = FileNotFoundError(
            f"{law}, got {len(missing)} missing of {len(names)}, first {missing[0]!r}; {remedy}"
        )
        for name in missing:
            error.add_note(f"{law}, got none for {name!r}; {remedy}")
        on_problem(error)
    return tuple(name for name in names if name in files)


def files_by_stem(folder: Path, suffixes: Sequence[str]) -> dict[str, Path]:
    """The files of a folder by stem; a later suffix wins over an earlier one. Empty without the folder."""
    if not folder.is_dir():
        return {}
    paths = sorted(folder.iterdir())  # one listing: a look-up per file takes minutes on a network disk
    return {path.stem: path for suffix in suffixes for path in paths if path.suffix.lower() == suffix}


def read_each(
    function: Callable[[T], list[int]], items: Sequence[T], on_problem: OnProblem
) -> list[list[int]]:
    """`function` of every file, several at a time, in order; an empty list where it is bad."""

    def guarded(item: T) -> list[int] | Exception:
        try:
            return function(item)
        except (OSError, ValueError) as error:
            return error

    results: list[list[int]] = []
    with ThreadPoolExecutor(_THREADS) as pool:
        for result in pool.map(guarded, items):
            if isinstance(result, Exception):
                on_problem(result)
            results.append([] if isinstance(result, Exception) else result)
    return results


def one_hot(present: Sequence[Sequence[int]], classes: int) -> Float[Tensor, "n c"]:
    """Labels of images, given the positions of the classes in each."""
    rows = [row for row, positions in enumerate(present) for _ in positions]
    labels = torch.zeros(len(present), classes)
    labels[rows, [position for positions in present for position in positions]] = 1
    return labels


def read_classes(path: Path) -> tuple[str, ...]:
    """The names in a classes.txt: one foreground class per line, in the order of the masks' values.

    Raises:
        ValueError: No names, too many for a mask, or one twice.
    """
    names = tuple(line.strip() for line in text_lines(path))
    if not 0 < len(names) < IGNORE:
        raise ValueError(
            f"classes.txt must name 1 to {IGNORE - 1} classes, got {len(names)} in {path}; "
            "write one foreground class per line"
        )
    require_distinct(names, path)
    return names


def text_lines(path: Path) -> list[str]:
    """The lines of a text file that are not blank."""
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    return [line for line in text.splitlines() if line.strip()]


def require_distinct(names: Sequence[str], path: Path) -> None:
    """Raise a ValueError that shows a name which `path` holds twice."""
    if len(set(names)) < len(names):
        again = next(name for name, count in Counter(names).items() if count > 1)
        raise ValueError(f"names must be distinct, got {again!r} twice in {path}; remove one")


def locked(folder: Path, setting: str = "data.cache") -> AbstractContextManager[object]:
    """Make `folder` and hold it alone among processes, once others have let go of it.

    Args:
        folder: What to hold.
        setting: The setting that says where the folder lies.

    Raises:
        OSError: The folder cannot be made or written.
    """
    try:
        return lock(folder / "lock", wait=math.inf)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise OSError(
            f"{setting} must be a folder that can be written, got {str(folder)!r} ({reason}); "
            f"set --{setting} to another"
        ) from error


def in_processes(function: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
    """`function` of every item, in order, for what holds Python's lock; few items are not worth a process.

    Leaving the iterator early drops what has not begun. The processes end with this one, killed or not.
    """
    workers = min(os.cpu_count() or 1, _MOST_PROCESSES, math.ceil(len(items) / _WORTH_A_PROCESS))
    if workers <= 1:
        yield from map(function, items)
        return
    # A fork would copy a process that may already run CUDA and threads.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_follow_parent)
    try:
        yield from pool.map(function, items, chunksize=_AT_A_TIME)
    finally:
        pool.shutdown(cancel_futures=True)


def _follow_parent() -> None:
    """Leave Ctrl-C to the parent, and end when it ends: a pool's processes outlive a killed one otherwise."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
