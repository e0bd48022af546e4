"""Where a run's folder is kept: in a folder that training writes itself, or at a URL that mirrors one.

For a URL that fsspec can open (`s3://bucket/runs/name`), training works in a folder of its own machine. At
the start that folder gets what it lacks; after each checkpoint what is new goes up: the checkpoint, its hash,
then everything else, `result.json` last. So what lies at the URL is at any moment a run that can be resumed.

Storage that fails costs a warning, never the training. Secrets come from the environment alone, as each kind
of storage reads them: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL and their like.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from cosa.storage import checkpoint
from cosa.storage.files import digest, lock, mask, one_line, write_atomically
from cosa.structures import Ranks

_log = logging.getLogger(__name__)

_RESULT = "result.json"
_ORDER = ("checkpoints", "journal.jsonl", "run.json", "tracking", "config.json")  # in which things go up
_LOCK = ".storage.lock"  # held against this machine's other processes of the run
_NOT_MIRRORED = "ray"  # notes of one attempt on one cluster
_PAUSES = (2.0, 10.0, 30.0)  # seconds between tries to reach storage before training starts
_OUR_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
# Two tries within some 30 s: the defaults of s3fs would have training wait for a dead server for six minutes.
_OPTIONS: dict[str, dict[str, Any]] = {
    "s3": {"config_kwargs": {"retries": {"mode": "standard", "total_max_attempts": 2}}}
}


class StorageError(RuntimeError):
    """Storage does not answer or takes no more; the message is one line that says what lies where."""


@dataclass(frozen=True)
class LocalStorage:
    """A folder that training writes itself: there is nothing to move."""

    folder: Path
    """The run's folder."""
    url: str = ""
    """Nowhere else."""

    def pull(self) -> None:
        """Everything is here."""

    def agree(self, saved: checkpoint.State | None, ranks: Ranks) -> checkpoint.State | None:  # noqa: ARG002
        """All ranks have read the same folder."""
        return saved

    def push(self, *, keep: int) -> None:
        """Everything is where it belongs."""

    def close(self, *, keep: int) -> None:
        """Everything is where it belongs."""


