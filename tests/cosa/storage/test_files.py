"""The file kit: locks between processes, journals with torn lines, and errors told in one line."""

from __future__ import annotations

import errno
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cosa.storage import files
from cosa.storage.files import (
    InUseError,
    append_line,
    last_entry,
    lock,
    one_line,
    read_lines,
    write_atomically,
)

HOLD = """
import sys, time
from pathlib import Path
from cosa.storage.files import lock
with lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("content", ["text é\n", b"\x00\xff", lambda draft: draft.touch()])
def test_text_bytes_and_what_a_function_writes_are_written(tmp_path: Path, content: object) -> None:
    write_atomically(tmp_path / "file", content)  # type: ignore[arg-type]

    expected = (
        content.encode() if isinstance(content, str) else content if isinstance(content, bytes) else b""
    )
    assert (tmp_path / "file").read_bytes() == expected
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLD, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


@pytest.mark.parametrize("wait", [0.0, 0.2])
def test_a_lock_in_use_names_its_holder(tmp_path: Path, holder: subprocess.Popen[str], wait: float) -> None:
    law = f"folder must not be in use, got '{tmp_path}', held by process {holder.pid}; "

    with pytest.raises(InUseError, match=law), lock(tmp_path / ".lock", wait=wait):
        pass


@pytest.mark.parametrize("wait", [10.0, math.inf])
def test_a_killed_holder_lets_go(tmp_path: Path, holder: subprocess.Popen[str], wait: float) -> None:
    holder.kill()

    with lock(tmp_path / ".lock", wait=wait):
        assert (tmp_path / ".lock").read_text() == f"process {os.getpid()}"


def test_a_lock_is_let_go_and_can_be_taken_again(tmp_path: Path) -> None:
    for _ in range(2):
        with lock(tmp_path / "new" / ".lock"), pytest.raises(InUseError):
            lock(tmp_path / "new" / ".lock")


def test_a_lock_that_cannot_be_written_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(OSError, match=r"cannot write '.*file/folder': Not a directory") as refused:
        lock(tmp_path / "file" / "folder" / ".lock")

    assert refused.value.errno == errno.ENOTDIR


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    """Two entries, and a line that was being written when its process was killed."""
    path = tmp_path / "journal.jsonl"
    append_line(path, {"step": 1})
    append_line(path, {"step": 2}, sync=True)
    with path.open("a") as file:
        file.write('{"step": 3, "loss')
    return path


def test_a_journal_is_read_from_a_byte_on_without_what_is_still_being_written(journal: Path) -> None:
    first, second = read_lines(journal)

    assert [dict(line.content) for line in (first, second)] == [{"step": 1}, {"step": 2}]
    assert list(read_lines(journal, first.end)) == [second]
    assert list(read_lines(journal, second.end)) == []


def test_a_torn_line_is_ended_by_the_next_entry_and_passed_over(journal: Path) -> None:
    append_line(journal, {"step": 3})

    assert [dict(line.content) for line in read_lines(journal)] == [{"step": 1}, {"step": 2}, {}, {"step": 3}]


def test_the_last_whole_entry_is_found(journal: Path) -> None:
    assert last_entry(journal) == {"step": 2}

    append_line(journal, {"step": 3, "padding": "x" * 70_000})
    append_line(journal, {"step": 4})
    assert last_entry(journal) == {"step": 4}


def test_there_is_nothing_in_a_journal_that_is_not_there(tmp_path: Path) -> None:
    assert list(read_lines(tmp_path / "none")) == []
    assert last_entry(tmp_path / "none") == {}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_told() -> None:
    with pytest.raises(OSError, match="No space left on device; free some space there"):
        append_line(Path("/dev/full"), {"step": 1})


@pytest.mark.parametrize(
    ("error", "told", "without_kind"),
    [
        (ValueError("first\nsecond"), "ValueError: first", "first"),
        (KeyboardInterrupt(), "KeyboardInterrupt", "KeyboardInterrupt"),
        (OSError("pool (Caused by Refused('no'))"), "OSError: Refused('no'))", "Refused('no'))"),
        (
            OSError("no http://me:hidden@host/x?token=hidden"),
            "OSError: no http://***@host/x?token=***",
            "no http://***@host/x?token=***",
        ),
    ],
)
def test_an_error_is_one_line_without_passwords(error: BaseException, told: str, without_kind: str) -> None:
    assert one_line(error) == told
    assert one_line(error, kind=False) == without_kind


def test_an_error_that_says_too_much_is_cut() -> None:
    assert len(one_line(ValueError("x" * 10_000))) == 500


def test_a_long_folder_for_temporary_files_is_left_where_sockets_would_not_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(files, "gettempdir", lambda: "/tmp/short")
    monkeypatch.setattr(os, "access", lambda place, _: place != "/tmp")
    assert files.temporary_folder("/a", most=12) == "/tmp/short"
    assert files.temporary_folder("/a", most=11) == "/var/tmp"
    with pytest.raises(
        OSError, match=r"TMPDIR must have at most 7 characters .*, got '/tmp/short'; set it to a s"
    ):
        files.temporary_folder("/a", most=9)
