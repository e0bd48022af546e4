"""The Ray that a run or a sweep works on: its process's, the cluster at RAY_ADDRESS, or one of its own.

A Ray of our own listens on 127.0.0.1 alone, admits nobody without a token that only this process knows, keeps
its files in a folder of its own, writes nothing to the home folder, and ends with the block that started it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from cosa.storage.files import one_line

GROWS_TO = "COSA_GROWS_TO"
"""Variable that says what a cluster may grow to, CPU=64,GPU=8: Ray does not, so who starts its head does."""

_SETTINGS = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # we show our own progress
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # also how long a report waits to be taken: 2 s by default
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "180",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # journals and MLflow have it all
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is ours
    "TUNE_WARN_THRESHOLD_S": "10",
}
"""What Ray reads from the environment; whoever runs us may have set it otherwise."""
_OWN_SETTINGS = {
    "RAY_worker_niceness": "0",  # Ray's 15 makes workers crawl wherever anything else runs
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # nobody takes this machine back
}
_TOKEN = secrets.token_hex(
    32
)  # without one Ray leaves a token in the home folder, which locks later clusters
_SECRETS = frozenset({"MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"})
"""Ray shows what a job sends along to all who may see the job; a cluster's machines have their own login."""
_OBJECT_STORE = 100 * 2**20  # bytes; nothing of size goes through Ray, whose default is a third of the memory
_CONNECT_SECONDS = 5  # that a cluster has to answer; Ray would try for minutes
_FOLDERS = "cosa-ray-"
_LEFTOVER_SECONDS = 600  # by then the last process of a killed Ray is gone


@contextlib.contextmanager
def ray_session(environment: Mapping[str, str] | None = None, *, dashboard: bool = True) -> Iterator[None]:
    """Ray for as long as the block runs.

    Args:
        environment: What Ray's processes find in theirs, on whatever machine.
        dashboard: Of a Ray of our own. Ray Train inside Tune ends only where it answers; it costs 4 seconds.

    Raises:
        ConnectionError: The cluster at RAY_ADDRESS does not answer, or no Ray started here.
    """
    os.environ.update({name: os.environ.get(name, value) for name, value in _SETTINGS.items()})
    import ray

    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS", "local")
    opened = _own(environment or {}, dashboard) if address == "local" else _joined(address, environment)
    on_terminate = signal.getsignal(signal.SIGTERM)
    with opened:
        if _hears_signals() and callable(on_terminate):
            signal.signal(signal.SIGTERM, on_terminate)  # Ray has put its own there, which prints C++ frames
        yield


@contextlib.contextmanager
def _own(environment: Mapping[str, str], dashboard: bool) -> Iterator[None]:
    """A Ray on this machine that ends with the block and leaves nothing behind."""
    from ray._raylet import Config  # type: ignore[attr-defined]

    home = str(Path(__file__).parents[2])
    os.environ.update(environment)  # inherited by every process of it
    os.environ.update({name: os.environ.get(name, value) for name, value in _OWN_SETTINGS.items()})
    os.environ["PYTHONPATH"] = os.pathsep.join([home, *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=_TOKEN)
    Config.initialize("")  # or a process that has imported Ray before would not send its own token
    _remove_leftovers()
    folder = tempfile.mkdtemp(prefix=f"{_FOLDERS}{os.getpid()}-")
    options = {"include_dashboard": dashboard, "object_store_memory": _OBJECT_STORE, "_temp_dir": folder}
    law, remedy = "Ray must start on this machine", "if the machine is busy, run the same command again"
    try:
        with _loopback_only(), _connected("local", law, remedy, **options):
            yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _joined(address: str, environment: Mapping[str, str] | None) -> Iterator[None]:
    """The cluster at `address`; the actors of this process end with the block."""
    if "://" in address and not address.startswith("ray://"):
        raise ConnectionError(
            f"RAY_ADDRESS must be a cluster's address such as 127.0.0.1:6379, got {address!r}, where jobs "
            "are submitted; unset it, or send the command there: ray job submit --working-dir . -- python ..."
        )
    law = f"a Ray cluster must answer at {address!r} (RAY_ADDRESS)"
    remedy = "start it with `ray start --head`, or unset that"
    found = re.fullmatch(r"(?:ray://)?\[?([^/]+?)\]?:(\d+)", address)  # else `auto`, or what else Ray knows
    if found:
        try:
            socket.create_connection((found[1], int(found[2])), timeout=_CONNECT_SECONDS).close()
        except OSError as error:
            raise ConnectionError(f"{law}, got {one_line(error)}; {remedy}") from None
    options = {"runtime_env": {"env_vars": dict(environment)}} if environment else {}
    with _connected(address, law, remedy, **options):
        yield


@contextlib.contextmanager
def _connected(address: str, law: str, remedy: str, **options: Any) -> Iterator[None]:
    import ray

    try:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.CRITICAL, **options)
        except Exception as error:  # Ray raises bare ones, with pages of its logs
            raise ConnectionError(f"{law}, got {one_line(error)}; {remedy}") from error
        yield
    finally:
        with _undisturbed():
            ray.shutdown()


