"""Files that a kill cannot tear and two processes cannot spoil, journals, and the one line for what failed.

A journal is a file of JSON objects, one a line, that is only ever added to. Of a process that was killed it
may hold a torn line: whoever reads passes over it, whoever adds begins a new one.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from tempfile import gettempdir
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

_LONGEST = 500  # characters of an error that are worth reading
_SOCKET_BYTES = 103
_TAIL = 65_536  # bytes; a line of a journal has a few thousand at most


class InUseError(OSError):
    """Another process holds a lock; the message is one line that says which and what to do."""


def write_atomically(
    path: Path, content: str | bytes | Callable[[Path], object], *, sync: bool = True
) -> None:
    """Fill a temporary file beside `path`, sync it, rename it to `path`, and sync the folder.

    Args:
        path: The file; its folders are made.
        content: What to write, or a function that writes the file whose path it is given.
        sync: Without, a power cut can leave an empty file: for thousands that can be made again.

    Raises:
        OSError: No permission or no space; `path` is as it was before, the temporary file is gone.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(content):
            content(draft)
        else:
            draft.write_bytes(content.encode() if isinstance(content, str) else content)
        if sync:
            _sync(draft)
        draft.replace(path)
        if sync:
            _sync(path.parent)  # or a power cut could take the new name back
    except BaseException as error:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        # torch's writer ends a failed write with a RuntimeError of its own, on top of the OSError
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if not isinstance(cause, OSError):
            raise
        raise write_error(path, cause) from error


def _sync(path: Path) -> None:
    """Return once a file, or a folder's list of names, is on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in {errno.EINVAL, errno.ENOTSUP}):
            raise  # some network file systems know no sync of a folder
    finally:
        os.close(descriptor)


def write_error(path: Path, error: OSError) -> OSError:
    """The one line that says what could not be written, why, and what to do."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    full = error.errno in {errno.ENOSPC, errno.EDQUOT}
    remedy = "free some space there" if full else "check the path and its permissions"
    message = f"cannot write {str(path)!r}: {reason}; {remedy}, then run the same command again"
    return OSError(error.errno, message) if error.errno else OSError(message)


def require_folder(name: str, path: Path) -> None:
    """Refuse as a folder what is a file, or lies in one.

    Raises:
        NotADirectoryError: One line that calls it `name`.
    """
    there = next((place for place in (path, *path.absolute().parents) if place.exists()), path)
    if there.exists() and not there.is_dir():
        which = "which is a file" if there == path else f"where {str(there)!r} is a file"
        raise NotADirectoryError(f"{name} must be a folder, got {str(path)!r}, {which}; choose another path")


def temporary_folder(socket: str, most: int = _SOCKET_BYTES) -> str:
    """The system's folder for temporary files, or another in which the path of a Unix socket is not too long.

    Args:
        socket: The socket's path below that folder, at its longest.
        most: Bytes that the whole may have: 107 on Linux, 103 on macOS.

    Raises:
        OSError: It is too long in each of them; one line.
    """
    for place in dict.fromkeys((gettempdir(), "/tmp", "/var/tmp")):  # noqa: S108 (folders of our own are made there)
        if len(os.fsencode(place + socket)) <= most and os.access(place, os.W_OK):
            return place
    raise OSError(
        f"TMPDIR must have at most {most - len(socket)} characters for the paths of sockets in it, got "
        f"{gettempdir()!r}; set it to a shorter folder"
    )


def shorten_tmpdir() -> None:
    """Have this process, and those that it starts, keep temporary files where Python's own sockets fit."""
    place = temporary_folder("/pymp-abcdefgh/listener-abcdefgh")
    if place != gettempdir():
        os.environ["TMPDIR"] = tempfile.tempdir = place


def digest(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lock(path: Path, *, wait: float = 0.0) -> AbstractContextManager[object]:
    """Hold the file `path` against other processes until the context is left, or this process is no more.

    Args:
        path: Made with its folder if it does not exist, never removed; it names the process that holds it.
        wait: Seconds to wait for another process to let go; `math.inf` for ever.

    Raises:
        InUseError: It did not.
        OSError: The file cannot be written, or lies where nothing can be locked.
    """
    file = FileLock(path, thread_local=False, fallback_to_soft=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held = file.acquire(timeout=wait, poll_interval=0.1)
    except Timeout:
        holder = path.read_text().strip() or "another process"
        raise InUseError(
            f"folder must not be in use, got {str(path.parent)!r}, held by {holder}; "
            "wait for it, stop it, or choose another folder"
        ) from None
    except OSError as error:
        raise write_error(path.parent, error) from error
    with contextlib.suppress(OSError):  # a full disk
        path.write_text(f"process {os.getpid()}")
    return held


class Line(NamedTuple):
    """A line of a journal: where it and the next begin, in bytes, and its content; empty for a torn one."""

    start: int
    end: int
    content: Mapping[str, Any]


def read_lines(path: Path, start: int = 0) -> Iterator[Line]:
    """Lines of a journal from the byte `start` on, without one that is still being written.

    Nothing where there is no journal.
    """
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        file.seek(start)
        for line in file:
            if not line.endswith(b"\n"):
                return
            yield Line(start, start + len(line), _parsed(line))
            start += len(line)


def last_entry(path: Path) -> Mapping[str, Any]:
    """The last whole entry of a journal, which only its end is read for; empty where there is none."""
    start = max(0, path.stat().st_size - _TAIL) if path.exists() else 0
    return next(filter(None, reversed([line.content for line in read_lines(path, start)])), {})


def append_line(path: Path, entry: Mapping[str, object], *, sync: bool = False) -> None:
    """Add an entry to a journal.

    Args:
        path: The journal.
        entry: What `json` can write.
        sync: Return once it is on the disk itself: a power cut cannot take it back.

    Raises:
        OSError: No space or no permission; one line.
    """
    line = json.dumps(entry).encode() + b"\n"
    try:
        with path.open("a+b", buffering=0) as file:
            if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
                line = b"\n" + line  # ends the one that a killed process left torn
            if file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if sync:
                os.fsync(file.fileno())
    except OSError as error:
        raise write_error(path, error) from error


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        content = json.loads(line)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def mask(text: str) -> str:
    """`text` with the user and password of every URI in it replaced by `***`."""
    text = re.sub(r"(\w://)[^/\s'\"]*@", r"\1***@", text)
    return re.sub(r"(?i)([?&](?:password|token|secret|key)=)[^&\s]+", r"\1***", text)


def one_line(error: BaseException, *, kind: bool = True) -> str:
    """The first line of an error, or the cause it names, without passwords and not too long.

    Args:
        error: The error.
        kind: Whether its type stands before it; it stands alone where the error says nothing.
    """
    text = str(error).strip().partition("\n")[0].rpartition("Caused by ")[2]
    name = type(error).__name__
    return mask(f"{name}: {text}" if kind and text else text or name)[:_LONGEST]
