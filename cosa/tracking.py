"""Where a run's settings, metrics and pictures are kept: the Tracker protocol and its MLflow form.

Rules that hold throughout: one run has one id for life, kept in `out/run.json`, so a resumed run reopens its
own; nothing is written twice; a store that fails while training goes on costs a warning, never the training;
passwords in a tracking URI are shown to nobody. MLflow is imported only where a run is really tracked.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import socket
import time
import urllib.parse
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, runtime_checkable

import cosa
from cosa import config as configs
from cosa.config import Config
from cosa.provenance import environment_tags, identity_tags, source_tags

if TYPE_CHECKING:
    from mlflow import MlflowClient
else:
    MlflowClient = Any  # its import takes seconds; tests check annotations as the program runs

T = TypeVar("T")
Status = Literal["FINISHED", "FAILED", "KILLED"]

DATA_TAG = "cosa.data_fingerprint"
"""Tag under which the trainer records which data it read."""
RUN_FILE = "run.json"
"""File in a run's out folder that remembers the id of its tracked run."""

_log = logging.getLogger(__name__)
_MAX_PARAM = 6000  # characters; MLflow's own limit
_MAX_TAG = 8000
_METRICS_PER_CALL = 1000
_PARAMS_PER_CALL = 100
_DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
_CHECK_SECONDS = 5
_PAUSE_SECONDS = 30.0


class TrackingError(RuntimeError):
    """The tracking store cannot be used; the message is one line that says where and what to do."""


@runtime_checkable
class Tracker(Protocol):
    """What the trainer tells of a run. Only rank 0 calls it."""

    def start(
        self, config: Config, *, out: Path, tags: Mapping[str, str] | None = None, resume_step: int = 0
    ) -> str | None:
        """Open the run that belongs to `out`: a new one, or its own again where it was tracked before.

        Args:
            config: Settings of the run; kept as dotted params and as the artifact `config.json`.
            out: The run's folder; its `run.json` remembers the run's id.
            tags: Facts only the trainer knows, such as DATA_TAG and what it was forked from.
            resume_step: Step that training goes on from; 0 for a run from its beginning.

        Returns:
            The run's id, or None where nothing is tracked.

        Raises:
            TrackingError: The store does not answer or refuses the run.
        """

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Keep the metrics of one step; a step that a metric already has is not written again."""

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Keep a copy of the file `path` under `folder`."""

    def log_text(self, text: str, name: str) -> None:
        """Keep `text` as the file `name`, which may hold folders."""

    def finish(self, status: Status = "FINISHED") -> None:
        """Close the run; called once, also when training failed."""