@contextlib.contextmanager
def _loopback_only() -> Iterator[None]:
    """A Ray that is started in this block has 127.0.0.1 for its address and listens nowhere else.

    Ray does so by itself where it knows no clusters (Windows, macOS). Elsewhere it takes any name of the
    loopback interface for the machine's outer address and listens on all interfaces.
    """
    from ray._private import ray_constants

    name = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
    before = os.environ.get(name), ray_constants.ENABLE_RAY_CLUSTER
    os.environ[name], ray_constants.ENABLE_RAY_CLUSTER = "0", False  # read by its processes, and by this one
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before[1]
        if before[0] is None:
            del os.environ[name]
        else:
            os.environ[name] = before[0]


def _remove_leftovers() -> None:
    """Remove the folders of killed processes' Rays: tens of megabytes each, for ever."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_FOLDERS}*-*"):
        owner = folder.name.removeprefix(_FOLDERS).partition("-")[0]
        with contextlib.suppress(OSError):  # another user's, or just gone
            idle = time.time() - folder.stat().st_mtime > _LEFTOVER_SECONDS
            if owner.isdigit() and idle and not psutil.pid_exists(int(owner)):
                shutil.rmtree(folder, ignore_errors=True)


def _hears_signals() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """No second Ctrl-C while processes are being ended."""
    numbers = (signal.SIGINT, signal.SIGTERM) if _hears_signals() else ()
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def capacity() -> Mapping[str, float]:
    """Most of each resource that the connected cluster will ever have, by Ray's name of it.

    A cluster that grows on demand begins without workers: who asks what is there would be told that nothing
    fits, and would never ask for what makes it grow. Jobs inherit GROWS_TO from the cluster's head.

    Raises:
        ValueError: GROWS_TO is no list of resources.
    """
    import ray

    now: Mapping[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    most = growth(os.environ.get(GROWS_TO, ""))
    return {name: max(now.get(name, 0.0), most.get(name, 0.0)) for name in {*now, *most}}


def growth(text: str) -> Mapping[str, float]:
    """`CPU=64,GPU=8` as numbers by name.

    Raises:
        ValueError: It reads otherwise.
    """
    try:
        pairs = [part.split("=") for part in text.split(",") if part]
        return {name: float(value) for name, value in pairs}
    except ValueError:
        raise ValueError(f"{GROWS_TO} must read like CPU=64,GPU=8, got {text!r}; mend or unset it") from None


@dataclass(frozen=True)
class TrialResources:
    """What each trial of a sweep asks of the cluster, and how many may run at a time."""

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

    @property
    def processes(self) -> int:
        """Processes of a trial that train."""
        return max(1, self.workers)

    @property
    def environment(self) -> dict[str, str]:
        """What a trial's process finds in its environment, on whatever machine."""
        threads = str(max(1, _whole(self.cpus)))  # more threads than cores spin against each other
        return {
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "NO_ALBUMENTATIONS_UPDATE": "1",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "PYTHONUNBUFFERED": "1",
            **{name: os.environ.get(name, value) for name, value in _SETTINGS.items()},
            **{n: v for n, v in os.environ.items() if n.startswith("MLFLOW_") and n not in _SECRETS},
        }


@dataclass(frozen=True)
class Slots:
    """Places in which trials run side by side."""

    cpus: float
    """CPUs of each process of a trial."""
    gpus: float
    """GPUs of each process of a trial."""
    count: int
    """Trials that run at a time."""


@contextlib.contextmanager
def trial_slots(resources: TrialResources) -> Iterator[Slots]:
    """Ray, divided among trials, for as long as the block runs.

    SIGTERM, which is how a Ray job is stopped, ends the block as Ctrl-C does.

    Raises:
        ConnectionError: See `ray_session`.
        ValueError: No trial fits the cluster.
    """
    with ray_session(resources.environment, dashboard=resources.workers > 1):
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        most = capacity()
        yield divide(most.get("CPU", 0.0), most.get("GPU", 0.0), resources)


def divide(cpus: float, gpus: float, resources: TrialResources) -> Slots:
    """The slots that a cluster of `cpus` and `gpus` has for trials.

    Raises:
        ValueError: Not even one trial fits: it would wait for ever.
    """
    processes = resources.processes
    slots = _whole(cpus / (resources.cpus * processes))
    _require_slot(slots, "cpus", resources.cpus * processes, cpus, processes)
    wanted = min(slots, resources.concurrent or slots)
    share = _even_share(gpus, wanted, resources) if resources.gpus is None else resources.gpus
    if share:
        slots = (_whole(gpus / share) if share >= 1 else int(gpus) * _whole(1 / share)) // processes
        _require_slot(slots, "gpus", share * processes, gpus, processes)
    return Slots(resources.cpus, share, min(slots, wanted))


def _require_slot(slots: int, kind: str, asked: float, there: float, processes: int) -> None:
    if slots < 1:
        flag = f"--{kind}-per-trial" + (" x --workers-per-trial" if processes > 1 else "")
        raise ValueError(
            f"{flag} must fit the cluster's {there:g} {kind[:-1].upper()}s, got {asked:g}; "
            "ask for less or join a larger cluster"
        )


def _even_share(gpus: float, trials: int, resources: TrialResources) -> float:
    """Whole GPUs unless more trials at a time were asked for than there are; a process never spans two."""
    if gpus < 1:
        return 0.0
    asked = trials * resources.processes if resources.concurrent else resources.processes
    per_gpu = max(1, -(-asked // int(gpus)))
    return int(10_000 / per_gpu) / 10_000  # Ray counts in ten-thousandths


def _whole(value: float) -> int:
    """The whole part, forgiving the last digits of a division."""
    return int(value + 1e-6)
