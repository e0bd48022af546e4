"""A data set as one archive for `data.archive`: the same files make the same bytes, wherever and whenever."""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosa.data.archive import NOTE


@dataclass(frozen=True)
class Packed:
    """What was written."""

    sha256: str
    """Of the archive's bytes."""
    size: int
    """Of the archive, bytes."""
    files: int
    """Files in it."""


def pack(root: Path, out: Path) -> Packed:
    """Write everything below `root` into the tar `out`, whole or not at all; links are followed.

    Nothing is compressed: images are already. Names are sorted, and owners, times and modes left out. Hidden
    files stay behind.

    Raises:
        ValueError: `out` is no .tar, or lies below `root`.
        OSError: A file cannot be read, or `out` not be written.
    """
    if out.suffix != ".tar":
        raise ValueError(f"--out must end in .tar, got {str(out)!r}; images are compressed already")
    if out.absolute().is_relative_to(root.absolute()):
        raise ValueError(f"--out must lie outside of the data set, got {str(out)!r}; choose another folder")
    paths = sorted(_files(root))
    draft = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        with draft.open("wb") as file:
            writer = _Writer(file)
            stream: Any = writer  # all that tarfile asks of a stream is `write`
            with tarfile.open(fileobj=stream, mode="w|") as archive:
                for path in paths:
                    _add(archive, root / path, path)
        draft.replace(out)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    return Packed(writer.digest.hexdigest(), out.stat().st_size, len(paths))


def _files(root: Path) -> Iterator[str]:
    """Names of all files below `root` that are not hidden, from there."""
    for folder, folders, names in os.walk(root, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and name != NOTE:
                yield Path(folder, name).relative_to(root).as_posix()


def _add(archive: tarfile.TarFile, path: Path, name: str) -> None:
    with path.open("rb") as file:
        info = tarfile.TarInfo(name)  # of nobody, from 1970, readable by all
        info.size = os.fstat(file.fileno()).st_size
        archive.addfile(info, file)


class _Writer:
    """Writes on and hashes what goes by."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.digest = hashlib.sha256()

    def write(self, content: bytes) -> None:
        """The next bytes."""
        self.digest.update(content)
        self._file.write(content)
