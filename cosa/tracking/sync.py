"""From a run's journal to its store: in order, each entry once, whatever dies in between.

Everything given carries the moment it was noted, so giving it again changes nothing: MLflow keeps a metric's
value under its name, step and moment. A run is made once because it carries its journal's key as a tag and is
looked for by it first. A file that cannot be kept holds nothing else up; it waits for another attempt.
"""

from __future__ import annotations

import itertools
import math
import os
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cosa.storage.files import mask, one_line
from cosa.tracking.journal import (
    Account,
    Entry,
    Journal,
    current_account,
    locked,
    read_entries,
    read_entry,
    read_run_id,
    standing,
    write_account,
)
from cosa.tracking.place import RunGoneError, resolve_uri
from cosa.tracking.store import connect, environment, experiment_id, explained, find_run

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
else:
    MlflowClient = Run = Any  # their import takes seconds; tests check annotations as the program runs

T = TypeVar("T")

KEY_TAG = "cosa.run_key"
"""Names the journal that a run was delivered from."""
_METRICS_PER_CALL = 1000
_OTHERS_PER_CALL = 100
_ENTRIES_AT_ONCE = 500
_FILES_PAUSE = 30.0
"""Seconds until a file that could not be kept is tried again."""

# What the store says of an entry that it will never take; all else may pass.
_REFUSALS = frozenset({"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "INVALID_STATE"})


class Delivery:
    """Delivers one run's journal; only whoever holds its lock has one."""

    def __init__(self, out: Path, uri: str) -> None:
        """Remember both; the store is not met before `run`."""
        self.account = current_account(out)
        self.notes: deque[str] = deque()
        """What the user is to know of, to be taken from here."""
        self._out = out
        self._uri = uri
        self._client: MlflowClient | None = None
        self._last_steps: dict[str, int] = {}
        self._files_again = -math.inf

    def run(self, *, all_files: bool = False) -> None:
        """Deliver all that the journal holds by now.

        Args:
            all_files: Try the files that wait at once, not only after a pause.

        Raises:
            TrackingError: The store does not answer, or has the run no more; `account` says how far we came.
        """
        with explained(self._uri):
            while entries := read_entries(self._out, self.account.position, most=_ENTRIES_AT_ONCE):
                self._deliver(entries)
            if self.account.waiting and (all_files or time.monotonic() >= self._files_again):
                self._files_again = time.monotonic() + _FILES_PAUSE
                for start in tuple(self.account.waiting):
                    self.account.waiting.remove(start)
                    self._keep_file(self._connected(), read_entry(self._out, start))
                    write_account(self._out, self.account)

    def _connected(self) -> MlflowClient:
        if self._client is None:
            self._client = connect(self._uri)
        return self._client

    def _deliver(self, entries: Sequence[Entry]) -> None:
        for group in _grouped(entries):
            client = self._connected()
            if group[0].kind == "open":
                if not self._open(client, group[0]):
                    return  # the run is gone: a new one gets it all, from the first entry on
            elif group[0].kind is not None:
                self._send(client, group)
            self.account.position = group[-1].end
            write_account(self._out, self.account)

    def _send(self, client: MlflowClient, group: Sequence[Entry]) -> None:
        """Give the store a group of entries of one kind; one that it refuses is left out, and told of."""
        from mlflow.exceptions import MlflowException

        try:
            match group[0].kind:
                case "metrics":
                    self._write_metrics(client, group)
                case "file":
                    self._keep_file(client, group[0])
                case "finish":
                    self._finish(client, group[0])
        except MlflowException as error:
            if error.error_code not in _REFUSALS:
                raise
            if find_run(client, self.account.run_id) is None:
                raise RunGoneError(
                    f"run {self.account.run_id} must be in {mask(self._uri)}, got none or a deleted one; "
                    "restore it with `mlflow runs restore`, or name the store that has it"
                ) from None
            if len(group) == 1:
                self.notes.append(f"an entry was refused and left out: {one_line(error, kind=False)}")
            else:  # the others are not to blame
                for entry in group:
                    self._send(client, [entry])

    def _open(self, client: MlflowClient, entry: Entry) -> bool:
        """Make the run of this journal, or reopen it; False where it is gone and another is to be made."""
        said, account = entry.content, self.account
        account.tracking_uri, account.experiment = mask(self._uri), said["experiment"]
        run = find_run(client, account.run_id) if account.run_id else None
        if run is None and account.run_id:
            self.account = Account(key=said["key"])
            return False
        if run is None:
            experiment = experiment_id(client, self._uri, said["experiment"])
            run = next(iter(self._runs_of(client, experiment)), None)
            made = run or self._create(client, experiment, said)
        else:
            made = run
        if run is not None:
            client.update_run(run.info.run_id, status="RUNNING")
            _log_tags(client, run.info.run_id, {**said["tags"], KEY_TAG: said["key"]})
        account.run_id = made.info.run_id
        write_account(self._out, account)
        _log_params(client, account.run_id, said["params"], made.data.params)
        return True

    def _create(self, client: MlflowClient, experiment: str, said: Mapping[str, Any]) -> Run:
        """A new run. MLflow's own second try is switched off: the first may have made the run already."""
        system = {"mlflow.parentRunId": said["parent"]} if said["parent"] else {}
        tags = {**said["tags"], **system, KEY_TAG: said["key"]}
        with environment(MLFLOW_HTTP_REQUEST_MAX_RETRIES="0"):
            return client.create_run(experiment, run_name=said["name"], tags=tags, start_time=said["time"])

    def _runs_of(self, client: MlflowClient, experiment: str) -> Sequence[Run]:
        key = self.account.key
        return client.search_runs([experiment], f"tags.`{KEY_TAG}` = '{key}'")

    def _write_metrics(self, client: MlflowClient, group: Sequence[Entry]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(name, value, entry.content["time"], entry.content["step"])
            for entry in group
            for name, value in entry.content["metrics"].items()
            if not self.account.adopted or entry.content["step"] > self._last_step(client, name)
        ]
        for part in _parts(metrics, _METRICS_PER_CALL):
            client.log_batch(self.account.run_id, metrics=part)
        tags = {key: text for entry in group for key, text in entry.content["tags"].items()}
        _log_tags(client, self.account.run_id, tags)

    def _last_step(self, client: MlflowClient, name: str) -> int:
        """The last step that a run had of a metric before its journal was begun, -1 for none."""
        if name not in self._last_steps:
            history = client.get_metric_history(self.account.run_id, name)
            self._last_steps[name] = max((point.step for point in history), default=-1)
        return self._last_steps[name]

    def _keep_file(self, client: MlflowClient, entry: Entry) -> None:
        """Keep a copy of a file; one that is there but cannot be kept now waits."""
        path = self._out / entry.content["path"]
        if not path.is_file():
            self.notes.append(f"a file could not be kept and was left out: {str(path)!r} is gone")
            return
        try:
            client.log_artifact(self.account.run_id, str(path), entry.content["folder"] or None)
        except Exception as error:  # noqa: BLE001 (each kind of artifact store fails in a way of its own)
            if not self.account.waiting:
                self.notes.append(f"a file waits to be kept, {path.name!r}: {one_line(error, kind=False)}")
            self.account.waiting.append(entry.start)

    def _finish(self, client: MlflowClient, entry: Entry) -> None:
        """Close the run. One more that was made by a request thought to be lost is removed."""
        own = self.account.run_id
        run = find_run(client, own)
        for double in self._runs_of(client, run.info.experiment_id) if run else ():
            if double.info.run_id != own and not double.data.metrics:
                client.delete_run(double.info.run_id)
        client.set_terminated(own, entry.content["status"], end_time=entry.content["time"])


def _grouped(entries: Sequence[Entry]) -> Iterator[Sequence[Entry]]:
    """Metrics that follow each other together, everything else alone."""
    for kind, group in itertools.groupby(entries, key=lambda entry: entry.kind):
        if kind == "metrics":
            yield list(group)
        else:
            yield from ([entry] for entry in group)


def _log_params(
    client: MlflowClient, run_id: str, params: Mapping[str, str], known: Mapping[str, str]
) -> None:
    from mlflow.entities import Param

    new = [Param(name, value) for name, value in params.items() if name not in known]
    for part in _parts(new, _OTHERS_PER_CALL):
        client.log_batch(run_id, params=part)


def _log_tags(client: MlflowClient, run_id: str, tags: Mapping[str, str]) -> None:
    from mlflow.entities import RunTag

    for part in _parts([RunTag(key, value) for key, value in tags.items()], _OTHERS_PER_CALL):
        client.log_batch(run_id, tags=part)


def _parts(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[i : i + size] for i in range(0, len(items), size))


@dataclass(frozen=True)
class Flushed:
    """What delivering a dead run's journal came to."""

    run_id: str
    """The run's id in the store."""
    delivered: int
    """Entries that went now."""
    left: int
    """Entries that did not."""
    notes: tuple[str, ...]
    """What was left out or waits, and why."""


def flush(out: Path, uri: str = "", *, wait: float = 5.0) -> Flushed:
    """Deliver what a run that has ended left in its journal; one that did not say how it ended is KILLED.

    Args:
        out: The run's folder.
        uri: Tracking URI; by default the one it was tracked in.
        wait: Seconds to wait for a process of the run that is about to end.

    Raises:
        InUseError: The run has not ended: it delivers by itself.
        TrackingError: The store does not answer, or has the run no more.
        ValueError: The store's URI has a password, which is not kept and was not given.
    """
    kept, before = kept_uri(out), standing(out)
    if not kept or (before.left == 0 and before.closed):
        return Flushed(read_run_id(out), 0, 0, ())
    with locked(out, wait):
        if not standing(out).closed:
            Journal(out).add("finish", status="KILLED")
        before = standing(out)
        resolved = resolve_uri(uri) if uri else _with_password(out, kept)
        delivery = Delivery(out, resolved)
        if delivery.account.run_id and mask(resolved) != kept:  # moved, or a mistake
            with explained(resolved):
                if find_run(connect(resolved), delivery.account.run_id) is None:
                    raise RunGoneError(
                        f"tracking URI must be that of the run in {str(out)!r}, {kept}, "
                        f"got {mask(resolved)}, which does not have it"
                    )
        delivery.run(all_files=True)
    after = standing(out)
    return Flushed(delivery.account.run_id, before.left - after.left, after.left, tuple(delivery.notes))


def kept_uri(out: Path) -> str:
    """The tracking URI of the run in `out`, without its password; empty where it has no journal."""
    opened = [entry for entry in read_entries(out) if entry.kind == "open"]
    return str(opened[-1].content["uri"]) if opened else ""


def _with_password(out: Path, kept: str) -> str:
    """The whole URI: a password is not kept, but may be in the environment."""
    if "***" not in kept:
        return kept
    given = os.environ.get("MLFLOW_TRACKING_URI", "")
    if mask(given) != kept:
        raise ValueError(
            f"tracking URI of the run in {str(out)!r} has a password, which is not kept: set --tracking-uri "
            f"or MLFLOW_TRACKING_URI, got {mask(given) or 'neither'} for {kept}"
        )
    return given
