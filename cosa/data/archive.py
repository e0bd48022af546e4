"""A data set unpacked once per node from an archive: `data.archive` becomes the folder `data.root`.

The archive is a tar, tar.gz or zip on any storage that fsspec opens. Beside the folder lies a hidden one with
a lock, so that of a node's many workers one unpacks and the others wait, and with what is being unpacked. It
gets its name only when all of it is there and its hash is right: a folder called `data.root` is whole,
however often its makers were killed. A note inside it says where it came from.

An archive is somebody else's: it may hold plain files and folders below its own root and nothing else.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from cosa.data.files import locked

_log = logging.getLogger(__name__)

NOTE = ".staged.json"
"""File in an unpacked folder that says which archive it came from."""

_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".zip")
_CHUNK = 2**20  # bytes read at a time
_BROKEN = (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError)
_REMEDY = "make it with cosa-data pack"


class UnreachableArchiveError(RuntimeError):
    """The archive could not be read to its end; another attempt may succeed. The message is one line."""


def stage(archive: str, sha256: str, root: Path) -> None:
    """Make sure that the folder `root` holds what is in the archive; returns at once where it does.

    A folder that is there and was not unpacked by this function is used as it is: somebody put it there.

    Args:
        archive: Path or URL of a tar, tar.gz or zip whose members lie below the data set's folder, or below
            folders that hold nothing else.
        sha256: What the archive's bytes must hash to; empty takes what comes.
        root: Folder on this node.

    Raises:
        FileNotFoundError: There is no such archive.
        ValueError: It is no archive or a torn one, its hash is another, a member does not belong below its
            root, or `root` was unpacked from another archive.
        OSError: The folder cannot be written, or the disk is full.
        UnreachableArchiveError: The storage failed on the way.
    """
    if _is_there(root, archive, sha256):
        return
    workshop = root.with_name(f".{root.name}.staging")
    with locked(workshop, "data.root"):
        if _is_there(root, archive, sha256):  # another process unpacked it while we waited
            return
        for leftover in ("unpacked", "archive.zip"):  # of one that was killed
            _remove(workshop / leftover)
        _log.info("unpacking %s, once on this node, into %s", shown(archive), root)
        try:
            found = _unpack(archive, sha256, workshop)
            note = {"archive": shown(archive), "sha256": found}
            folder = _innermost(workshop / "unpacked")
            (folder / NOTE).write_text(json.dumps(note) + "\n")
            folder.replace(root)
        except OSError as error:
            if error.errno in {errno.ENOSPC, errno.EDQUOT}:
                raise OSError(
                    f"data.root must have room for the data set, got {error.strerror!r} while unpacking "
                    f"{shown(archive)} for {str(root)!r}; make room, or set --data.root to another disk"
                ) from error
            raise
        finally:
            for leftover in ("unpacked", "archive.zip"):
                _remove(workshop / leftover)


def shown(archive: str) -> str:
    """The archive's name for messages: what stands behind a question mark may be a signature."""
    if "://" not in archive:
        return archive
    return urlunsplit(urlsplit(archive)._replace(query="", fragment=""))


def _is_there(root: Path, archive: str, sha256: str) -> bool:
    """Whether `root` is what is asked for; refuses what was unpacked from something else."""
    try:
        note = json.loads((root / NOTE).read_text())
    except (FileNotFoundError, NotADirectoryError):
        return root.is_file() or (root.is_dir() and any(root.iterdir()))
    same = note["sha256"] == sha256.lower() if sha256 else note["archive"] == shown(archive)
    if not same:
        asked = f"{shown(archive)}, sha256 {sha256}" if sha256 else shown(archive)
        raise ValueError(
            f"data.root must hold what is in data.archive ({asked}), got {str(root)!r}, unpacked from "
            f"{note['archive']}, sha256 {note['sha256']}; remove this one, or set --data.root to another"
        )
    return True


