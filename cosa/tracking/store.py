"""The MLflow store: where it is, made, met, and asked for models.

MLflow is imported only where a store is really used. What a store fails with becomes one line, TrackingError.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shlex
import socket
import tempfile
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cosa
from cosa.storage.files import lock, mask, one_line

if TYPE_CHECKING:
    import numpy as np
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from numpy.typing import NDArray

    Images = NDArray[np.uint8]
else:
    MlflowClient = Run = Images = (
        Any  # their import takes seconds; tests check annotations as the program runs
    )

_CHECK_SECONDS = 15  # of two tries each: a server that many runs wake at once is slow
_MAKE_SECONDS = 120  # that a store takes to be made at most, on a busy machine
_DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
"""The databases that MLflow writes to directly, with the port each listens on where the URI names none."""

KIND = {"mlflow.experimentKind": "custom_model_development"}
"""Tag of an experiment that MLflow's UI shows as training runs, and not as talks with a language model."""
UI_PAGE = "/#/experiments?workflowType=machine_learning"
"""Of MLflow's UI: without the query it shows whatever experiment as talks with a language model (3.17)."""
_DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # or it waits some four minutes for a server that is away
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
}


class TrackingError(RuntimeError):
    """The tracking store cannot be used; the message is one line that says where and what to do."""


class RunGoneError(TrackingError):
    """The store answers but has the run no more."""


def resolve_uri(uri: str) -> str:
    """`uri` with a relative SQLite path made absolute, since workers run in folders of their own.

    Raises:
        ValueError: The URI names no kind of store that MLflow 3 still writes to.
    """
    kinds = "|".join(_DATABASE_PORTS)
    if not re.match(rf"sqlite(\+\w+)?:///.|(https?|databricks|({kinds})(\+\w+)?):", uri):
        raise ValueError(
            f"tracking URI must start with sqlite:///, http:// or https:// (or name another database), "
            f"got {mask(uri)!r}; a file works as 'sqlite:///runs/mlflow.db'"
        )
    if not uri.startswith("sqlite"):
        return uri
    kind, _, rest = uri.partition(":///")
    path, question, options = rest.partition("?")
    return sqlite_uri(Path(path).expanduser(), kind) + question + options


def sqlite_uri(path: Path, kind: str = "sqlite") -> str:
    """The URI of the store in the file `path`.

    Raises:
        ValueError: MLflow cannot find the file by it. It reads `?` and `%41` as a URI's, but makes folders of
            the path as it is written, so that to quote it does not help.
    """
    whole = str(path.absolute())
    if "?" in whole or urllib.parse.unquote(whole) != whole:
        raise ValueError(
            f"path of a tracking store must hold no ? and no % before two hexadecimal digits, got {whole!r}; "
            "choose another folder, or name a store elsewhere with --tracking-uri"
        )
    return f"{kind}:///{whole}"


def _sqlite_path(uri: str) -> Path:
    """The file of a SQLite store."""
    return Path(uri.partition(":///")[2].partition("?")[0])


def ui_hint(uri: str) -> str:
    """How to look at the runs: the command for a store in a file or database, the address of a server."""
    resolved = mask(resolve_uri(uri))
    if resolved.startswith("http"):
        return resolved.rstrip("/") + UI_PAGE
    return f"mlflow ui --backend-store-uri {shlex.quote(resolved)}"


def ui_steps(uri: str) -> str:
    """The same in words for people: the command, and what to open then."""
    hint = ui_hint(uri)
    return hint if hint.startswith("http") else f"{hint}, then http://127.0.0.1:5000{UI_PAGE}"


def require_name(what: str, name: str) -> None:
    """Refuse a name that cannot be shown in one line, or that would steer the terminal that shows it.

    Raises:
        ValueError: It holds a line's end, or another character without a picture.
    """
    if not name.isprintable():
        raise ValueError(f"{what} must be one line of visible characters, got {name!r}; choose another name")