class NullTracker:
    """Tracks nothing and needs nothing."""

    def start(
        self, config: Config, *, out: Path, tags: Mapping[str, str] | None = None, resume_step: int = 0
    ) -> str | None:
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

    A NaN or infinite value is never written as a metric (MLflow's stores turn infinity into 1.8e308, which
    ruins every chart); its first occurrence is kept in the tag `cosa.non_finite.<metric>` instead.
    Once the run is open, a store that does not answer costs a warning and at most a fifth of the time: what
    was to be written waits in memory and is tried again after a pause, and once more at the end.
    """

    def __init__(
        self,
        uri: str,
        experiment: str,
        *,
        run_name: str = "",
        parent_run_id: str = "",
        tags: Mapping[str, str] | None = None,
        run_id: str = "",
    ) -> None:
        """Remember where to track; nothing is contacted before `start`.

        Args:
            uri: Tracking URI, see `resolve_uri`.
            experiment: Name of the experiment, made where it does not exist.
            run_name: Name of a new run; by default the name of its out folder.
            parent_run_id: Run that a new run is nested under.
            tags: Further tags, such as table, arm and seed; they win over the ones found here.
            run_id: Run to reopen; by default the one in `out/run.json`.
        """
        self._uri = resolve_uri(uri)
        self._experiment = experiment
        self._run_name = run_name
        self._parent_run_id = parent_run_id
        self._tags = dict(tags or {})
        self._run_id = run_id
        self._client: MlflowClient | None = None
        self._reopened = False
        self._last_steps: dict[str, int] = {}
        self._non_finite: set[str] = set()
        self._waiting: deque[Callable[[MlflowClient], None]] = deque()
        self._warned = False
        self._retry_at = -math.inf

    def start(
        self, config: Config, *, out: Path, tags: Mapping[str, str] | None = None, resume_step: int = 0
    ) -> str | None:
        """Open the run, see `Tracker.start`. Params that the run already has stay as they are."""
        facts = {**source_tags(), **environment_tags(), **identity_tags(config), **(tags or {}), **self._tags}
        if resume_step:
            facts["cosa.resumed_at"] = str(resume_step)
        with _explained(self._uri):
            client = self._client = _connect(self._uri)
            self._run_id = self._open(client, out, facts)
            known = client.get_run(self._run_id).data.params if self._reopened else {}
            _log_params(client, self._run_id, config, known)
            client.log_text(self._run_id, configs.to_json(config), "config.json")
        return self._run_id

    def _open(self, client: MlflowClient, out: Path, tags: Mapping[str, str]) -> str:
        """The id of this folder's run: reopened where the store still has it, else newly made."""
        run_id = self._run_id or read_run_id(out)
        if run_id and _is_active(client, run_id):
            self._reopened = True
            client.update_run(run_id, status="RUNNING")
            _log_tags(client, run_id, tags)
            return run_id
        experiment_id = _experiment_id(client, self._uri, self._experiment)
        system = {"mlflow.parentRunId": self._parent_run_id} if self._parent_run_id else {}
        name = self._run_name or out.name
        run = client.create_run(experiment_id, run_name=name, tags={**_cut(tags), **system})
        new_id: str = run.info.run_id
        _write_run_file(out, new_id, self._uri, self._experiment)
        return new_id

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Keep the metrics of one step in one call, see `Tracker.log_metrics`."""
        now = int(time.time() * 1000)
        values = {_metric_name(name): float(value) for name, value in metrics.items()}
        self._send(lambda client: self._write_metrics(client, values, step, now))

    def _write_metrics(
        self, client: MlflowClient, values: Mapping[str, float], step: int, milliseconds: int
    ) -> None:
        from mlflow.entities import Metric, RunTag

        new = {name: value for name, value in values.items() if step > self._last_step(client, name)}
        finite = [Metric(name, v, milliseconds, step) for name, v in new.items() if math.isfinite(v)]
        odd = {n: v for n, v in new.items() if not math.isfinite(v) and n not in self._non_finite}
        notes = [RunTag(f"cosa.non_finite.{name}", f"{v} at step {step}") for name, v in odd.items()]
        for part in _parts(finite, _METRICS_PER_CALL):
            client.log_batch(self._run_id, metrics=part)
        for tags in _parts(notes, _PARAMS_PER_CALL):
            client.log_batch(self._run_id, tags=tags)
        self._non_finite.update(odd)
        self._last_steps.update(dict.fromkeys(new, step))

    def _last_step(self, client: MlflowClient, name: str) -> int:
        """The last step that the run has of a metric, -1 for none; a reopened run is asked once for each."""
        if name not in self._last_steps:
            history = client.get_metric_history(self._run_id, name) if self._reopened else []
            self._last_steps[name] = max((point.step for point in history), default=-1)
        return self._last_steps[name]

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Keep a copy of a file, see `Tracker.log_artifact`."""
        self._send(lambda client: client.log_artifact(self._run_id, str(path), folder or None))

    def log_text(self, text: str, name: str) -> None:
        """Keep a text as a file, see `Tracker.log_text`."""
        self._send(lambda client: client.log_text(self._run_id, text, name))

    def finish(self, status: Status = "FINISHED") -> None:
        """Close the run, see `Tracker.finish`; what still cannot be written is lost and warned of."""
        if self._client is None:
            return  # never opened
        self._retry_at = -math.inf
        self._send(lambda client: client.set_terminated(self._run_id, status))
        if self._waiting:
            _log.warning(
                "tracking: %d entries of run %s were not written, %s does not answer; its journal has them",
                len(self._waiting),
                self._run_id,
                mask(self._uri),
            )

    def _send(self, write: Callable[[MlflowClient], None]) -> None:
        """Write now, after all that still waits; what a silent store did not take waits for the next call."""
        from mlflow.exceptions import MlflowException

        assert self._client is not None, "a tracker is started before it is told anything"
        self._waiting.append(write)
        begun = time.monotonic()
        while self._waiting and begun >= self._retry_at:
            try:
                self._waiting[0](self._client)
            except MlflowException as error:
                if error.error_code in _TRANSIENT:
                    self._warn_once(error)
                    now = time.monotonic()
                    self._retry_at = now + max(_PAUSE_SECONDS, 4 * (now - begun))
                    return
                _log.warning("tracking: an entry was refused and left out: %s", _one_line(error))
            except OSError as error:  # the artifact folder: full, or not ours to write
                _log.warning("tracking: a file could not be kept and was left out: %s", _one_line(error))
            self._waiting.popleft()
            self._warned = False

    def _warn_once(self, error: Exception) -> None:
        if not self._warned:
            where = mask(self._uri)
            _log.warning("tracking: %s does not answer, training goes on: %s", where, _one_line(error))
        self._warned = True


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
        run_id = read_run_id(out)
        if not self.uri or not run_id:
            return
        try:
            with _explained(self.uri):
                _connect(resolve_uri(self.uri)).set_terminated(run_id, status)
        except TrackingError as error:
            _log.warning("tracking: run %s was not closed: %s", run_id, error)


