"""What the trainer tells of a run: to its journal, or to MLflow as well."""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cosa import config as configs
from cosa.config import Config
from cosa.storage.files import mask, write_atomically
from cosa.storage.run_folder import TRAINING_TAG, VALIDATION_TAG
from cosa.tracking.journal import (
    REWOUND,
    TEXTS,
    add_entry,
    first_open,
    fit,
    last_step,
    read_entries,
    rewind,
    sync_status,
)
from cosa.tracking.provenance import MachineLoad, environment_tags, source_tags
from cosa.tracking.store import TrackingError, require_mlflow, require_name, resolve_uri
from cosa.tracking.sync import Syncer, sync_run

Status = Literal["FINISHED", "FAILED", "KILLED"]
Tags = Mapping[str, str]

_log = logging.getLogger(__name__)
_MAX_PARAM = 6000  # characters; MLflow's own limit
_MAX_TAG = 8000
_MAX_DIGEST = 36
_FIRST_SECONDS = 5.0  # that `start` waits for a slow store to tell the run's id; one that is away costs none
_LAST_SECONDS = 120.0  # for the last files of a finished run
_STOP_SECONDS = 5.0  # for those of one that is stopped: whoever stops it may not wait long


class Tracker:
    """What the trainer tells of a run: its metrics go to `journal.jsonl` in its folder, which needs nothing.

    One that is never started keeps nothing, as on every rank but the first.
    """

    _started = False
    _out: Path
    _step: int
    """The last one that the journal knows of."""

    @property
    def run_id(self) -> str | None:
        """The run's id in a store; None where there is none or it has not told it yet."""
        return None

    def start(
        self,
        config: Config,  # noqa: ARG002 (for a store)
        *,
        out: Path,
        tags: Tags | None = None,  # noqa: ARG002
        resume_step: int | None = None,
    ) -> None:
        """Open the run that belongs to `out`: a new one, or its own again where it was tracked before.

        Args:
            config: Settings of the run; a store has them as dotted params and as the artifact `config.json`.
            out: The run's folder; what is told is kept there.
            tags: For a store, facts only the trainer knows, such as TRAINING_TAG and what it was forked from.
            resume_step: Step that training goes on from, 0 for its beginning: what was told of later ones
                is told again. None where nothing is.

        Raises:
            OSError: The journal cannot be written.
        """
        out.mkdir(parents=True, exist_ok=True)
        if resume_step is not None:
            rewind(out, resume_step)
        self._started, self._out = True, out
        self._step = last_step(out) if resume_step is None else resume_step
        rewound = read_entries(out / REWOUND)
        self._told = {(entry.content.get("step"), name) for entry in rewound for name in entry.metrics}

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Keep the metrics of one step; a step that a metric already has is not given to a store again.

        Raises:
            OSError: The journal cannot be written.
        """
        if not self._started:
            return
        self._step = step
        again = [name for name in metrics if (step, fit(name)) in self._told]
        values = {name: float(value) for name, value in metrics.items()}
        self._tell(**({"again": again} if again else {}), **values)

    def log_costs(self, costs: Mapping[str, float]) -> None:
        """Have a store keep what the run took by now, as metrics that no other run of it would repeat."""

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Have a store keep a copy of the file `path` under `folder`; the file stays where it is."""

    def log_text(self, text: str, name: str) -> None:
        """Have a store keep `text` as the file `name`, which may hold folders; a later one replaces it."""

    def finish(self, status: Status = "FINISHED") -> None:
        """Close the run; called once, also when training failed."""

    def _tell(self, **content: object) -> None:
        add_entry(self._out, self._step, **content)