def _unpack(archive: str, sha256: str, workshop: Path) -> str:
    """Unpack into `workshop/unpacked`; returns the hash of the archive's bytes."""
    name = PurePosixPath(shown(archive)).name.lower()
    if not name.endswith(_SUFFIXES):
        raise ValueError(
            f"data.archive must end in one of {', '.join(_SUFFIXES)}, got {shown(archive)!r}; {_REMEDY}"
        )
    target = workshop / "unpacked"
    target.mkdir()
    with _opened(archive) as source:
        reader = _Reader(source, archive)
        try:
            if name.endswith(".zip"):
                _unzip(reader, workshop / "archive.zip", target)
            else:
                _untar(reader, target)
        except _BROKEN as error:
            raise ValueError(
                f"data.archive must be a whole archive, got {shown(archive)} ({error}); copy it again, "
                f"or {_REMEDY}"
            ) from error
        found = reader.finish()
    if sha256 and found != sha256.lower():
        raise ValueError(
            f"data.archive must have the sha256 {sha256}, got {found} of {shown(archive)}; "
            "copy it again, or correct data.archive_sha256"
        )
    return found


@contextlib.contextmanager
def _opened(archive: str) -> Iterator[Any]:
    """The archive as a file, from wherever it lies; each storage has a class of its own for that."""
    import fsspec  # it and what it loads take a moment: only where something is to be staged

    try:
        opened: Any = fsspec.open(archive, "rb")
        source = opened.open()
    except (FileNotFoundError, IsADirectoryError) as error:
        raise FileNotFoundError(
            f"data.archive must name an archive, got {shown(archive)!r}, which does not exist; correct it"
        ) from error
    except (ImportError, ValueError, PermissionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"data.archive must be one that this machine can open, got {shown(archive)!r} ({reason})"
        ) from error
    except Exception as error:
        raise _unreachable(archive, error) from error
    with source:
        yield source


def _unreachable(archive: str, error: Exception) -> UnreachableArchiveError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return UnreachableArchiveError(
        f"data.archive must be readable to its end, got {shown(archive)!r} ({reason}); try again later"
    )


class _Reader:
    """Reads the archive from its first byte to its last, once, and hashes what goes by."""

    def __init__(self, source: Any, archive: str) -> None:
        self._source, self._archive = source, archive
        self._digest = hashlib.sha256()

    def read(self, size: int = _CHUNK) -> bytes:
        """The next bytes; empty at the end."""
        try:
            content: bytes = self._source.read(size)
        except Exception as error:  # each kind of storage has errors of its own
            raise _unreachable(self._archive, error) from error
        self._digest.update(content)
        return content

    def finish(self) -> str:
        """Read what an unpacker left over; returns the hash of it all."""
        while self.read():
            pass
        return self._digest.hexdigest()


def _untar(reader: _Reader, target: Path) -> None:
    stream: Any = reader  # all that tarfile asks of a stream is `read`
    with tarfile.open(fileobj=stream, mode="r|*") as archive:
        for member in archive:
            _require_inside(member.name, plain=member.isfile() or member.isdir())
            archive.extract(member, target, filter="data")
        end: Any = archive.fileobj
        if end.tell() < archive.offset + tarfile.BLOCKSIZE:  # an end without the empty block that marks it
            raise tarfile.ReadError("it ends early")


def _unzip(reader: _Reader, copy: Path, target: Path) -> None:
    """A zip's list of members is its end, so that all of it must be here before the first is unpacked."""
    with copy.open("wb") as file:
        while content := reader.read():
            file.write(content)
    with zipfile.ZipFile(copy) as archive:
        for member in archive.infolist():
            kind = stat.S_IFMT(member.external_attr >> 16)  # 0 where it was made without Unix
            _require_inside(member.filename, plain=kind in {0, stat.S_IFREG, stat.S_IFDIR})
            archive.extract(member, target)


def _require_inside(name: str, *, plain: bool) -> None:
    """Refuse a member that would lie, or point, outside of the folder."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(
            f"members of data.archive must lie below its root, got {name!r}; do not unpack it, {_REMEDY}"
        )
    if not plain:
        raise ValueError(
            f"members of data.archive must be plain files and folders, got {name!r}, a link or a device; "
            f"{_REMEDY}, which follows links"
        )


def _innermost(folder: Path) -> Path:
    """The data set in what was unpacked: folders that hold nothing but one folder are its packing."""
    while True:
        held = list(folder.iterdir())
        if not held:
            raise ValueError(f"data.archive must hold a data set, got an empty one; {_REMEDY}")
        if len(held) > 1 or not held[0].is_dir():
            return folder
        folder = held[0]


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()