def resolve_uri(uri: str) -> str:
    """`uri` with a relative SQLite path made absolute, since workers run in folders of their own.

    Raises:
        ValueError: The URI names no kind of store that MLflow 3 still writes to.
    """
    scheme, separator, rest = uri.partition(":")
    dialect = scheme.partition("+")[0]
    if not separator or dialect not in {"sqlite", "http", "https", "databricks", *_DATABASE_PORTS}:
        raise ValueError(
            f"tracking URI must start with sqlite:///, http:// or https:// (or name another database), "
            f"got {mask(uri)!r}; a file works as 'sqlite:///runs/mlflow.db'"
        )
    if dialect != "sqlite":
        return uri
    path = rest.removeprefix("///")
    if not rest.startswith("///") or not path:
        raise ValueError(
            f"tracking URI must name a file, got {uri!r}; write sqlite:///relative.db or sqlite:////full/path.db"
        )
    return f"{scheme}:///{Path(path).expanduser().absolute()}"


def initialise_store(uri: str, experiment: str) -> str:
    """Make the store and the experiment where they do not exist; run it once before several processes write.

    Several processes that open a fresh SQLite store at the same time all fail in its first migration.

    Returns:
        The experiment's id.

    Raises:
        TrackingError: The store does not answer or refuses the experiment.
    """
    resolved = resolve_uri(uri)
    with _explained(resolved):
        return _experiment_id(_connect(resolved), resolved, experiment)


def download_model(uri: str, run_id: str, folder: Path) -> Path:
    """Fetch the model that a finished run keeps as the artifact folder `model`.

    Args:
        uri: Tracking URI, see `resolve_uri`.
        run_id: The run's id.
        folder: Where the copy goes.

    Returns:
        The copy's folder.

    Raises:
        TrackingError: The store does not answer, knows no such run, or the run has no model.
    """
    resolved = resolve_uri(uri)
    if resolved.startswith("sqlite") and not _sqlite_path(resolved).is_file():  # or MLflow would make one
        raise TrackingError(
            f"tracking store must exist, got {mask(resolved)}; set --tracking-uri to the one of the run"
        )
    with _explained(resolved):
        client = _connect(resolved)
        if not _is_active(client, run_id):
            raise TrackingError(
                f"run id must be one of {mask(resolved)}, got {run_id!r}; "
                "set --tracking-uri to the store of the run"
            )
        if not any(item.is_dir and item.path == "model" for item in client.list_artifacts(run_id)):
            raise TrackingError(
                f"run {run_id} must hold the artifact folder `model`, got none in {mask(resolved)}; "
                "it is written when training ends: name a checkpoint until then"
            )
        with _environment(MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR="false"):
            return Path(client.download_artifacts(run_id, "model", str(folder)))


def save_pyfunc(model: Path, out: Path) -> None:
    """Make a model's folder an MLflow model that loads through `cosa.pyfunc`; nothing is pickled.

    Args:
        model: Copied into `out`.
        out: A folder that does not exist yet.

    Raises:
        TrackingError: MLflow is not installed.
        OSError: The folder cannot be written.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    try:
        from mlflow import pyfunc
    except ImportError as error:
        raise TrackingError(f"an MLflow model must find mlflow, got {error}; install it") from None
    pyfunc.save_model(
        out,
        loader_module="cosa.pyfunc",
        data_path=str(model),
        pip_requirements=[f"cosa-wsss=={cosa.__version__}"],
    )


def _connect(uri: str) -> MlflowClient:
    """A quiet client of the store at `uri`, which has been seen to answer."""
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # it warns of every retry; we of the last
    _prepare(uri)
    with _environment(MLFLOW_HTTP_REQUEST_MAX_RETRIES="1", MLFLOW_HTTP_REQUEST_TIMEOUT=str(_CHECK_SECONDS)):
        client = MlflowClient(uri)
        client.search_experiments(max_results=1)
    return client


def _prepare(uri: str) -> None:
    """Meet the failures that MLflow itself retries for minutes: no folder to write in, no database there."""
    parts = urllib.parse.urlsplit(uri)
    dialect = parts.scheme.partition("+")[0]
    if dialect == "sqlite":
        path = _sqlite_path(uri)
        path.parent.mkdir(parents=True, exist_ok=True)
        writable = path if path.exists() else path.parent
        if not os.access(writable, os.W_OK):
            raise PermissionError(f"no permission to write {writable}")
    elif dialect in _DATABASE_PORTS and parts.hostname:
        address = (parts.hostname, parts.port or _DATABASE_PORTS[dialect])
        socket.create_connection(address, timeout=_CHECK_SECONDS).close()


def _sqlite_path(uri: str) -> Path:
    return Path(uri.partition(":///")[2].partition("?")[0])


def _experiment_id(client: MlflowClient, uri: str, name: str) -> str:
    """The experiment's id; a new one in a SQLite store keeps its artifacts in a folder beside the file."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        place = None
        if uri.startswith("sqlite"):  # MLflow's default would be a folder relative to whoever reads it
            place = (_sqlite_path(uri).parent / "mlartifacts").as_uri()
        try:
            return str(client.create_experiment(name, artifact_location=place))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)  # another process was faster
    if found is None or found.lifecycle_stage != "active":
        raise TrackingError(
            f"experiment must not be deleted, got {name!r} in {mask(uri)}; restore it with "
            f"`mlflow experiments restore` or choose another name"
        )
    return str(found.experiment_id)