def initialise_store(uri: str, experiment: str) -> str:
    """Make the store and the experiment where they do not exist; run it once before several processes write.

    Of several processes one makes a SQLite store, see `_make_whole`. A new experiment in such a store keeps
    its artifacts in a folder beside the file.

    Returns:
        The experiment's id.

    Raises:
        TrackingError: The store does not answer or refuses the experiment.
    """
    resolved = resolve_uri(uri)
    with explained(resolved):
        from mlflow.exceptions import MlflowException

        client = connect(resolved)
        found = client.get_experiment_by_name(experiment)
        if found is None:
            place = None
            if resolved.startswith("sqlite"):  # MLflow's default is relative to whoever reads it
                place = (_sqlite_path(resolved).parent / "mlartifacts").as_uri()
            try:
                return str(client.create_experiment(experiment, artifact_location=place, tags=KIND))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                found = client.get_experiment_by_name(experiment)  # another process was faster
    if found is None or found.lifecycle_stage != "active":
        raise TrackingError(
            f"experiment must not be deleted, got {experiment!r} in {mask(resolved)}; restore it with "
            f"`mlflow experiments restore` or choose another name"
        )
    return str(found.experiment_id)


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
    with explained(resolved):
        client = connect(resolved)
        if find_run(client, run_id) is None:
            raise TrackingError(
                f"run id must be one of {mask(resolved)}, got {run_id!r}; "
                "set --tracking-uri to the store of the run"
            )
        if not any(item.is_dir and item.path == "model" for item in client.list_artifacts(run_id)):
            raise TrackingError(
                f"run {run_id} must hold the artifact folder `model`, got none in {mask(resolved)}; "
                "it is written when training ends: name a checkpoint until then"
            )
        return Path(client.download_artifacts(run_id, "model", str(folder)))


def save_pyfunc(model: Path, out: Path) -> None:
    """Make a model's folder an MLflow model that loads through `cosa.model`; nothing is pickled.

    Args:
        model: Copied into `out`.
        out: A folder that does not exist yet.

    Raises:
        TrackingError: MLflow is not installed.
        OSError: The folder cannot be written.
    """
    require_mlflow()
    from mlflow import pyfunc

    pyfunc.save_model(
        out,
        loader_module="cosa.model",
        data_path=str(model),
        pip_requirements=_requirements(),
    )


def register_model(
    model: Path, name: str, *, uri: str, experiment: str, run_id: str, step: int, example: Images
) -> str:
    """Log a model's folder as an MLflow model and make it a version of a registered one.

    Args:
        model: Its files are copied.
        name: Of the registered model, made where there is none.
        uri: Tracking URI, see `resolve_uri`.
        experiment: Holds it where the store has no run `run_id`; else it is a model of that run.
        run_id: The run that it was trained in; may be empty.
        step: Of the run's metrics that are to be shown beside it.
        example: Images (n h w 3), of which its signature is made and which are kept as its example.

    Returns:
        What loads it: `models:/NAME/VERSION`.

    Raises:
        ValueError: The registry takes no such name.
        TrackingError: The store does not answer or refuses it, or MLflow is not installed.
    """
    if not name or re.search("[/:]", name):
        raise ValueError(f"--register must be a name without / and :, got {name!r}; choose another")
    resolved = resolve_uri(uri)
    with explained(resolved):
        import mlflow
        import numpy as np
        from mlflow.models import Model, ModelSignature
        from mlflow.types import Schema, TensorSpec

        known = find_run(connect(resolved), run_id)
        mlflow.set_tracking_uri(resolved)
        mlflow.set_registry_uri(resolved)
        experiment_id = known.info.experiment_id if known else initialise_store(resolved, experiment)
        mlflow.set_experiment(experiment_id=experiment_id)
        pixel = np.dtype(np.uint8)
        info = Model.log(
            artifact_path=None,
            name="model",
            flavor=mlflow.pyfunc,
            flavor_name="python_function",
            registered_model_name=name,
            run_id=known.info.run_id if known else None,
            step=step,
            loader_module="cosa.model",
            data_path=str(model),
            pip_requirements=_requirements(),
            input_example=example,
            signature=ModelSignature(
                inputs=Schema([TensorSpec(pixel, (-1, -1, -1, 3))]),
                outputs=Schema([TensorSpec(pixel, (-1, -1, -1))]),
            ),
        )
    return f"models:/{name}/{info.registered_model_version}"


