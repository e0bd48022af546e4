"""From a run's journal to its store: in order, each entry once, whatever dies in between.

An entry carries the moment it was told, so giving it again changes nothing: MLflow keeps a metric's value
under its name, step and moment. A run is made once because it carries its journal's key as a tag and is
looked for by it first. A file that cannot be kept holds nothing else up; it waits for another attempt.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
import queue
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosa.storage.files import InUseError, lock, mask, one_line
from cosa.tracking import store
from cosa.tracking.journal import (
    JOURNAL,
    LOCK,
    ODD_TAG,
    REWOUND,
    Entry,
    SyncState,
    SyncStatus,
    add_entry,
    first_open,
    last_step,
    read_entries,
    read_run_id,
    read_state,
    sync_status,
    write_state,
)
from cosa.tracking.store import RunGoneError, TrackingError, explained, find_run

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param, Run

KEY_TAG = "cosa.run_key"
"""Names the journal that a run was delivered from."""
_ENTRIES_AT_ONCE = 500
_PAUSE = 2.0
"""Seconds between two attempts; after a failure twice as long each time, up to the longest."""
_LONGEST_PAUSE = 30.0
_REFUSALS = frozenset({"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "INVALID_STATE"})
"""What the store says of an entry that it will never take; all else may pass."""


class StillRunningError(TrackingError):
    """The run has not ended: it syncs by itself."""


class RunSync:
    """Brings the store up to what one run was told; only whoever holds the run's lock has one."""

    def __init__(self, out: Path, uri: str, notes: deque[str]) -> None:
        """Remember them; the store is not met before `run`. `notes` gets what the user is to know of."""
        self.state = read_state(out)
        self._out = out
        self._uri = uri
        self._notes = notes

    @functools.cached_property
    def _client(self) -> MlflowClient:
        return store.connect(self._uri)

    def run(self) -> None:
        """Give the store all that the run was told by now.

        Raises:
            TrackingError: The store does not answer, or has the run no more; `state` says how far we came.
        """
        with explained(self._uri):
            late = len(self.state.waiting)  # those that begin to wait now wait for another attempt
            while self._give_some():
                pass
            for _ in range(min(late, len(self.state.waiting))):
                self._keep_file(**self.state.waiting.pop(0))
                write_state(self._out, self.state)

    def _give_some(self) -> bool:
        """Give the next entries, first of those that left the journal; False where there are none."""
        state, out = self.state, self._out
        rewound = list(itertools.islice(read_entries(out / REWOUND, state.rewound), _ENTRIES_AT_ONCE))
        entries = rewound or list(
            itertools.islice(read_entries(out / JOURNAL, state.journal), _ENTRIES_AT_ONCE)
        )
        if not entries:
            return False
        if rewound or not state.journal:  # the run may not be made yet, or be gone
            opened = first_open(out)
            assert opened is not None, "a run that was never tracked has nothing to give"
            if entries[0].kind != "open" and not self._open(opened):
                return True
        for _, run in itertools.groupby(entries, key=lambda entry: entry.kind == "metrics" or entry.end):
            group = list(run)  # metrics that follow each other, or one entry of another kind
            if group[0].kind == "open" and not self._open(group[0].content):
                return True  # a new run gets it all, from the first entry on
            self._send(group)
            if rewound:
                state.rewound = group[-1].end
                state.journal = min(state.journal, *(entry.content.get("at", 0) for entry in group))
            else:
                state.journal = group[-1].end
            write_state(out, state)
        return True

    def _send(self, group: Sequence[Entry]) -> None:
        """Give the store a group of entries of one kind; one that it refuses is left out, and told of."""
        from mlflow.exceptions import MlflowException

        content = group[0].content
        try:
            match group[0].kind:
                case "metrics":
                    self._write_metrics(group)
                case "file":
                    self._keep_file(content["path"], content["folder"])
                case "data":
                    self._name_data(content["datasets"])
                case "tags":
                    self._log(tags=content["tags"])
                case "finish":
                    self._finish(content)
        except MlflowException as error:
            if error.error_code not in _REFUSALS:
                raise
            if find_run(self._client, self.state.run_id) is None:
                raise RunGoneError(
                    f"run {self.state.run_id} must be in {mask(self._uri)}, got none or a deleted one; "
                    "restore it with `mlflow runs restore`, or name the store that has it"
                ) from None
            if len(group) == 1:
                self._notes.append(f"an entry was refused and left out: {one_line(error, kind=False)}")
            else:  # the others are not to blame
                for entry in group:
                    self._send([entry])

    def _open(self, told: Mapping[str, Any]) -> bool:
        """Make the run of this journal, or reopen it; False where it is gone and another is to be made."""
        from mlflow.entities import Param

        client, state = self._client, self.state
        state.tracking_uri = mask(self._uri)
        tags = {**told["tags"], KEY_TAG: state.key}
        run = find_run(client, state.run_id)
        if run is None and state.run_id:
            self.state = SyncState(key=state.key)
            return False
        if run is None:
            experiment = store.initialise_store(self._uri, told["experiment"])
            run = next(iter(self._runs_of(experiment)), None)
        if run is None:
            system = {"mlflow.parentRunId": told["parent"]} if told["parent"] else {}
            with store.environment(MLFLOW_HTTP_REQUEST_MAX_RETRIES="0"):  # the first may have made it
                run = client.create_run(
                    experiment, run_name=told["name"], tags=tags | system, start_time=told["time"]
                )
        state.run_id = run.info.run_id
        write_state(self._out, state)
        if run.info.status != "RUNNING":
            client.update_run(state.run_id, status="RUNNING")
        new = [Param(name, value) for name, value in told["params"].items() if name not in run.data.params]
        self._log(params=new, tags=tags)
        return True

    def _runs_of(self, experiment: str) -> Sequence[Run]:
        return self._client.search_runs([experiment], f"tags.`{KEY_TAG}` = '{self.state.key}'")

    def _write_metrics(self, group: Sequence[Entry]) -> None:
        """Give metrics; of a value that is not finite the first is kept as a tag, see MlflowTracker."""
        from mlflow.entities import Metric

        metrics: list[Metric] = []
        odd: dict[str, str] = {}
        for entry in group:
            step = entry.content["step"]
            for name, value in entry.metrics.items():
                if math.isfinite(value):
                    metrics.append(Metric(name, value, entry.content["time"], step))
                else:
                    odd.setdefault(f"{ODD_TAG}{name}", f"{value} at step {step}")
        known = self._client.get_run(self.state.run_id).data.tags if odd else {}
        self._log(metrics=metrics, tags={tag: text for tag, text in odd.items() if tag not in known})

    def _name_data(self, datasets: Sequence[Mapping[str, str]]) -> None:
        """Name the data that the run reads as inputs; those that it has already stay."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = [
            DatasetInput(
                Dataset(known["name"], known["digest"], known["source_type"], known["source"]),
                [InputTag("mlflow.data.context", known["context"])],
            )
            for known in datasets
        ]
        self._client.log_inputs(self.state.run_id, inputs)

    def _log(
        self, *, metrics: Sequence[Metric] = (), params: Sequence[Param] = (), tags: Mapping[str, str]
    ) -> None:
        """Give what may be more than MLflow takes in one request."""
        from mlflow.entities import RunTag

        left = [RunTag(name, text) for name, text in tags.items()]
        while metrics or params or left:
            self._client.log_batch(self.state.run_id, metrics[:800], params[:100], left[:100])
            metrics, params, left = metrics[800:], params[100:], left[100:]

    def _keep_file(self, path: str, folder: str) -> None:
        """Keep a copy of a file; one that is there but cannot be kept now waits."""
        whole = self._out / path
        if not whole.is_file():
            self._notes.append(f"a file could not be kept and was left out: {str(whole)!r} is gone")
            return
        try:
            self._client.log_artifact(self.state.run_id, str(whole), folder or None)
        except Exception as error:  # noqa: BLE001 (each kind of artifact store fails in a way of its own)
            if not self.state.waiting:
                self._notes.append(f"a file waits to be kept, {whole.name!r}: {one_line(error, kind=False)}")
            self.state.waiting.append({"path": path, "folder": folder})

    def _finish(self, told: Mapping[str, Any]) -> None:
        """Close the run; delete the duplicate that a retried create request may have left."""
        own = self.state.run_id
        run = find_run(self._client, own)
        for double in self._runs_of(run.info.experiment_id) if run else ():
            if double.info.run_id != own and not double.data.metrics:
                self._client.delete_run(double.info.run_id)
        self._client.set_terminated(own, told["status"], end_time=told["time"])


def _hold(out: Path, wait: float) -> AbstractContextManager[object]:
    """Hold the run's lock, which ends with its process, however that ends.

    Where the file system knows no locks everybody has it: what is then given twice is there once.

    Raises:
        StillRunningError: Another process holds it for longer than `wait` seconds.
    """
    try:
        return lock(out / LOCK, wait=wait)
    except InUseError:
        raise StillRunningError(
            f"run must have ended, got one that still delivers by itself in {str(out)!r}"
        ) from None
    except OSError:
        return contextlib.nullcontext()


def sync_run(out: Path, uri: str = "", *, wait: float = 5.0) -> SyncStatus:
    """Bring the store up to what a run that has ended was told; one that did not say how is KILLED.

    Args:
        out: The run's folder.
        uri: Tracking URI; by default the one it was tracked in.
        wait: Seconds to wait for a process of the run that is about to end.

    Raises:
        StillRunningError: The run has not ended.
        TrackingError: The store does not answer, or has the run no more.
        ValueError: The store's URI has a password, which is not kept and was not given.
    """
    before = sync_status(out)
    if not before.uri or (before.left == 0 and before.closed):
        return before
    with _hold(out, wait):
        if not sync_status(out).closed:
            add_entry(out, last_step(out), kind="finish", status="KILLED")
        before = sync_status(out)
        resolved = store.resolve_uri(uri) if uri else _with_password(out, before.uri)
        if before.run_id and mask(resolved) != before.uri:  # moved, or a mistake
            with explained(resolved):
                if find_run(store.connect(resolved), before.run_id) is None:
                    raise RunGoneError(
                        f"tracking URI must be that of the run in {str(out)!r}, {before.uri}, "
                        f"got {mask(resolved)}, which does not have it"
                    )
        notes = deque[str]()
        RunSync(out, resolved, notes).run()
    after = sync_status(out)
    return replace(after, delivered=before.left - after.left, notes=tuple(notes))


def _with_password(out: Path, kept: str) -> str:
    """The whole URI: a password is not kept, but may be in the environment."""
    given = os.environ.get("MLFLOW_TRACKING_URI", "")
    if "***" not in kept:
        return kept
    if mask(given) != kept:
        raise ValueError(
            f"tracking URI of the run in {str(out)!r} has a password, which is not kept: set --tracking-uri "
            f"or MLFLOW_TRACKING_URI, got {mask(given) or 'neither'} for {kept}"
        )
    return given


class Syncer:
    """A thread that syncs a run while it goes on, again and again until it is told to stop."""

    def __init__(self, out: Path, uri: str) -> None:
        """Begin to sync."""
        self.run_id = read_run_id(out)
        self.notes: deque[str] = deque()
        """What the user is to know of, to be taken from here."""
        self.failure = ""
        """Why the last attempt did not give everything; empty where it did."""
        self._out = out
        self._uri = uri
        self._run: RunSync | None = None
        self._asked: queue.Queue[threading.Event | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()

    def flush(self, seconds: float) -> bool:
        """Have all in the store that the journal holds by now, waiting for one attempt and at most so long.

        Returns:
            Whether it is; `failure` says why not.
        """
        done = threading.Event()
        self._asked.put(done)
        if not done.wait(seconds):
            self.failure = self.failure or f"it took longer than {seconds:g} s"
            return False
        return not self.failure

    def stop(self) -> None:
        """No further attempt; the run is free for others as soon as one under way is over."""
        self._asked.put(None)
        self._thread.join(timeout=1.0)

    def _work(self) -> None:
        pause = _PAUSE
        with contextlib.ExitStack() as held:
            while True:
                done: threading.Event | None = threading.Event()
                with contextlib.suppress(queue.Empty):
                    done = self._asked.get(timeout=pause)
                if done is None:
                    return
                self.failure = self._attempt(held)
                pause = min(2 * pause, _LONGEST_PAUSE) if self.failure else _PAUSE
                done.set()

    def _attempt(self, held: contextlib.ExitStack) -> str:
        """Sync; returns why not everything went."""
        try:
            if self._run is None:
                held.enter_context(_hold(self._out, 0.0))
                self._run = RunSync(self._out, self._uri, self.notes)  # only now: the lock is ours
            self._run.run()
        except StillRunningError:
            return "another process delivers it just now"
        except TrackingError as error:
            failure = str(error).partition("; ")[0]  # what to do is said at the run's end
            if not self.failure:
                self.notes.append(
                    f"training goes on, what is tracked is kept in {str(self._out)!r}: {failure}"
                )
            return failure
        except Exception as error:  # noqa: BLE001 (a thread that ends without a word would lose the rest)
            return one_line(error)
        finally:
            if self._run is not None:
                self.run_id = self._run.state.run_id
        return f"{len(waiting)} files could not be kept" if (waiting := self._run.state.waiting) else ""
