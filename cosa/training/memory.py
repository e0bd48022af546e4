"""The memory that a run's process holds: kept between steps on a CPU, and counted, there and on a GPU."""

from __future__ import annotations

import contextlib
import ctypes
import resource
import sys
from pathlib import Path

import torch


def keep_heap() -> None:
    """Have the C library keep the memory of freed tensors for the next ones of this process.

    glibc gives large blocks back to the system, which hands them out anew, page by page, at the next step.
    The numbers are of its malloc.h; other C libraries are left as they are.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(-4, 0)  # M_MMAP_MAX: no block lives outside the heap
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap does not shrink by itself


def trim_heap() -> None:
    """Give the system what is free in the heap, the holes that tensors of many sizes left included."""
    if malloc_trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        malloc_trim(0)


def forget_peak(device: torch.device) -> None:
    """Have `peak` count from here on: a process of a sweep trains one run after the other."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    trim_heap()
    with contextlib.suppress(OSError):  # not on Linux, or not allowed
        Path("/proc/self/clear_refs").write_text("5")


def peak(device: torch.device) -> int:
    """Most bytes that this process has held: of its tensors on a GPU, of the whole of it on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