class MlflowTracker(Tracker):
    """Keeps one run in MLflow, through a client of its own: no global state, no active run.

    What it is told goes to the run's journal, and from there to the store in a thread of its own. A store
    that does not answer, at the start or later, costs a warning; what it missed is synced when it is back,
    or by `cosa-track flush`.
    A NaN or infinite value is never written as a metric (MLflow's stores turn infinity into 1.8e308, which
    ruins every chart); its first occurrence is kept in the tag `cosa.non_finite.<metric>` instead.
    """

    _syncer: Syncer | None = None
    _load: MachineLoad | None = None

    def __init__(self, spec: TrackingSpec) -> None:
        """Remember where to track; nothing is contacted before `start`."""
        self._spec = spec
        self._uri = resolve_uri(spec.uri)

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
        identities = {
            "cosa.identity": configs.identity(config),
            "cosa.warmup_identity": configs.warmup_identity(config),
        }
        facts = {**source_tags(), **environment_tags(), **identities, **(tags or {}), **self._spec.tags}
        if resume_step:
            facts["cosa.resumed_at"] = str(resume_step)
        self._tell(
            kind="open",
            key=(first_open(out) or {}).get("key") or secrets.token_hex(16),
            uri=mask(self._uri),
            experiment=self._spec.experiment,
            name=self._spec.run_name or out.name,
            parent=self._spec.parent_run_id,
            tags={key: mask(value)[:_MAX_TAG] for key, value in facts.items()},
            params={name: _text(value)[:_MAX_PARAM] for name, value in configs.flatten(config).items()},
        )
        if datasets := _datasets(config, facts):
            self._tell(kind="data", datasets=datasets)
        self.log_text(configs.to_json(config), "config.json")
        self._load = MachineLoad() if self._spec.system_metrics else None
        self._syncer = Syncer(out, self._uri)
        self._syncer.flush(_FIRST_SECONDS)
        self._warn()

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Keep the metrics of one step, see `Tracker.log_metrics`, and how busy the machine was before it."""
        super().log_metrics(metrics, step)
        if self._load is not None:
            self.log_costs(self._load.sample())

    def log_costs(self, costs: Mapping[str, float]) -> None:
        """Keep what the run took, see `Tracker.log_costs`."""
        self._tell(kind="metrics", **costs)

    def set_tags(self, tags: Tags) -> None:
        """Have the store set tags of the run, in order with all else that it is told."""
        self._tell(kind="tags", tags=dict(tags))

    def settle(self, seconds: float = 60.0) -> None:
        """Wait until the store has all that it was told.

        Raises:
            TrackingError: It has not after so many seconds, or does not answer.
        """
        assert self._syncer is not None, "a tracker is started before it is told anything"
        if not self._syncer.flush(seconds):
            raise TrackingError(self._syncer.failure)

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Keep a copy of a file, see `Tracker.log_artifact`."""
        within = path.is_relative_to(self._out)
        name = path.relative_to(self._out) if within else path.absolute()
        self._tell(kind="file", path=str(name), folder=folder)

    def log_text(self, text: str, name: str) -> None:
        """Keep a text as a file, see `Tracker.log_text`."""
        path = self._out / TEXTS / name
        write_atomically(path, text)
        self.log_artifact(path, name.rpartition("/")[0])

    def finish(self, status: Status = "FINISHED") -> None:
        """Close the run, see `Tracker.finish`; what the store does not take in time stays in the journal."""
        if self._syncer is None:
            return  # never opened
        try:
            self._tell(kind="finish", status=status)
        except OSError as error:  # a full disk has ended the run; it is closed by `cosa-track flush`
            _log.warning("tracking: the end of the run was not noted: %s", error)
        self._syncer.flush(_LAST_SECONDS if status == "FINISHED" else _STOP_SECONDS)
        self._syncer.stop()
        self._warn()
        _warn_of_the_rest(self._out, self._syncer.failure)

    def _tell(self, **content: object) -> None:
        super()._tell(**content)
        self._warn()

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


def _datasets(config: Config, facts: Tags) -> list[dict[str, str]]:
    """The data that a run reads as MLflow's datasets; their digests are the fingerprints among its tags."""
    data = config.data
    source = json.dumps({"uri": mask(data.archive or data.root)})
    read = (("training", data.train_split, TRAINING_TAG), ("validation", data.val_split, VALIDATION_TAG))
    return [
        {
            "name": f"{Path(data.root).name} {split}",
            "digest": facts[tag][:_MAX_DIGEST],
            "source_type": "local",
            "source": source,
            "context": context,
        }
        for context, split, tag in read
        if facts.get(tag)
    ]


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
    system_metrics: bool = True
    """Whether its metrics come with those of the machine: CPU, memory and GPUs."""

    def __post_init__(self) -> None:
        require_name("experiment", self.experiment)
        require_name("run name", self.run_name)

    def tracker(self) -> Tracker:
        """The tracker that this describes."""
        return MlflowTracker(self) if self.uri else Tracker()

    def close(self, out: Path, status: Status) -> None:
        """Close the run of `out` from outside, where its own process could not; a warning if that fails."""
        if not self.uri or not sync_status(out).uri:
            return
        reason = ""
        try:
            add_entry(out, last_step(out), kind="finish", status=status)
            sync_run(out, self.uri)
        except (TrackingError, OSError) as error:
            reason = str(error)
        _warn_of_the_rest(out, reason)
