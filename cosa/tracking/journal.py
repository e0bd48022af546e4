"""What a run's tracker was told, kept in the run's own folder until the store has it, and as long as the run.

    tracking/journal.jsonl   one entry a line, on the disk before the call that makes it returns
    tracking/texts/          texts that are to be kept as files
    tracking/lock            held by whoever delivers: the run itself, or `cosa-track flush`
    run.json                 the run's id in the store, and how much of the journal is there

An entry holds what the store will be given, moment and all: given twice it is the same, so a store that
may have taken it is simply given it again. Lines are only ever added; a torn one, of a process that was
killed, is passed over. No password is kept.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, BinaryIO, Literal

from cosa.tracking.place import TrackingError

Kind = Literal["open", "metrics", "file", "finish"]

RUN_FILE = "run.json"
"""File in a run's out folder that remembers the id of its tracked run."""
FOLDER = "tracking"
_JOURNAL = f"{FOLDER}/journal.jsonl"
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
"""What a file system says that knows no locks: NFS without its lock service, Lustre without flock."""


@dataclass(frozen=True)
class Entry:
    """A line of a journal."""

    start: int
    """Where it begins, in bytes."""
    end: int
    """Where the next one begins."""
    content: dict[str, Any]
    """Empty for a torn line."""

    @property
    def kind(self) -> Kind | None:
        """What it says; None for a torn line."""
        return self.content.get("kind")


def read_entries(out: Path, start: int = 0, *, most: int | None = None) -> list[Entry]:
    """Whole entries from `start` on, `most` of them at most; none where there is no journal."""
    found: list[Entry] = []
    with contextlib.suppress(FileNotFoundError), (out / _JOURNAL).open("rb") as file:
        file.seek(start)
        for line in file:
            if not line.endswith(b"\n") or len(found) == most:  # the last one may be being written
                break
            found.append(Entry(start, start + len(line), _parsed(line)))
            start += len(line)
    return found


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        content = json.loads(line)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def read_entry(out: Path, start: int) -> Entry:
    """The entry that begins at `start`."""
    return read_entries(out, start, most=1)[0]


def find_journals(folder: Path) -> list[Path]:
    """Out folders in `folder`, itself among them, whose runs have a journal."""
    return sorted(path.parent.parent for path in folder.rglob(_JOURNAL))


class Journal:
    """A run's journal, to be added to."""

    def __init__(self, out: Path) -> None:
        """Open the journal of the run in `out`, or begin one.

        Raises:
            OSError: It cannot be written.
        """
        self.out = out
        self._path = out / _JOURNAL
        self._path.parent.mkdir(parents=True, exist_ok=True)
        entries = read_entries(out)
        self.entries: tuple[Entry, ...] = tuple(entries)
        """What it held when it was opened."""
        self.key = journal_key(entries) or secrets.token_hex(16)
        """Names this journal in the store: a run whose id was never noted is found by it."""
        end = entries[-1].end if entries else 0
        if self._path.is_file() and self._path.stat().st_size > end:
            self._write(b"\n")  # ends the line that a killed process left torn

    def add(self, kind: Kind, **content: object) -> None:
        """Keep an entry, with the time of now in milliseconds.

        Raises:
            OSError: No space, or no permission; one line.
        """
        entry = {"kind": kind, "time": int(time.time() * 1000), **content}
        self._write(json.dumps(entry).encode() + b"\n")

    def _write(self, line: bytes) -> None:
        try:
            with self._path.open("ab", buffering=0) as file:
                if file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file.fileno())
        except OSError as error:
            raise OSError(
                error.errno,
                f"cannot write {str(self._path)!r}: {error.strerror}; free some space there or check its "
                "permissions, then run the same command again",
            ) from error

    def keep_text(self, text: str, name: str) -> Path:
        """Keep a text as a file of the run's folder; a later one of that name takes its place."""
        path = self.out / FOLDER / "texts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_whole(path, text)
        return path


@dataclass
class Account:
    """What a run's store has of its journal, as `run.json` keeps it."""

    run_id: str = ""
    tracking_uri: str = ""
    """Without its password."""
    experiment: str = ""
    key: str = ""
    """Of the journal that the positions belong to."""
    position: int = 0
    """Everything before this byte was delivered, but for what waits."""
    waiting: list[int] = field(default_factory=list)
    """Where the files' entries begin that could not be kept yet."""
    adopted: bool = False
    """The run is older than its journal: the store is asked which steps it has."""


def read_account(out: Path) -> Account:
    """What is noted of the run in `out`; nothing where it was never tracked or the note is torn."""
    try:
        content = json.loads((out / RUN_FILE).read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return Account()
    known = {f.name for f in fields(Account)}
    return Account(**{name: value for name, value in content.items() if name in known})


def current_account(out: Path) -> Account:
    """What is noted of the run in `out`; its id alone where it is not of the journal that is there now."""
    account, key = read_account(out), journal_key(read_entries(out))
    if account.key == key:
        return account
    return Account(run_id=account.run_id, key=key, adopted=bool(account.run_id))


def journal_key(entries: Sequence[Entry]) -> str:
    """The key that a journal of these entries was begun with; empty where there is none yet."""
    return next((str(entry.content["key"]) for entry in entries if entry.kind == "open"), "")


def write_account(out: Path, account: Account) -> None:
    """Note it, whole or not at all."""
    _write_whole(out / RUN_FILE, json.dumps(asdict(account), indent=2) + "\n")


def read_run_id(out: Path) -> str:
    """The id of the tracked run that belongs to an out folder; empty where the store never told it."""
    return read_account(out).run_id


def _write_whole(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)


@dataclass(frozen=True)
class Standing:
    """How far the delivery of a journal is."""

    entries: int
    """Entries in it."""
    left: int
    """Of them not delivered yet."""
    closed: bool
    """Whether the run said how it ended."""


def standing(out: Path) -> Standing:
    """How far the delivery of the journal in `out` is."""
    account, entries = current_account(out), [entry for entry in read_entries(out) if entry.kind]
    last = next((e.kind for e in reversed(entries) if e.kind in {"open", "finish"}), None)
    left = sum(e.start >= account.position for e in entries) + len(account.waiting)
    return Standing(len(entries), left, last == "finish")


class Lock:
    """Whoever holds it may deliver; it ends with its process, however that ends.

    Where the file system knows no locks everybody has it: what is then delivered twice is there once.
    """

    def __init__(self, out: Path) -> None:
        self._path = out / FOLDER / "lock"
        self._file: BinaryIO | None = None

    def acquire(self) -> bool:
        """Take it if it is free, or already ours."""
        if self._file is not None:
            return True
        file = self._path.open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                file.close()
                if isinstance(error, BlockingIOError):
                    return False
                raise
        self._file = file
        return True

    def release(self) -> None:
        """Let go of it."""
        if self._file is not None:
            self._file.close()
            self._file = None


@contextlib.contextmanager
def locked(out: Path, wait: float) -> Iterator[None]:
    """Hold the journal of `out` for delivery.

    Args:
        out: The run's folder.
        wait: Seconds to wait for whoever holds it.

    Raises:
        InUseError: They still do.
    """
    lock, deadline = Lock(out), time.monotonic() + wait
    while not lock.acquire():
        if time.monotonic() >= deadline:
            raise InUseError(f"run must have ended, got one that still delivers by itself in {str(out)!r}")
        time.sleep(0.1)
    try:
        yield
    finally:
        lock.release()


class InUseError(TrackingError):
    """Another process delivers this journal: its run is not over."""
