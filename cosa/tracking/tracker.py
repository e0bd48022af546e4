"""What the trainer tells of a run: the Tracker protocol, and its form for MLflow."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from cosa import config as configs
from cosa.config import Config
from cosa.storage.files import mask
from cosa.tracking.courier import Courier
from cosa.tracking.journal import Journal, find_journals, standing
from cosa.tracking.place import TrackingError, require_name, resolve_uri
from cosa.tracking.provenance import environment_tags, identity_tags, source_tags
from cosa.tracking.store import require_mlflow
from cosa.tracking.sync import flush

Status = Literal["FINISHED", "FAILED", "KILLED"]

DATA_TAG = "cosa.data_fingerprint"
"""Tag under which the trainer records which data it read."""

_log = logging.getLogger(__name__)
_MAX_PARAM = 6000  # characters; MLflow's own limit
_MAX_TAG = 8000
_ODD = "cosa.non_finite."
_FIRST_SECONDS = 5.0  # that `start` waits for a slow store to tell the run's id; one that is away costs none
_LAST_SECONDS = 120.0  # for the last files of a finished run
_STOP_SECONDS = 5.0  # for those of one that is stopped: whoever stops it may not wait long


@runtime_checkable
class Tracker(Protocol):
    """What the trainer tells of a run. Only rank 0 calls it."""

    @property
    def run_id(self) -> str | None:
        """The run's id; None where nothing is tracked or the store has not told it yet."""

    def start(
        self, config: Config, *, out: Path, tags: Mapping[str, str] | None = None, resume_step: int = 0
    ) -> None:
        """Open the run that belongs to `out`: a new one, or its own again where it was tracked before.

        Args:
            config: Settings of the run; kept as dotted params and as the artifact `config.json`.
            out: The run's folder; what is told is kept there.
            tags: Facts only the trainer knows, such as DATA_TAG and what it was forked from.
            resume_step: Step that training goes on from; 0 for a run from its beginning.
        """

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Keep the metrics of one step; a step that a metric already has is not written again."""

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Keep a copy of the file `path` under `folder`; the file stays where it is."""

    def log_text(self, text: str, name: str) -> None:
        """Keep `text` as the file `name`, which may hold folders."""

    def finish(self, status: Status = "FINISHED") -> None:
        """Close the run; called once, also when training failed."""


