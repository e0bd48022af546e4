"""The Ray that a sweep runs on: its own on this machine, or the cluster it was told of or submitted to.

A Ray of our own listens on 127.0.0.1 alone, admits nobody without a token that only this sweep knows, keeps
its files in a folder of its own, writes nothing to the home folder, and ends with the sweep.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from cosa.distributed.capacity import capacity
from cosa.distributed.loopback import loopback_only

_QUIET = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # the sweep shows its own progress
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # journals and MLflow have it all
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is ours
    "TUNE_WARN_THRESHOLD_S": "10",
}
_SECRETS = frozenset({"MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"})
"""Ray shows what a job sends along to all who may see the job; a cluster's machines have their own login."""
_OBJECT_STORE = 100 * 2**20  # bytes; trials pass no data through Ray
_SESSIONS = "cosa-ray-"
_LEFTOVER_SECONDS = 600  # by then the last process of a killed sweep's Ray is gone


@dataclass(frozen=True)
class Request:
    """What each trial asks of the cluster, and how many may run at a time."""

    cpus: float = 1.0
    """CPUs of each process of a trial, > 0."""
    gpus: float | None = None
    """GPUs of each process, a part of one allowed; None shares out the GPUs there are."""
    workers: int = 1
    """Data-parallel processes of a trial; 0 and 1 train in the trial's own."""
    concurrent: int | None = None
    """Most trials at a time; None takes as many as fit."""

    def __post_init__(self) -> None:
        if self.cpus <= 0:
            raise ValueError(f"--cpus-per-trial must be > 0, got {self.cpus:g}")
        if self.gpus is not None and self.gpus < 0:
            raise ValueError(f"--gpus-per-trial must be >= 0, got {self.gpus:g}")
        if self.workers < 0:
            raise ValueError(f"--workers-per-trial must be >= 0, got {self.workers}")
        if self.concurrent is not None and self.concurrent < 1:
            raise ValueError(f"--max-concurrent must be >= 1, got {self.concurrent}")


@dataclass(frozen=True)
class Allotment:
    """What each trial gets."""

    cpus: float
    gpus: float
    slots: int
    """Trials that run at a time."""


def allot(request: Request, cpus: float, gpus: float) -> Allotment:
    """Divide a cluster of `cpus` and `gpus` among trials.

    Raises:
        ValueError: Not even one trial fits: it would wait for ever.
    """
    processes = max(1, request.workers)
    flag = "" if processes == 1 else " x --workers-per-trial"
    remedy = "ask for less or join a larger cluster"
    slots = _whole(cpus / (request.cpus * processes))
    if slots < 1:
        asked = f"{request.cpus * processes:g}"
        raise ValueError(
            f"--cpus-per-trial{flag} must fit the cluster's {cpus:g} CPUs, got {asked}; {remedy}"
        )
    wanted = min(slots, request.concurrent or slots)
    share = _even_share(gpus, wanted, request) if request.gpus is None else request.gpus
    if share:
        slots = _gpu_slots(gpus, share) // processes
        if slots < 1:
            asked = f"{share * processes:g}"
            raise ValueError(
                f"--gpus-per-trial{flag} must fit the cluster's {gpus:g} GPUs, got {asked}; {remedy}"
            )
    return Allotment(request.cpus, share, min(slots, wanted))


