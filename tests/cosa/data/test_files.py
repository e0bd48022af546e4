"""Work spread over processes: order, errors, and an end that leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest
import torch

from cosa.data import files
from cosa.data.files import in_processes


def _place(item: int) -> tuple[int, int]:
    if item < 0:
        raise ValueError("below zero")
    return item, os.getpid()


def test_few_items_start_no_process() -> None:
    assert list(in_processes(_place, range(9))) == [(item, os.getpid()) for item in range(9)]


def test_one_core_starts_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})

    assert {pid for _, pid in in_processes(_place, range(1000))} == {os.getpid()}


def test_results_come_in_order_from_other_processes_until_the_first_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(files, "_WORTH_A_PROCESS", 1)
    results = in_processes(_place, [3, 1, 2, -1, 5])

    before = [next(results) for _ in range(3)]

    assert [item for item, _ in before] == [3, 1, 2]
    assert os.getpid() not in {pid for _, pid in before}
    with pytest.raises(ValueError, match="below zero"):
        next(results)


def test_the_processes_of_one_that_was_killed_end() -> None:
    program = """
import time
from cosa.data.files import in_processes
if __name__ == "__main__":
    results = in_processes(time.sleep, [0, 0, 600, 600], 2)
    next(results)
    print("begun", flush=True)
    list(results)
"""
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    assert parent.stdout.readline() == "begun\n"
    children = psutil.Process(parent.pid).children(recursive=True)

    parent.send_signal(signal.SIGKILL)
    parent.wait()
    _, alive = psutil.wait_procs(children, timeout=20)

    assert len(children) >= 2
    assert not [child for child in alive if child.status() != psutil.STATUS_ZOMBIE]


def _squares(number: int) -> torch.Tensor:
    return torch.tensor([number, number**2])


def test_tensors_come_from_processes_where_the_folder_for_temporary_files_has_a_long_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    monkeypatch.setattr(tempfile, "tempdir", str(long))

    assert [found.tolist() for found in in_processes(_squares, range(3), 1)] == [[0, 0], [1, 1], [2, 4]]