def _requirements() -> list[str]:
    return [f"cosa-wsss=={cosa.__version__}"]


def _make_whole(path: Path) -> None:
    """Make the SQLite store `path` where there is none, by one process, whole or not at all.

    MLflow makes its tables in dozens of steps: a process that dies among them would leave a store that
    nobody can open, and of several that start at once all but one would fail.
    """
    if path.exists():
        return
    from mlflow import MlflowClient

    with lock(path.with_name(f"{path.name}.lock"), wait=_MAKE_SECONDS):
        if path.exists():
            return
        draft = path.with_name(f"{path.name}.part")
        for left in path.parent.glob(f"{draft.name}*"):  # of one that died, with what SQLite keeps beside it
            left.unlink()
        MlflowClient(f"sqlite:///{draft}").search_experiments(max_results=1)
        draft.replace(path)


def connect(uri: str) -> MlflowClient:
    """A quiet client of the store at `uri`, which has been seen to answer."""
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # a database that is away would fill pages
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # it warns of every retry; we of the last
    # failures that MLflow itself retries for minutes: no folder to write in, no database there
    parts = urllib.parse.urlsplit(uri)
    dialect = parts.scheme.partition("+")[0]
    if dialect == "sqlite":
        path = _sqlite_path(uri)
        path.parent.mkdir(parents=True, exist_ok=True)
        writable = path if path.exists() else path.parent
        if not os.access(writable, os.W_OK):
            raise PermissionError(f"no permission to write {writable}")
        _make_whole(path)
    elif dialect in _DATABASE_PORTS and parts.hostname:
        address = (parts.hostname, parts.port or _DATABASE_PORTS[dialect])
        socket.create_connection(address, timeout=_CHECK_SECONDS).close()
    with environment(MLFLOW_HTTP_REQUEST_MAX_RETRIES="1", MLFLOW_HTTP_REQUEST_TIMEOUT=str(_CHECK_SECONDS)):
        client = MlflowClient(uri)
        client.search_experiments(max_results=1)
    return client


def find_run(client: MlflowClient, run_id: str) -> Run | None:
    """A run by its id; None where there is none, it was deleted, or the id is empty."""
    from mlflow.exceptions import MlflowException

    if not run_id:
        return None
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return run if run.info.lifecycle_stage == "active" else None


def read_json(client: MlflowClient, run_id: str, name: str) -> dict[str, Any]:
    """A small artifact of a run; empty where there is none."""
    from mlflow.exceptions import MlflowException

    with tempfile.TemporaryDirectory() as folder:
        try:
            path = client.download_artifacts(run_id, name, folder)
        except (MlflowException, OSError):
            return {}
        content: dict[str, Any] = json.loads(Path(path).read_text())
    return content


@contextlib.contextmanager
def environment(**values: str) -> Iterator[None]:
    """Environment variables set for a while: MLflow reads its time limits from there at every request."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name in values:
            os.environ.pop(name)
        os.environ.update({name: value for name, value in before.items() if value is not None})


def require_mlflow() -> None:
    """Import MLflow, in the thread that asks and not later in another.

    Raises:
        TrackingError: It is not installed.
    """
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # it would print the URI's password, too
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    try:
        import mlflow.exceptions  # noqa: F401 (now, for the time it takes)
        import sqlalchemy.exc  # noqa: F401
    except ImportError as error:
        raise TrackingError(f"tracking must find mlflow, got {error}; install it, or track nothing") from None


@contextlib.contextmanager
def explained(uri: str, remedy: str = "") -> Iterator[None]:
    """Turn whatever the store fails with into one line that names it and says what to do.

    Args:
        uri: Tracking URI; the line shows it without its password.
        remedy: What to do; by default what helps before a run begins.

    Raises:
        TrackingError: In place of what MLflow and its databases raise.
    """
    require_mlflow()
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    default = "check the file and its folder" if uri.startswith("sqlite") else "start the server"
    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError, ImportError) as error:
        raise TrackingError(
            f"tracking store must answer, got none from {mask(uri)} ({one_line(error, kind=False)}); "
            f"{remedy or f'{default}, or track elsewhere or not at all'}"
        ) from None