def _is_active(client: MlflowClient, run_id: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        return bool(client.get_run(run_id).info.lifecycle_stage == "active")
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False


def _log_params(client: MlflowClient, run_id: str, config: Config, known: Mapping[str, str]) -> None:
    from mlflow.entities import Param

    params = [
        Param(name, _param_text(value)[:_MAX_PARAM])
        for name, value in configs.flatten(config).items()
        if name not in known
    ]
    for part in _parts(params, _PARAMS_PER_CALL):
        client.log_batch(run_id, params=part)


def _param_text(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _log_tags(client: MlflowClient, run_id: str, tags: Mapping[str, str]) -> None:
    from mlflow.entities import RunTag

    for part in _parts([RunTag(key, value) for key, value in _cut(tags).items()], _PARAMS_PER_CALL):
        client.log_batch(run_id, tags=part)


def _cut(tags: Mapping[str, str]) -> dict[str, str]:
    return {key: mask(value)[:_MAX_TAG] for key, value in tags.items()}


def _parts(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[i : i + size] for i in range(0, len(items), size))


def _metric_name(name: str) -> str:
    """`name` with the characters that MLflow refuses replaced."""
    return re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)


def read_run_id(out: Path) -> str:
    """The id of the tracked run that belongs to an out folder; empty where it was never tracked."""
    try:
        content = json.loads((out / RUN_FILE).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return ""
    return str(content.get("run_id", ""))


def _write_run_file(out: Path, run_id: str, uri: str, experiment: str) -> None:
    out.mkdir(parents=True, exist_ok=True)
    content = {"run_id": run_id, "tracking_uri": mask(uri), "experiment": experiment}
    partial = out / f".{RUN_FILE}.partial"
    partial.write_text(json.dumps(content, indent=2) + "\n")
    partial.replace(out / RUN_FILE)


def ui_hint(uri: str) -> str:
    """How to look at the runs: the command for a store in a file or database, the address of a server."""
    resolved = mask(resolve_uri(uri))
    return resolved if resolved.startswith("http") else f"mlflow ui --backend-store-uri {resolved}"


def mask(text: str) -> str:
    """`text` with the user and password of every URI in it replaced by `***`."""
    text = re.sub(r"(\w://)[^/\s'\"]*@", r"\1***@", text)
    return re.sub(r"(?i)([?&](?:password|token|secret|key)=)[^&\s]+", r"\1***", text)


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Environment variables set for a while: MLflow reads its time limits from there at every request."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


# What may pass by itself; a connection that failed is INTERNAL_ERROR, a locked file TEMPORARILY_UNAVAILABLE.
_TRANSIENT = frozenset({"INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "UNAVAILABLE"})


@contextlib.contextmanager
def _explained(uri: str) -> Iterator[None]:
    """Turn whatever the store fails with into one line that names it and says what to do."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # it would print the URI's password, too
    # MLflow by default waits some four minutes for a server that is away; training would wait with it.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    try:
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError
    except ImportError as error:
        raise TrackingError(f"tracking must find mlflow, got {error}; install it, or track nothing") from None
    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError, ImportError) as error:
        remedy = "check the file and its folder" if uri.startswith("sqlite") else "start the server"
        raise TrackingError(
            f"tracking store must answer, got none from {mask(uri)} ({_one_line(error)}); "
            f"{remedy}, or track elsewhere or not at all"
        ) from None


def _one_line(error: Exception) -> str:
    """The first line of an error, or the cause it names, without passwords and not too long."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return mask(lines[0].rpartition("Caused by ")[2])[:200]
