"""What the layouts share: finding files by name, reading many at a time, and telling all that is wrong.

Bad data is told to a `OnProblem`. Training passes `refuse`, which raises the first thing; a check of a whole
data set collects them, and reading goes on without the image.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from cosa.storage.files import lock, shorten_tmpdir
from cosa.structures import IGNORE

_THREADS = 8  # files are read in parallel: most of the wait is the disk's, and decoding frees the GIL
_AHEAD = 2  # items that are read while one is used
_MOST_PROCESSES = 16
_WORTH_A_PROCESS = 256  # items of milliseconds each, for the seconds that it takes to start

T = TypeVar("T")
R = TypeVar("R")

OnProblem = Callable[[Exception], None]
"""Is told each thing that is wrong with a data set. Where it returns, reading goes on without that image."""


def refuse(error: Exception) -> None:
    """Raise the first thing that is wrong: the way to read data that is to be used."""
    raise error


def found(
    names: Iterable[str],
    files: Container[str],
    law: str,
    remedy: str,
    on_problem: OnProblem,
    kind: type[Exception] = FileNotFoundError,
) -> tuple[str, ...]:
    """The names that are among the files; of the others one problem tells, with a note for each."""
    names = tuple(names)
    missing = [name for name in names if name not in files]
    if missing:
        error = kind(f"{law}, got {len(missing)} missing of {len(names)}, first {missing[0]!r}; {remedy}")
        for name in missing:
            error.add_note(f"{law}, got none for {name!r}; {remedy}")
        on_problem(error)
    return tuple(name for name in names if name in files)


def require_root(root: Path, layout: str, folders: Sequence[str], remedy: str) -> None:
    """Refuse a data.root that is no folder, or lacks one of its layout's.

    Raises:
        FileNotFoundError: It does.
    """
    laws = {".": f"be a folder in the {layout} layout", **{folder: f"hold {folder}" for folder in folders}}
    for folder, law in laws.items():
        if not (root / folder).is_dir():
            raise FileNotFoundError(
                f"data.root must {law}, got {str(root)!r}, which {contents(root)}; {remedy}"
            )


def contents(root: Path) -> str:
    """What a folder holds, for a message: the first few names."""
    if not root.is_dir():
        return "is no folder" if root.exists() else "does not exist"
    return "holds " + (", ".join(sorted(path.name for path in root.iterdir())[:8]) or "nothing")


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


def read_ahead(function: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """`function` of every item, in order, by threads that go on with the next ones while one is used.

    Threads, not processes: decoding and resizing free the GIL, and the first result comes at once.
    """
    with ThreadPoolExecutor(max(1, workers)) as pool:
        waiting = (pool.submit(function, item) for item in items)
        ahead = deque(itertools.islice(waiting, _AHEAD))
        while ahead:
            first = ahead.popleft()
            ahead.extend(itertools.islice(waiting, 1))
            yield first.result()


def read_classes(path: Path) -> tuple[str, ...]:
    """The names in a classes.txt: one foreground class per line, in the order of the masks' values.

    Raises:
        ValueError: No names, too many for a mask, one twice, or the background among them.
    """
    names = tuple(line.strip() for line in text_lines(path))
    if not 0 < len(names) < IGNORE:
        raise ValueError(
            f"classes.txt must name 1 to {IGNORE - 1} classes, got {len(names)} in {path}; "
            "write one foreground class per line"
        )
    require_distinct(names, path)
    require_foreground(names, path)
    return names


def require_foreground(names: Iterable[str], path: Path) -> None:
    """Raise a ValueError where a foreground class is called background: all the others would be one off."""
    for name in names:
        if name.casefold() == "background":
            raise ValueError(
                f"classes must be those of the foreground, got {name!r} in {path}; take it out: background "
                "is what no class names, and 0 in a mask"
            )


def text_lines(path: Path) -> list[str]:
    """The lines of a text file that are not blank."""
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    return [line for line in text.splitlines() if line.strip()]


def require_distinct(names: Sequence[str], path: Path) -> None:
    """Raise a ValueError that shows a name which `path` holds twice."""
    if len(set(names)) < len(names):
        again = next(name for name, count in Counter(names).items() if count > 1)
        raise ValueError(f"names must be distinct, got {again!r} twice in {path}; remove one")


def once(
    done: Callable[[], bool], make: Callable[[], None], folder: Path, setting: str = "data.cache"
) -> None:
    """Call `make` unless it is done, in one process of a machine, which holds `folder`; the others wait.

    Where it is done, nothing is written. `setting` says where the folder lies.

    Raises:
        OSError: The folder cannot be made or written.
    """
    if done():
        return
    try:
        held = lock(folder / "lock", wait=math.inf)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise OSError(
            f"{setting} must be a folder that can be written, got {str(folder)!r} ({reason}); "
            f"set --{setting} to another"
        ) from error
    with held:
        if not done():  # by another process, while we waited
            make()


def in_processes(
    function: Callable[[T], R], items: Sequence[T], workers: int | None = None, *, pin: bool = False
) -> Iterator[R]:
    """`function` of every item, in order, for what holds Python's lock.

    The processes end with this one, killed or not. It may raise OSError and ValueError, as if it ran here.

    Args:
        function: Can be pickled, as its items and results can.
        items: What it is called with.
        workers: Processes; 0 stays in this one, None starts as many as so many items are worth.
        pin: Whether tensors are to come in memory that a GPU reads directly.
    """
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = min(cores, _MOST_PROCESSES, math.ceil(len(items) / _WORTH_A_PROCESS))
        workers = 0 if workers == 1 else workers
    if workers:
        shorten_tmpdir()  # tensors come over sockets there
    results: Iterable[R | Exception] = DataLoader(
        _Results(function, items),
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=workers,
        pin_memory=pin,
        worker_init_fn=_end_with_parent,
        generator=torch.Generator(),  # else starting it draws from the run's own random numbers
        # A fork would copy a process that already runs CUDA and threads; a fork server's children have the
        # server for their parent, and outlive a killed run.
        multiprocessing_context="spawn" if workers else None,
    )
    for result in results:
        if isinstance(result, Exception):
            raise result
        yield result


class _Results(Dataset["R | Exception"]):
    """A function's results, by the places of its arguments."""

    def __init__(self, function: Callable[[T], R], items: Sequence[T]) -> None:
        self.function, self.items = function, items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, place: int) -> R | Exception:
        try:
            return self.function(self.items[place])
        except (OSError, ValueError) as error:
            # Handed on as a value: torch would wrap it in the traceback of the process it was raised in.
            return error.with_traceback(None)


def _end_with_parent(worker: int) -> None:  # noqa: ARG001 (torch tells each worker its number)
    """Have this process end with its parent, in the middle of an item, too; torch looks between two alone."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None  # this is a worker
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _as_it_is(result: R) -> R:
    return result