@dataclass
class RemoteStorage:
    """A run kept at a URL, and the folder that it is worked on in; of a run's processes one alone pushes."""

    url: str
    """Where the run is kept."""
    folder: Path
    """The working folder on this machine."""
    _sent: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Size and time of change, by name, of what lies there just as it lies here."""
    _torn: set[str] = field(default_factory=set)
    """Checkpoints that were seen to be torn there."""
    _failure: str = ""
    """Why the last push failed; empty where it did not."""

    @functools.cached_property
    def _there(self) -> tuple[Any, str]:
        """The file system behind the URL, and the run's path in it."""
        protocol = self.url.partition("://")[0]
        try:
            import fsspec  # it and what it loads take a moment: only for those who use it

            options = _OPTIONS.get(protocol, {})
            system, root = fsspec.core.url_to_fs(self.url, use_listings_cache=False, **options)
        except (ImportError, ValueError) as error:
            raise ValueError(
                f"out must be a folder, or a URL that this machine can open, got {self.url!r} "
                f"({one_line(error)}); s3:// needs the extra cosa-wsss[s3]"
            ) from None
        if protocol in _OPTIONS:
            system.retries = 1  # on top of those of the options
        return system, str(root).rstrip("/")

    def _list(self) -> dict[str, int]:
        """Sizes by name of what lies at the URL.

        Raises:
            ValueError: There is no such bucket, or it is not for us.
        """
        system, root = self._there
        try:
            found = system.find(root, detail=True)
        except (FileNotFoundError, PermissionError) as error:
            raise ValueError(
                f"out must lie on storage that exists and is open to you, got {self.url!r} "
                f"({one_line(error)}); make the bucket, or set the keys in the environment"
            ) from None
        names = {path.removeprefix(f"{root}/"): int(facts["size"]) for path, facts in found.items()}
        return {name: size for name, size in names.items() if _is_mirrored(name)}

    def pull(self) -> None:
        """Bring what the working folder lacks; of a machine's processes one does, and the others find it.

        Where the newest whole checkpoint lies at the URL, all else that lies there takes the place of what is
        here; where it lies here, only what is missing comes.

        Raises:
            ValueError: There is no such storage, or it is not for us.
            StorageError: It could not be reached, so that nobody knows whether there is a run to go on with.
            OSError: The working folder cannot be written.
        """
        with lock(self.folder / _LOCK, wait=math.inf):
            for pause in (*_PAUSES, None):
                try:
                    self._pull()
                except ValueError:
                    raise
                except Exception as error:
                    if isinstance(error, OSError) and error.errno in _OUR_DISK:
                        raise
                    if pause is None:
                        raise StorageError(
                            f"storage must answer before training starts, got nothing from {self.url!r} "
                            f"({one_line(error)}); start again when it does, or go on without it in "
                            f"{str(self.folder)!r}"
                        ) from None
                    time.sleep(pause)
                else:
                    return

    def _pull(self) -> None:
        there = self._list()
        draft = self._fetch_newest(there)
        for name in there:
            path = self.folder / name
            if not _is_checkpoint(name) and (draft or not path.is_file()):
                write_atomically(path, self._read(name))
                self._sent[name] = _stamp(path)
        if draft:  # last: until it has its name, a pull that was cut short is done again
            self._install(draft)

    def _fetch_newest(self, there: Mapping[str, int]) -> Path | None:
        """A copy, not yet named so, of the newest whole checkpoint at the URL; None where ours is as new."""
        ours = next((p.name for p in reversed(self._checkpoints()) if checkpoint.is_whole(p)), "")
        for name in sorted(filter(_is_state, there), reverse=True):
            if PurePosixPath(name).name <= ours:
                return None
            draft = self._fetch(name, there)
            if draft:
                return draft
        return None

    def _fetch(self, name: str, there: Mapping[str, int]) -> Path | None:
        """A copy, not yet named so, of a checkpoint at the URL; None where that is torn, with a warning."""
        system, root = self._there
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.part")
        if f"{name}.sha256" in there:
            expected = self._read(f"{name}.sha256")
            system.get_file(f"{root}/{name}", str(draft))
            if digest(draft).encode() == expected[:64]:
                write_atomically(checkpoint.hash_path(path), expected)
                return draft
            draft.unlink()
        self._torn.add(name)
        _log.warning("skipped a checkpoint: %s/%s is torn, not what its hash says", self.url, name)
        return None

    def _install(self, draft: Path) -> None:
        """Give a fetched checkpoint its name."""
        path = draft.with_name(draft.name.removeprefix(".").removesuffix(".part"))
        write_atomically(path, draft.replace)
        for file in (path, checkpoint.hash_path(path)):
            self._sent[file.relative_to(self.folder).as_posix()] = _stamp(file)

    def agree(self, saved: checkpoint.State | None, ranks: Ranks) -> checkpoint.State | None:
        """The newest state that every rank can have, instead of the one that this rank has.

        They differ where a machine has a checkpoint that never went up and that another one therefore lacks.
        """
        if ranks.world == 1:
            return saved
        own = saved["step"] if saved else 0
        steps = torch.zeros(ranks.world, dtype=torch.int64, device=ranks.device)
        steps[ranks.rank] = own
        step = int(ranks.total(steps).min())
        if own == step:
            return saved
        _log.warning("going on from step %d instead of %d, which other machines do not have", step, own)
        path = checkpoint.checkpoint_path(self.folder / "checkpoints", step)
        with lock(self.folder / _LOCK, wait=math.inf):
            for newer in self._checkpoints():  # they will be written again, with their lines of the journal
                if newer > path:
                    checkpoint.hash_path(newer).unlink(missing_ok=True)
                    newer.unlink(missing_ok=True)
            if step and not checkpoint.is_whole(path):
                draft = self._fetch(path.relative_to(self.folder).as_posix(), self._list())
                if draft:
                    self._install(draft)
        return checkpoint.load(path) if step else None

    def push(self, *, keep: int) -> None:
        """Send what is new, and leave the newest `keep` whole checkpoints there; a failure is a warning."""
        try:
            self._push(keep)
        except Exception as error:  # noqa: BLE001 (each kind of storage has errors of its own)
            if not self._failure:
                _log.warning(
                    "storage: %s takes nothing, training goes on and the next checkpoint tries again: %s",
                    self.url,
                    one_line(error),
                )
            self._failure = one_line(error)
        else:
            if self._failure:
                _log.warning("storage: %s answers again and has everything", self.url)
            self._failure = ""

    def _push(self, keep: int) -> None:
        system, root = self._there
        there, here = self._list(), self._here()
        if _RESULT in there and _RESULT not in here:  # the run was finished, and goes on
            system.rm_file(f"{root}/{_RESULT}")
        for name in sorted(here, key=_turn):
            if self._lies_there(name, here[name], there):
                continue
            try:
                system.put_file(str(self.folder / name), f"{root}/{name}")
            except FileNotFoundError:
                if (self.folder / name).exists():
                    raise
                continue  # it was removed in the meantime
            self._sent[name] = here[name]
            self._torn.discard(name)
            there[name] = here[name][0]
        newest = max(filter(_is_state, here), default="")
        whole = [
            name
            for name in sorted(filter(_is_state, there))
            if name <= newest and f"{name}.sha256" in there and name not in self._torn
        ]
        if len(whole) > keep:
            for name in filter(_is_state, there):
                if name < whole[-keep]:
                    for old in {f"{name}.sha256", name} & there.keys():
                        system.rm_file(f"{root}/{old}")

    def _lies_there(self, name: str, stamp: tuple[int, int], there: Mapping[str, int]) -> bool:
        """Whether a file lies at the URL just as it lies here; a checkpoint is known by its hash."""
        if there.get(name) != stamp[0]:
            return False
        if self._sent.get(name) != stamp and _is_state(name) and f"{name}.sha256" in there:
            path = checkpoint.hash_path(self.folder / name)
            if path.is_file() and path.read_bytes() == self._read(f"{name}.sha256"):
                self._sent[name] = stamp
        return self._sent.get(name) == stamp

    def close(self, *, keep: int) -> None:
        """Send what is left of a finished run.

        Raises:
            StorageError: Something did not go up.
        """
        self.push(keep=keep)
        if self._failure:
            left = sum(self._sent.get(name) != stamp for name, stamp in self._here().items())
            raise StorageError(
                f"storage must take the finished run, got {self._failure} from {self.url!r}; {left} files "
                f"did not go up and lie whole in {str(self.folder)!r}: the same command sends them"
            )

    def _read(self, name: str) -> bytes:
        system, root = self._there
        content: bytes = system.cat_file(f"{root}/{name}")
        return content

    def _checkpoints(self) -> list[Path]:
        return checkpoint.existing(self.folder / "checkpoints")

    def _here(self) -> dict[str, tuple[int, int]]:
        """What there is to send, by name, with its size and time of change."""
        found = {}
        for path in self.folder.rglob("*"):
            name = path.relative_to(self.folder).as_posix()
            with contextlib.suppress(FileNotFoundError):  # it may go while we look
                if _is_mirrored(name) and path.is_file():
                    found[name] = _stamp(path)
        return found


