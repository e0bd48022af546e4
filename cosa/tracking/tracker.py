"""What the trainer tells of a run: to nobody, to its journal, or to MLflow as well."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cosa import config as configs
from cosa.config import Config
from cosa.storage.files import mask
from cosa.tracking.journal import Journal, first_open, sync_status
from cosa.tracking.provenance import environment_tags, identity_tags, source_tags
from cosa.tracking.store import TrackingError, require_mlflow, require_name, resolve_uri
from cosa.tracking.sync import Syncer, sync_run

Status = Literal["FINISHED", "FAILED", "KILLED"]
Tags = Mapping[str, str]

DATA_TAG = "cosa.data_fingerprint"
"""Tag under which the trainer records which data it read."""

_log = logging.getLogger(__name__)
_MAX_PARAM = 6000  # characters; MLflow's own limit
_MAX_TAG = 8000
_FIRST_SECONDS = 5.0  # that `start` waits for a slow store to tell the run's id; one that is away costs none
_LAST_SECONDS = 120.0  # for the last files of a finished run
_STOP_SECONDS = 5.0  # for those of one that is stopped: whoever stops it may not wait long


class Tracker:
    """What the trainer tells of a run; this one keeps nothing, as on every rank but the first."""

    @property
    def run_id(self) -> str | None:
        """The run's id; None where nothing is tracked or the store has not told it yet."""
        return None

    def start(
        self, config: Config, *, out: Path, tags: Tags | None = None, resume_step: int | None = None
    ) -> None:
        """Open the run that belongs to `out`: a new one, or its own again where it was tracked before.

        Args:
            config: Settings of the run; kept as dotted params and as the artifact `config.json`.
            out: The run's folder; what is told is kept there.
            tags: Facts only the trainer knows, such as DATA_TAG and what it was forked from.
            resume_step: Step that training goes on from, 0 for its beginning: what was told of later ones
                is told again. None where nothing is.
        """

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Keep the metrics of one step; a step that a metric already has is not given to a store again."""

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Keep a copy of the file `path` under `folder`; the file stays where it is."""

    def log_text(self, text: str, name: str) -> None:
        """Keep `text` as the file `name`, which may hold folders."""

    def finish(self, status: Status = "FINISHED") -> None:
        """Close the run; called once, also when training failed."""


