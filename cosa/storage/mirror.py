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

from cosa.storage import checkpoint
from cosa.storage.files import digest, lock, mask, one_line, write_atomically
from cosa.structures import Ranks

_log = logging.getLogger(__name__)

_RESULT = "result.json"
_LOCK = ".storage.lock"  # held against this machine's other processes of the run
_NOT_MIRRORED = "ray"  # notes of one attempt on one cluster
_PAUSES = (2.0, 10.0, 30.0)  # seconds between tries to reach storage before training starts
_OUR_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}


class StorageError(RuntimeError):
    """Storage does not answer or takes no more; the message is one line that says what lies where."""


@dataclass
class Storage:
    """A run's folder on this machine and, where it has a URL, its mirror; of a run's processes one pushes."""

    folder: Path
    """The folder that training writes."""
    url: str = ""
    """Where the run is kept; empty where that is the folder itself, and nothing is to be moved."""
    _sent: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Size and time of change, by name, of what lies there just as it lies here."""
    _failure: str = ""
    """Why the last push failed; empty where it did not."""

    def pull(self) -> None:
        """Bring what the folder lacks; of a machine's processes one does, and the others find it.

        Where the newest whole checkpoint lies at the URL, all else that lies there takes the place of what is
        here; where it lies here, only what is missing comes.

        Raises:
            ValueError: There is no such storage, or it is not for us.
            StorageError: It could not be reached, so that nobody knows whether there is a run to go on with.
            OSError: The folder cannot be written.
        """
        if not self.url:
            return
        with lock(self.folder / _LOCK, wait=math.inf):
            for pause in (*_PAUSES, None):
                try:
                    self._pull()
                    return
                except Exception as error:
                    if isinstance(error, ValueError) or getattr(error, "errno", None) in _OUR_DISK:
                        raise
                    if pause is None:
                        raise StorageError(
                            f"storage must answer before training starts, got nothing from {self.url!r} "
                            f"({one_line(error)}); start again when it does, or go on without it in "
                            f"{str(self.folder)!r}"
                        ) from None
                    time.sleep(pause)

    def _pull(self) -> None:
        there = self._list()
        here = self._here()
        for name in filter(_is_state, here):
            hashed = f"{name}.sha256"  # by which a checkpoint that an earlier process sent is known
            if hashed in there and (self.folder / hashed).read_bytes() == self._files.cat_file(hashed):
                self._sent[name] = here[name]
        whole = filter(checkpoint.is_whole, reversed(checkpoint.existing(self.folder / "checkpoints")))
        ours = next((f"checkpoints/{path.name}" for path in whole), "")
        newer = (name for name in sorted(there, reverse=True) if _is_state(name) and name > ours)
        newest = next((name for name in newer if self._bring_checkpoint(name, there)), "")
        for name in there:
            if not name.startswith("checkpoints/") and (newest or not (self.folder / name).is_file()):
                self._bring(name)
        if newest:  # last: until it is whole here, a pull that was cut short is done again
            self._bring(f"{newest}.sha256")

    def _bring_checkpoint(self, name: str, there: Mapping[str, int]) -> bool:
        """Bring a checkpoint, not yet its hash; False where it is torn there, with a warning."""
        path = self.folder / name
        checkpoint.remove(path)  # one that is torn here
        path.parent.mkdir(parents=True, exist_ok=True)
        if f"{name}.sha256" in there:
            self._files.get_file(name, str(path))
            if digest(path).encode() == self._files.cat_file(f"{name}.sha256")[:64]:
                self._sent[name] = _stamp(path)
                return True
            path.unlink()
        _log.warning("skipped a checkpoint: %s/%s is torn, not what its hash says", self.url, name)
        return False

    def _bring(self, name: str) -> None:
        write_atomically(self.folder / name, self._files.cat_file(name))
        self._sent[name] = _stamp(self.folder / name)

    def agree(self, saved: checkpoint.State | None, ranks: Ranks) -> checkpoint.State | None:
        """The newest state that every rank can have, instead of the one that this rank has.

        They differ where a machine has a checkpoint that never went up and that another one therefore lacks.
        """
        if not self.url:
            return saved
        own = saved["step"] if saved else 0
        step = min(ranks.gather(own))
        if own == step:
            return saved
        _log.warning("going on from step %d instead of %d, which other machines do not have", step, own)
        path = checkpoint.checkpoint_path(self.folder / "checkpoints", step)
        # Newer ones will be written again, with their lines of the journal.
        for newer in checkpoint.existing(path.parent):
            if newer > path:
                checkpoint.remove(newer)
        if not step:
            return None
        self.pull()
        return checkpoint.load(path)

    def push(self, *, keep: int) -> None:
        """Send what is new; of older checkpoints the newest `keep` stay there. A failure is a warning."""
        if not self.url:
            return
        failure = ""
        try:
            self._push(keep)
        except Exception as error:  # noqa: BLE001 (each kind of storage has errors of its own)
            failure = one_line(error)
        if failure and not self._failure:
            again = "training goes on and the next checkpoint tries again"
            _log.warning("storage: %s takes nothing, %s: %s", self.url, again, failure)
        if self._failure and not failure:
            _log.warning("storage: %s answers again and has everything", self.url)
        self._failure = failure

    def _push(self, keep: int) -> None:
        """Send what does not lie there just as it lies here; a file there may be lost or cut since."""
        there, here = self._list(), self._here()
        if _RESULT in there and _RESULT not in here:  # the run was finished, and goes on
            self._files.rm_file(_RESULT)
        for name in sorted(here, key=_turn):
            if there.get(name) != here[name][0] or self._sent.get(name) != here[name]:
                try:
                    self._files.put_file(str(self.folder / name), name)
                    self._sent[name] = here[name]
                except FileNotFoundError:
                    if (self.folder / name).exists():  # else it was removed in the meantime
                        raise
        kept = sorted(filter(_is_state, here))[-keep:]
        for name in there if len(kept) == keep else ():
            if name < kept[0] and _is_state(name.removesuffix(".sha256")):
                self._files.rm_file(name)

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

    @functools.cached_property
    def _files(self) -> Any:
        """What lies at the URL, as a file system of its own."""
        # Two tries within some 30 s: by default s3fs would have training wait for a dead server for minutes.
        retries = {"mode": "standard", "total_max_attempts": 2}
        s3 = self.url.startswith("s3://")
        options: dict[str, Any] = {"config_kwargs": {"retries": retries}} if s3 else {}
        try:
            import fsspec  # it and what it loads take a moment: only for those who use it

            system, root = fsspec.core.url_to_fs(self.url, use_listings_cache=False, **options)
        except (ImportError, ValueError) as error:
            raise ValueError(
                f"out must be a folder, or a URL that this machine can open, got {self.url!r} "
                f"({one_line(error)}); s3:// needs the extra cosa-wsss[s3]"
            ) from None
        if s3:
            system.retries = 1  # on top of those two
        return fsspec.filesystem("dir", path=root, fs=system)

    def _list(self) -> dict[str, int]:
        """Sizes by name of what lies at the URL.

        Raises:
            ValueError: There is no such bucket, or it is not for us.
        """
        try:
            found = self._files.find("", detail=True)
        except (FileNotFoundError, PermissionError) as error:
            raise ValueError(
                f"out must lie on storage that exists and is open to you, got {self.url!r} "
                f"({one_line(error)}); make the bucket, or set the keys in the environment"
            ) from None
        return {name: int(facts["size"]) for name, facts in found.items() if _is_mirrored(name)}

    def _here(self) -> dict[str, tuple[int, int]]:
        """What there is to send, by name, with size and time of change; no checkpoint without its hash."""
        found = {}
        for path in self.folder.rglob("*"):
            name = path.relative_to(self.folder).as_posix()
            with contextlib.suppress(FileNotFoundError):  # it may go while we look
                if _is_mirrored(name) and path.is_file():
                    found[name] = _stamp(path)
        return {name: found[name] for name in found if not _is_state(name) or f"{name}.sha256" in found}


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
        return Storage(Path(out).expanduser().absolute())
    if protocol in {"file", "local"}:
        return Storage(Path(f"/{rest.lstrip('/')}"))
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
    return Storage(folder, f"{protocol}://{'/'.join(parts)}")


def _is_mirrored(name: str) -> bool:
    """Whether a file is part of the run: no hidden one, no lock, no draft, nothing outside of the folder."""
    parts = PurePosixPath(name).parts
    return bool(parts) and parts[0] not in {"/", _NOT_MIRRORED} and not any(p.startswith(".") for p in parts)


def _is_state(name: str) -> bool:
    return re.fullmatch(r"checkpoints/step_\d{8}\.pt", name) is not None


def _turn(name: str) -> tuple[bool, bool, bool, str]:
    """The place of a file among what goes up; a checkpoint's name is less than that of its hash.

    What counts the bytes of the journal goes before it: a journal that has grown since is read on.
    """
    counts = name == "run.json" or name.startswith("tracking/")
    return (not name.startswith("checkpoints/"), name == _RESULT, not counts, name)


def _stamp(path: Path) -> tuple[int, int]:
    facts = path.stat()
    return facts.st_size, facts.st_mtime_ns