Storage = LocalStorage | RemoteStorage


def open_storage(out: Path | str, work_folder: str = "") -> Storage:
    """Where the run that is to be kept at `out` is kept: a folder, or a URL with a working folder for it.

    Nothing is contacted or made yet.

    Args:
        out: Folder or URL.
        work_folder: Working folder for a URL; empty takes one below the current folder.

    Raises:
        ValueError: `out` is a URL that names no folder in a bucket, or carries a secret.
    """
    protocol, separator, rest = str(out).partition("://")
    if not separator:
        if isinstance(out, Path) and re.match(r"[a-z0-9]{2,}:/", str(out)):
            raise ValueError(f"out must be text where it is a URL, got a Path, {str(out)!r}")
        return LocalStorage(Path(out).expanduser().absolute())
    if protocol in {"file", "local"}:
        return LocalStorage(Path(f"/{rest.lstrip('/')}"))
    parts = rest.rstrip("/").split("/")
    if any(mark in rest for mark in "@?#"):
        raise ValueError(
            f"out must be a URL without keys or options, got {mask(str(out))!r}; "
            "they are set in the environment, as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY are"
        )
    if len(parts) < 2 or any(part in {"", ".", ".."} for part in parts):
        raise ValueError(
            f"out must name a folder in a bucket, as s3://bucket/runs/name does, got {str(out)!r}"
        )
    folder = Path(work_folder or Path("runs", protocol, *parts)).absolute()
    return RemoteStorage(f"{protocol}://{'/'.join(parts)}", folder)


def _is_mirrored(name: str) -> bool:
    """Whether a file is part of the run: no hidden one, no lock, no draft, nothing outside of the folder."""
    parts = PurePosixPath(name).parts
    return bool(parts) and parts[0] not in {"/", _NOT_MIRRORED} and not any(p.startswith(".") for p in parts)


def _is_checkpoint(name: str) -> bool:
    return name.startswith("checkpoints/")


def _is_state(name: str) -> bool:
    return re.fullmatch(r"checkpoints/step_\d{8}\.pt", name) is not None


def _turn(name: str) -> tuple[int, str]:
    """The place of a file among what goes up; a checkpoint's name is less than that of its hash."""
    first = PurePosixPath(name).parts[0]
    return (_ORDER.index(first) if first in _ORDER else len(_ORDER) + (name == _RESULT), name)


def _stamp(path: Path) -> tuple[int, int]:
    facts = path.stat()
    return facts.st_size, facts.st_mtime_ns