class JournalTracker(Tracker):
    """Keeps the metrics in the run's own folder, in `journal.jsonl`, and needs nothing."""

    _kept: Journal | None = None

    def start(
        self,
        config: Config,  # noqa: ARG002
        *,
        out: Path,
        tags: Tags | None = None,  # noqa: ARG002
        resume_step: int | None = None,
    ) -> None:
        """Begin the journal in `out`, or go on with it."""
        out.mkdir(parents=True, exist_ok=True)
        self._kept = Journal(out, resume_step)

    @property
    def _journal(self) -> Journal:
        assert self._kept is not None, "a tracker is started before it is told anything"
        return self._kept

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Add the metrics of one step to the journal.

        Raises:
            OSError: The journal cannot be written.
        """
        self._journal.add_metrics(metrics, step)


class MlflowTracker(JournalTracker):
    """Keeps one run in MLflow, through a client of its own: no global state, no active run.

    What it is told goes to the run's journal, and from there to the store in a thread of its own. A store
    that does not answer, at the start or later, costs a warning; what it missed is synced when it is back,
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
        tags: Tags | None = None,
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
        self._syncer: Syncer | None = None

    @property
    def run_id(self) -> str | None:
        """See `Tracker.run_id`."""
        return (self._syncer.run_id or None) if self._syncer else None

    def start(
        self, config: Config, *, out: Path, tags: Tags | None = None, resume_step: int | None = None
    ) -> None:
        """Open the run, see `Tracker.start`. Params that the run already has stay as they are.

        Raises:
            TrackingError: MLflow is not installed.
            OSError: The journal cannot be written.
        """
        require_mlflow()
        super().start(config, out=out, resume_step=resume_step)
        facts = {**source_tags(), **environment_tags(), **identity_tags(config), **(tags or {}), **self._tags}
        if resume_step:
            facts["cosa.resumed_at"] = str(resume_step)
        opened = first_open(out)
        self._journal.add(
            "open",
            key=opened.content["key"] if opened else secrets.token_hex(16),
            uri=mask(self._uri),
            experiment=self._experiment,
            name=self._run_name or out.name,
            parent=self._parent_run_id,
            tags={key: mask(value)[:_MAX_TAG] for key, value in facts.items()},
            params={name: _text(value)[:_MAX_PARAM] for name, value in configs.flatten(config).items()},
        )
        self.log_text(configs.to_json(config), "config.json")
        self._syncer = Syncer(out, self._uri)
        self._syncer.flush(_FIRST_SECONDS)
        self._warn()

    def settle(self, seconds: float = 60.0) -> None:
        """Wait until the store has all that it was told.

        Raises:
            TrackingError: It has not after so many seconds, or does not answer.
        """
        assert self._syncer is not None, "a tracker is started before it is told anything"
        if not self._syncer.flush(seconds):
            raise TrackingError(self._syncer.failure)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Keep the metrics of one step, see `Tracker.log_metrics`."""
        super().log_metrics(metrics, step)
        self._warn()

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Keep a copy of a file, see `Tracker.log_artifact`."""
        out = self._journal.out
        name = path.relative_to(out) if path.is_relative_to(out) else path.absolute()
        self._journal.add("file", path=str(name), folder=folder)
        self._warn()

    def log_text(self, text: str, name: str) -> None:
        """Keep a text as a file, see `Tracker.log_text`."""
        self.log_artifact(self._journal.keep_text(text, name), name.rpartition("/")[0])

    def finish(self, status: Status = "FINISHED") -> None:
        """Close the run, see `Tracker.finish`; what the store does not take in time stays in the journal."""
        if self._syncer is None:
            return  # never opened
        try:
            self._journal.add("finish", status=status)
        except OSError as error:  # a full disk has ended the run; it is closed by `cosa-track flush`
            _log.warning("tracking: the end of the run was not noted: %s", error)
        self._syncer.flush(_LAST_SECONDS if status == "FINISHED" else _STOP_SECONDS)
        self._syncer.stop()
        self._warn()
        _warn_of_the_rest(self._journal.out, self._syncer.failure)

    def _warn(self) -> None:
        """Warn of what the syncer met; here, so that no other thread writes on the user's terminal."""
        while self._syncer is not None and self._syncer.notes:
            _log.warning("tracking: %s", self._syncer.notes.popleft())


def _warn_of_the_rest(out: Path, reason: str) -> None:
    """The one line for what a run could not give its store."""
    if left := sync_status(out).left:
        _log.warning(
            "tracking: %d entries are not delivered yet (%s); later: cosa-track flush %s", left, reason, out
        )


def _text(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


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
    tags: Tags = field(default_factory=dict)
    """Further tags of the run."""

    def __post_init__(self) -> None:
        require_name("experiment", self.experiment)
        require_name("run name", self.run_name)

    def tracker(self) -> Tracker:
        """The tracker that this describes."""
        if not self.uri:
            return JournalTracker()
        return MlflowTracker(
            self.uri,
            self.experiment,
            run_name=self.run_name,
            parent_run_id=self.parent_run_id,
            tags=self.tags,
        )

    def close(self, out: Path, status: Status) -> None:
        """Close the run of `out` from outside, where its own process could not; a warning if that fails."""
        if not self.uri or not sync_status(out).uri:
            return
        reason = ""
        try:
            Journal(out).add("finish", status=status)
            sync_run(out, self.uri)
        except (TrackingError, OSError) as error:
            reason = str(error)
        _warn_of_the_rest(out, reason)
