"""A data set as one archive, unpacked once per node: `data.archive` becomes the folder `data.root`.

The archive is a tar, tar.gz or zip on any storage that fsspec opens. Beside the folder lies a hidden one with
a lock, so that of a node's many workers one unpacks and the others wait, with a copy of the archive, and with
what is being unpacked. It gets its name only when all of it is there: a folder called `data.root` is whole,
however often its makers were killed. A note inside it says where it came from.

An archive is somebody else's: it may hold plain files and folders below its own root and nothing else.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import stat
import tarfile
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import Any

from cosa.data.files import once
from cosa.storage.files import digest, one_line

_log = logging.getLogger(__name__)

NOTE = ".staged.json"
"""File in an unpacked folder that says which archive it came from."""

_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".zip")
_BROKEN = (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError)
_FULL = {errno.ENOSPC, errno.EDQUOT}
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
    workshop = root.with_name(f".{root.name}.staging")
    once(
        lambda: _is_there(root, archive, sha256),
        lambda: _unpack(archive, sha256, root, workshop / "parts"),
        workshop,
        "data.root",
    )


def _unpack(archive: str, sha256: str, root: Path, parts: Path) -> None:
    shutil.rmtree(parts, ignore_errors=True)  # of one that was killed
    copy, unpacked = parts / "archive", parts / "unpacked"
    _log.info("unpacking %s, once on this node, into %s", shown(archive), root)
    try:
        unpacked.mkdir(parents=True)
        note = {"archive": shown(archive), "sha256": _fetch(archive, sha256, copy)}
        extract = _unzip if shown(archive).lower().endswith(".zip") else _untar
        extract(copy, unpacked)
        folder = _innermost(unpacked)
        (folder / NOTE).write_text(json.dumps(note) + "\n")
        folder.replace(root)
    except _BROKEN as error:
        raise ValueError(
            f"data.archive must be a whole archive, got {shown(archive)} ({error}); copy it again, "
            f"or {_REMEDY}"
        ) from error
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise OSError(
            f"data.root must have room for the data set, got {error.strerror!r} while unpacking "
            f"{shown(archive)} for {str(root)!r}; make room, or set --data.root to another disk"
        ) from error
    finally:
        shutil.rmtree(parts, ignore_errors=True)


def shown(archive: str) -> str:
    """The archive's name for messages: what stands behind a question mark may be a signature."""
    return re.split("[?#]", archive)[0] if "://" in archive else archive


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


def _fetch(archive: str, sha256: str, copy: Path) -> str:
    """Copy the archive here, from wherever it lies; returns its hash, which must be the one asked for."""
    import fsspec  # it and what it loads take a moment: only where something is to be staged

    if not shown(archive).lower().endswith(_SUFFIXES):
        raise ValueError(
            f"data.archive must end in one of {', '.join(_SUFFIXES)}, got {shown(archive)!r}; {_REMEDY}"
        )
    try:
        system, path = fsspec.core.url_to_fs(archive)
        system.get_file(path, str(copy))
        if copy.is_dir():
            raise IsADirectoryError(archive)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise FileNotFoundError(
            f"data.archive must name an archive, got {shown(archive)!r}, which does not exist; correct it"
        ) from error
    except (ImportError, ValueError, PermissionError) as error:
        raise ValueError(
            f"data.archive must be one that this machine can open, got {shown(archive)!r} "
            f"({one_line(error, kind=False)})"
        ) from error
    except Exception as error:  # each kind of storage has errors of its own
        if isinstance(error, OSError) and error.errno in _FULL:
            raise
        raise UnreachableArchiveError(
            f"data.archive must be readable to its end, got {shown(archive)!r} "
            f"({one_line(error, kind=False)}); try again later"
        ) from error
    found = digest(copy)
    if sha256 and found != sha256.lower():
        raise ValueError(
            f"data.archive must have the sha256 {sha256}, got {found} of {shown(archive)}; "
            "copy it again, or correct data.archive_sha256"
        )
    return found


def _untar(copy: Path, target: Path) -> None:
    with tarfile.open(copy, "r|*") as archive:
        if hasattr(tarfile, "data_filter"):  # from Python 3.11.4 on
            archive.extraction_filter = tarfile.data_filter
        for member in archive:
            _require_inside(member.name, plain=member.isfile() or member.isdir())
            member.mode = 0o755 if member.isdir() else 0o644
            member.uid, member.gid, member.uname, member.gname = os.getuid(), os.getgid(), "", ""
            archive.extract(member, target)
        end: Any = archive.fileobj
        if end.tell() < archive.offset + tarfile.BLOCKSIZE:  # an end without the empty block that marks it
            raise tarfile.ReadError("it ends early")


def _unzip(copy: Path, target: Path) -> None:
    with zipfile.ZipFile(copy) as archive:
        for member in archive.infolist():
            kind = stat.S_IFMT(member.external_attr >> 16)  # 0 where it was made without Unix
            _require_inside(member.filename, plain=kind in {0, stat.S_IFREG, stat.S_IFDIR})
            archive.extract(member, target)


def _require_inside(name: str, *, plain: bool) -> None:
    """Refuse a member that would lie, or point, outside of the folder."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not plain:
        law = "lie below its root" if plain else "be plain files and folders, no links or devices"
        raise ValueError(
            f"members of data.archive must {law}, got {name!r}; do not unpack it, {_REMEDY}: it follows links"
        )


def _innermost(folder: Path) -> Path:
    """The data set in what was unpacked: folders that hold nothing but one folder are its packing."""
    held = list(folder.iterdir())
    if not held:
        raise ValueError(f"data.archive must hold a data set, got an empty one; {_REMEDY}")
    return _innermost(held[0]) if len(held) == 1 and held[0].is_dir() else folder


def pack(root: Path, out: Path) -> int:
    """Write everything below `root` into the tar `out`, whole or not at all; links are followed.

    Nothing is compressed: images are already. Names are sorted, and owners, times and modes left out: the
    same files make the same bytes. Hidden files stay behind.

    Returns:
        The number of files in it.

    Raises:
        ValueError: `out` is no .tar, or lies below `root`.
        OSError: A file cannot be read, or `out` not be written.
    """
    if out.suffix != ".tar":
        raise ValueError(f"--out must end in .tar, got {str(out)!r}; images are compressed already")
    if out.absolute().is_relative_to(root.absolute()):
        raise ValueError(f"--out must lie outside of the data set, got {str(out)!r}; choose another folder")
    paths = (Path(folder, name) for folder, _, files in os.walk(root, followlinks=True) for name in files)
    names = sorted(path.relative_to(root).as_posix() for path in paths)
    names = [name for name in names if not any(part.startswith(".") for part in name.split("/"))]
    draft = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        with tarfile.open(draft, "w") as archive:
            for name in names:
                with (root / name).open("rb") as file:
                    member = tarfile.TarInfo(name)  # of nobody, from 1970, readable by all
                    member.size = os.fstat(file.fileno()).st_size
                    archive.addfile(member, file)
        draft.replace(out)
    finally:
        draft.unlink(missing_ok=True)
    return len(names)