def _even_share(gpus: float, trials: int, request: Request) -> float:
    """Whole GPUs unless more trials at a time were asked for than there are; a process never spans two."""
    if gpus < 1:
        return 0.0
    processes = max(1, request.workers)
    asked = trials * processes if request.concurrent else processes
    per_gpu = max(1, -(-asked // int(gpus)))
    return int(10_000 / per_gpu) / 10_000  # Ray counts in ten-thousandths


def _gpu_slots(gpus: float, share: float) -> int:
    return _whole(gpus / share) if share >= 1 else int(gpus) * _whole(1 / share)


def _whole(value: float) -> int:
    """The whole part, forgiving the last digits of a division."""
    return int(value + 1e-6)


@contextlib.contextmanager
def connected(request: Request) -> Iterator[Allotment]:
    """Ray, up and divided among trials, for as long as the block runs.

    The cluster at RAY_ADDRESS is joined (a Ray job finds its own there), else one is started here. SIGTERM,
    which is how a Ray job is stopped, ends the block as Ctrl-C does.

    Raises:
        ConnectionError: The cluster does not answer.
        ValueError: No trial fits the cluster.
    """
    joined = bool(os.environ.get("RAY_ADDRESS"))
    opened = _join(request) if joined else _own(request)
    with opened:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray has just put its own there
        logging.getLogger("ray").setLevel(logging.CRITICAL)  # a failed trial's traceback is in its log
        resources = capacity()
        yield allot(request, resources.get("CPU", 0.0), resources.get("GPU", 0.0))


@contextlib.contextmanager
def _own(request: Request) -> Iterator[None]:
    """A Ray on this machine that ends with the block and leaves nothing behind."""
    _keep_quiet()
    os.environ.update(_worker_environment(request))  # inherited by every process of it
    home = str(Path(__file__).parents[2])
    os.environ["PYTHONPATH"] = os.pathsep.join([home, *filter(None, [os.environ.get("PYTHONPATH")])])
    # Without a mode Ray writes a token to the home folder, which locks later clusters of this user.
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    import ray

    _remove_leftovers()
    folder = tempfile.mkdtemp(prefix=f"{_SESSIONS}{os.getpid()}-")
    try:
        with loopback_only():
            _start(folder, dashboard=request.workers > 1)
            yield
    finally:
        with _undisturbed():
            ray.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


def _start(folder: str, *, dashboard: bool) -> None:
    import ray

    try:
        ray.init(
            address="local",
            # Trials of several workers end only where the dashboard answers; else it costs four seconds.
            include_dashboard=dashboard,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=_OBJECT_STORE,
            _temp_dir=folder,
        )
    except Exception as error:  # Ray has no narrower type for it
        reason = str(error).strip().partition("\n")[0]
        raise ConnectionError(
            f"Ray must start on this machine, got: {reason} If the machine is busy, "
            f"run the same command again"
        ) from error


def _remove_leftovers() -> None:
    """Remove the session folders of sweeps that were killed: tens of megabytes each, for ever."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_SESSIONS}*-*"):
        owner = folder.name.removeprefix(_SESSIONS).partition("-")[0]
        with contextlib.suppress(OSError):  # another user's, or just gone
            idle = time.time() - folder.stat().st_mtime > _LEFTOVER_SECONDS
            if owner.isdigit() and idle and not psutil.pid_exists(int(owner)):
                shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _join(request: Request) -> Iterator[None]:
    """The cluster at RAY_ADDRESS; the sweep's own actors end with the block."""
    address = os.environ["RAY_ADDRESS"]
    if "://" in address and not address.startswith("ray://"):
        raise ConnectionError(
            f"RAY_ADDRESS must be a cluster's address such as 127.0.0.1:6379, got {address!r}, where jobs "
            f"are submitted; unset it, or send the sweep there: ray job submit --working-dir . -- python ..."
        )
    _keep_quiet()
    import ray

    try:
        ray.init(
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": _worker_environment(request)},
        )
    except (ConnectionError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConnectionError(
            f"the Ray cluster must answer, got none at {address!r} ({reason}); start it with "
            f"`ray start --head`, or unset RAY_ADDRESS"
        ) from None
    try:
        yield
    finally:
        with _undisturbed():
            ray.shutdown()


def _keep_quiet() -> None:
    os.environ.update({name: os.environ.get(name, value) for name, value in _QUIET.items()})


def _worker_environment(request: Request) -> dict[str, str]:
    """What a trial's process finds in its environment, on whatever machine."""
    threads = str(max(1, _whole(request.cpus)))  # more threads than cores spin against each other
    quiet = {name: os.environ[name] for name in _QUIET}
    tracking = {
        name: value
        for name, value in os.environ.items()
        if name.startswith("MLFLOW_") and name not in _SECRETS
    }
    return {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "NO_ALBUMENTATIONS_UPDATE": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PYTHONUNBUFFERED": "1",
        **quiet,
        **tracking,
    }


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """No second Ctrl-C while processes are being ended."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