class NullTracker:
    """Tracks nothing and needs nothing."""

    run_id = None

    def start(
        self, config: Config, *, out: Path, tags: Mapping[str, str] | None = None, resume_step: int = 0
    ) -> None:
        """Nothing to open."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Nothing is kept."""

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Nothing is kept."""

    def log_text(self, text: str, name: str) -> None:
        """Nothing is kept."""

    def finish(self, status: Status = "FINISHED") -> None:
        """Nothing to close."""


class MlflowTracker:
    """Keeps one run in MLflow, through a client of its own: no global state, no active run.

    What it is told goes to the run's journal, and from there to the store in a thread of its own. A store
    that does not answer, at the start or later, costs a warning; what it missed is delivered when it is back,
    or by `cosa-track flush`.
    A NaN or infinite value is never written as a metric (MLflow's stores turn infinity into 1.8e308, which
    ruins every chart); its first occurrence is kept in the tag `cosa.non_finite.<metric>` instead.
    """

    def __init__(
        self,
        uri: str,
        experiment: str,
        *,
        run_name: str = "",
        parent_run_id: str = "",
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Remember where to track; nothing is contacted before `start`.

        Args:
            uri: Tracking URI, see `resolve_uri`.
            experiment: Name of the experiment, made where it does not exist.
            run_name: Name of a new run; by default the name of its out folder.
            parent_run_id: Run that a new run is nested under.
            tags: Further tags, such as table, arm and seed; they win over the ones found here.
        """
        self._uri = resolve_uri(uri)
        self._experiment = experiment
        self._run_name = run_name
        self._parent_run_id = parent_run_id
        self._tags = dict(tags or {})
        self._journal: Journal | None = None
        self._courier: Courier | None = None
        self._last_steps: dict[str, int] = {}
        self._non_finite: set[str] = set()

    @property
    def run_id(self) -> str | None:
        """See `Tracker.run_id`."""
        return (self._courier.run_id or None) if self._courier else None

    def start(
        self, config: Config, *, out: Path, tags: Mapping[str, str] | None = None, resume_step: int = 0
    ) -> None:
        """Open the run, see `Tracker.start`. Params that the run already has stay as they are.

        Raises:
            TrackingError: MLflow is not installed.
            OSError: The journal cannot be written.
        """
        require_mlflow()
        facts = {**source_tags(), **environment_tags(), **identity_tags(config), **(tags or {}), **self._tags}
        if resume_step:
            facts["cosa.resumed_at"] = str(resume_step)
        self._journal = Journal(out)
        for entry in self._journal.entries:
            if entry.kind == "metrics":
                self._remember(entry.content["metrics"], entry.content["step"])
                self._non_finite.update(tag.removeprefix(_ODD) for tag in entry.content["tags"])
        self._journal.add(
            "open",
            key=self._journal.key,
            uri=mask(self._uri),
            experiment=self._experiment,
            name=self._run_name or out.name,
            parent=self._parent_run_id,
            tags={key: mask(value)[:_MAX_TAG] for key, value in facts.items()},
            params={name: _text(value)[:_MAX_PARAM] for name, value in configs.flatten(config).items()},
        )
        self.log_text(configs.to_json(config), "config.json")
        self._courier = Courier(out, self._uri)
        self._courier.start()
        self._courier.deliver(_FIRST_SECONDS)
        self._say()

    def settle(self, seconds: float = 60.0) -> None:
        """Wait until the store has all that it was told.

        Raises:
            TrackingError: It has not after so many seconds, or does not answer.
        """
        assert self._courier is not None, "a tracker is started before it is told anything"
        if not self._courier.deliver(seconds):
            raise TrackingError(self._courier.failure)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Keep the metrics of one step, see `Tracker.log_metrics`."""
        values = {_metric_name(name): float(value) for name, value in metrics.items()}
        new = {name: value for name, value in values.items() if step > self._last_steps.get(name, -1)}
        odd = {n: v for n, v in new.items() if not math.isfinite(v) and n not in self._non_finite}
        finite = {name: value for name, value in new.items() if math.isfinite(value)}
        if finite or odd:
            tags = {f"{_ODD}{name}": f"{value} at step {step}" for name, value in odd.items()}
            self._opened().add("metrics", step=step, metrics=finite, tags=tags)
        self._remember(new, step)
        self._non_finite.update(odd)
        self._say()

    def _remember(self, metrics: Mapping[str, float], step: int) -> None:
        self._last_steps.update(dict.fromkeys(metrics, step))

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Keep a copy of a file, see `Tracker.log_artifact`."""
        journal = self._opened()
        within = path.relative_to(journal.out) if path.is_relative_to(journal.out) else path.absolute()
        journal.add("file", path=str(within), folder=folder)
        self._say()

    def log_text(self, text: str, name: str) -> None:
        """Keep a text as a file, see `Tracker.log_text`."""
        path = self._opened().keep_text(text, name)
        self.log_artifact(path, name.rpartition("/")[0])

    def finish(self, status: Status = "FINISHED") -> None:
        """Close the run, see `Tracker.finish`; what the store does not take in time stays in the journal."""
        if self._journal is None or self._courier is None:
            return  # never opened
        try:
            self._journal.add("finish", status=status)
        except OSError as error:  # a full disk has ended the run; it is closed by `flush`
            _log.warning("tracking: the end of the run was not noted: %s", error)
        self._courier.deliver(_LAST_SECONDS if status == "FINISHED" else _STOP_SECONDS)
        self._courier.end()
        self._say()
        _tell_what_is_left(self._journal.out, self._courier.failure)

    def _opened(self) -> Journal:
        assert self._journal is not None, "a tracker is started before it is told anything"
        return self._journal

    def _say(self) -> None:
        """Warn of what the courier met; here, so that no other thread writes on the user's terminal."""
        while self._courier is not None and self._courier.notes:
            _log.warning("tracking: %s", self._courier.notes.popleft())


def _tell_what_is_left(out: Path, reason: str) -> None:
    """The one line for what a run could not deliver."""
    if left := standing(out).left:
        _log.warning(
            "tracking: %d entries are not delivered yet (%s); later: cosa-track flush %s", left, reason, out
        )


def _text(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _metric_name(name: str) -> str:
    """`name` with the characters that MLflow refuses replaced."""
    return re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)


@dataclass(frozen=True, kw_only=True)
class TrackingSpec:
    """Where a run is to be tracked, in plain text, so that it can travel to another process."""

    uri: str = ""
    """Tracking URI; empty tracks nothing."""
    experiment: str = "cosa"
    """Name of the experiment."""
    run_name: str = ""
    """Name of a new run; empty takes the name of its out folder."""
    parent_run_id: str = ""
    """Run that a new run is nested under."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Further tags of the run."""

    def __post_init__(self) -> None:
        require_name("experiment", self.experiment)
        require_name("run name", self.run_name)

    def tracker(self) -> Tracker:
        """The tracker that this describes."""
        if not self.uri:
            return NullTracker()
        return MlflowTracker(
            self.uri,
            self.experiment,
            run_name=self.run_name,
            parent_run_id=self.parent_run_id,
            tags=self.tags,
        )

    def close(self, out: Path, status: Status) -> None:
        """Close the run of `out` from outside, where its own process could not; a warning if that fails."""
        if not self.uri or not find_journals(out):
            return
        reason = ""
        try:
            Journal(out).add("finish", status=status)
            flush(out, self.uri)
        except (TrackingError, OSError) as error:
            reason = str(error)
        _tell_what_is_left(out, reason)
