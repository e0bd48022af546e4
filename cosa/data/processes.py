"""Work spread over processes: for what holds Python's lock, such as decoding PNGs and drawing polygons."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

CHUNK = 256
"""Items that make up for the seconds a process takes to start, where an item takes milliseconds."""
_MOST = 16

T = TypeVar("T")
R = TypeVar("R")


def chunks(items: Sequence[T]) -> list[Sequence[T]]:
    """The items in order, CHUNK at a time."""
    return [items[start : start + CHUNK] for start in range(0, len(items), CHUNK)]


def in_processes(function: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
    """`function` of every item, in order; in this process where there is one item or one core.

    Leaving the iterator early drops what has not begun. The processes end with this one, killed or not.
    """
    workers = min(os.cpu_count() or 1, _MOST, len(items))
    if workers <= 1:
        yield from map(function, items)
        return
    # A fork would copy a process that may already run CUDA and threads.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_follow_parent)
    try:
        yield from pool.map(function, items)
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
