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
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import psutil

from cosa.storage.files import one_line, shorten_tmpdir, temporary_folder

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
_TOKEN = secrets.token_hex(32)  # without one Ray leaves one in the home folder, which locks later clusters
_SECRETS = frozenset({"MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"})
"""Ray shows what a job sends along to all who may see the job; a cluster's machines have their own login."""
_OBJECT_STORE = 100 * 2**20  # bytes; nothing of size goes through Ray, whose default is a third of the memory
_CONNECT_SECONDS = 4  # that a cluster has to answer, for the connection and for its first word
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
"""How a client of gRPC, which Ray speaks, begins (RFC 9113, 3.4); the server answers with such a frame."""
_SETTINGS_FRAME = 4
SPARE = 0.15
"""Part of a GPU's memory that packed trials leave free."""
_CONTEXT_GIB = 1.0
"""What a process holds of a GPU beside its tensors, whose peak is measured: CUDA's context, unused blocks."""
_ASK_SECONDS = 60.0  # a worker of Ray that imports torch on a busy machine
_FOLDERS = "cosa-ray-"
_SOCKET = "/cosa-ray-1234567-abcdefgh/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store"
_LEFTOVER_SECONDS = 600  # by then the last process of a killed Ray is gone


@contextlib.contextmanager
def ray_session(environment: Mapping[str, str] | None = None, *, dashboard: bool = True) -> Iterator[None]:
    """Ray for as long as the block runs.

    Args:
        environment: What Ray's processes find in theirs, on whatever machine.
        dashboard: Of a Ray of our own. Ray Train inside Tune ends only where it answers; it costs 4 seconds.

    Raises:
        ConnectionError: The cluster at RAY_ADDRESS does not answer, or no Ray started here.
        OSError: TMPDIR is too long for Ray's sockets, and there is no other folder for them.
    """
    os.environ.update({**_SETTINGS, **os.environ})
    import ray

    if ray.is_initialized():
        yield
        return
    address = require_cluster()
    on_terminate = signal.getsignal(signal.SIGTERM)
    with contextlib.ExitStack() as stack:
        options: dict[str, Any] = {}
        if address == "local":
            _prepare_own(environment or {})
            prefix, place = f"{_FOLDERS}{os.getpid()}-", temporary_folder(_SOCKET)
            folder = stack.enter_context(
                TemporaryDirectory(prefix=prefix, dir=place, ignore_cleanup_errors=True)
            )
            options |= {"include_dashboard": dashboard, "_temp_dir": folder}
            options["object_store_memory"] = _OBJECT_STORE
        elif environment:
            options["runtime_env"] = {"env_vars": dict(environment)}
        hears = threading.current_thread() is threading.main_thread()
        stack.callback(_shutdown, (signal.SIGINT, signal.SIGTERM) if hears else ())
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.CRITICAL, **options)
        except Exception as error:  # Ray raises bare ones, with pages of its logs
            raise _unanswered(address, error) from error
        if hears and callable(on_terminate):
            signal.signal(signal.SIGTERM, on_terminate)  # Ray has put its own there, which prints C++ frames
        yield


def require_cluster() -> str:
    """Ask the cluster at RAY_ADDRESS for its first word; Ray would try for minutes, in lines of its log.

    Returns:
        The address, `local` where there is to be a Ray of our own.

    Raises:
        ConnectionError: It does not answer, or is not the address of a cluster.
    """
    address = os.environ.get("RAY_ADDRESS") or "local"
    if "://" in address and not address.startswith("ray://"):
        raise ConnectionError(
            f"RAY_ADDRESS must be a cluster's address such as 127.0.0.1:6379, got {address!r}, where jobs "
            "are submitted; unset it, or send the command there: ray job submit --working-dir . -- python ..."
        )
    try:
        if address != "local":
            _require_answer(address)
    except (OSError, ValueError) as error:
        raise _unanswered(address, error) from None
    return address


def _unanswered(address: str, error: Exception) -> ConnectionError:
    law, remedy = (
        f"a Ray cluster must answer at {address!r} (RAY_ADDRESS)",
        "start it with `ray start --head`, or unset that",
    )
    if address == "local":
        law, remedy = "Ray must start on this machine", "if the machine is busy, run the same command again"
    return ConnectionError(f"{law}, got {one_line(error)}; {remedy}")


def _require_answer(address: str) -> None:
    """Refuse an address at which nothing answers, or something that is not Ray.

    Raises:
        OSError, ValueError: What was there instead.
    """
    if address == "auto":  # the cluster that was last started here, if it still runs
        from ray._private.services import canonicalize_bootstrap_address

        address = canonicalize_bootstrap_address(address) or ""
    place = re.fullmatch(r"(?:ray://)?\[?([^/]+?)\]?:(\d+)", address)  # else what else Ray knows
    if place is None:
        return
    with socket.create_connection((place[1], int(place[2])), timeout=_CONNECT_SECONDS) as asked:
        if os.environ.get("RAY_USE_TLS", "0") != "0":
            return  # says nothing before both have shown their certificates
        asked.sendall(_HELLO)
        try:
            answer = asked.recv(4)
        except TimeoutError:
            raise TimeoutError(f"a port that is open and says nothing for {_CONNECT_SECONDS} s") from None
        if len(answer) < 4 or answer[3] != _SETTINGS_FRAME:
            raise ConnectionError("an answer that is not Ray's")


def _prepare_own(environment: Mapping[str, str]) -> None:
    """Set this process up for a Ray of its own: loopback alone, a token, an environment, no leftovers.

    Ray keeps to 127.0.0.1 by itself where it knows no clusters (Windows, macOS). Elsewhere it takes any name
    of the loopback interface for the machine's outer address and listens on all interfaces.
    """
    from ray._private import ray_constants
    from ray._raylet import Config  # type: ignore[attr-defined]

    home = str(Path(__file__).parents[2])
    shorten_tmpdir()
    os.environ.update(environment)  # inherited by every process of it
    os.environ.update({**_OWN_SETTINGS, **os.environ})
    os.environ["PYTHONPATH"] = os.pathsep.join([home, *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=_TOKEN, RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0")
    # A process that has imported Ray before would know of neither.
    Config.initialize("")
    ray_constants.ENABLE_RAY_CLUSTER = False
    _remove_leftovers()


def _remove_leftovers() -> None:
    """Remove the folders of killed processes' Rays: tens of megabytes each, for ever."""
    for folder in Path(temporary_folder(_SOCKET)).glob(f"{_FOLDERS}*-*"):
        owner = folder.name.removeprefix(_FOLDERS).partition("-")[0]
        with contextlib.suppress(OSError):  # another user's, or just gone
            idle = time.time() - folder.stat().st_mtime > _LEFTOVER_SECONDS
            if owner.isdigit() and idle and not psutil.pid_exists(int(owner)):
                shutil.rmtree(folder, ignore_errors=True)


def _shutdown(numbers: Sequence[signal.Signals]) -> None:
    """End what this process has of Ray; none of the signals `numbers` disturbs that."""
    import ray

    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        ray.shutdown()
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
        return {name: float(value) for name, value in (part.split("=") for part in text.split(",") if part)}
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
    concurrent: int | Literal["auto"] | None = None
    """Most trials at a time; None takes as many as fit with a GPU each, `auto` as its memory holds."""

    def __post_init__(self) -> None:
        for flag, value, least in (
            ("gpus-per-trial", self.gpus, 0),
            ("workers-per-trial", self.workers, 0),
            ("max-concurrent", self.concurrent, 1),
        ):
            if value is not None and value != "auto" and value < least:
                raise ValueError(f"--{flag} must be >= {least}, got {value:g}")
        if self.cpus <= 0:
            raise ValueError(f"--cpus-per-trial must be > 0, got {self.cpus:g}")

    @property
    def most(self) -> int | None:
        """Most trials at a time, where it is a number."""
        return None if self.concurrent == "auto" else self.concurrent

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
    gpu_gib: float = 0.0
    """Memory of the smallest GPU, where trials were packed by it."""


@contextlib.contextmanager
def trial_slots(resources: TrialResources, gib: float | None = None) -> Iterator[Slots]:
    """Ray, divided among trials, for as long as the block runs.

    SIGTERM, which is how a Ray job is stopped, ends the block as Ctrl-C does.

    Args:
        resources: What each trial asks for.
        gib: Memory that a trial takes of its GPU; as many share one as it holds. None has them share none.

    Raises:
        ConnectionError: See `ray_session`.
        ValueError: No trial fits the cluster.
    """
    with ray_session(resources.environment, dashboard=resources.workers > 1):
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        most = capacity()
        cpus, gpus = most.get("CPU", 0.0), most.get("GPU", 0.0)
        # ranks of one trial need a GPU each: NCCL has no two on one
        packs = gib is not None and gpus >= 1 and resources.gpus is None and resources.processes == 1
        memory = _least_gpu_gib() if packs else 0.0
        packed = in_memory(memory, gib) if gib is not None and memory else 0
        yield replace(divide(cpus, gpus, resources, packed), gpu_gib=memory)


def in_memory(gpu_gib: float, gib: float) -> int:
    """Processes of `gib` each that a GPU of `gpu_gib` holds with `SPARE` of it left over; at least 1."""
    return max(1, _whole((1 - SPARE) * gpu_gib / (gib + _CONTEXT_GIB)))


def _least_gpu_gib() -> float:
    """Memory of the smallest GPU of the connected cluster, by one of each machine; 0 where nobody tells."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def ask() -> float:
        import torch

        return float(torch.cuda.get_device_properties(0).total_memory / 2**30)

    remote: Any = ray.remote(num_cpus=0, num_gpus=0.01)(ask)
    there: list[Any] = ray.nodes()  # type: ignore[no-untyped-call]
    nodes = [node["NodeID"] for node in there if node["Alive"] and node["Resources"].get("GPU")]
    asked = [
        remote.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote()
        for node in nodes
    ]
    try:
        return min(ray.get(asked, timeout=_ASK_SECONDS), default=0.0)
    except ray.exceptions.RayError:  # late, or without a driver
        return 0.0


def divide(cpus: float, gpus: float, resources: TrialResources, packed: int = 0) -> Slots:
    """The slots that a cluster of `cpus` and `gpus` has for trials.

    Args:
        cpus: All there are.
        gpus: All there are.
        resources: What each trial asks for.
        packed: Processes that the memory of each GPU holds, for trials to be packed so; else 0.

    Raises:
        ValueError: Not even one trial fits: it would wait for ever.
    """
    processes, share = resources.processes, resources.gpus
    slots = _places("cpus", cpus, resources.cpus, processes)
    slots = min(slots, resources.most or slots)
    if share is None:  # a process never spans two GPUs, and has a whole one unless more trials are asked for
        asked = slots * processes if resources.most or packed else processes
        per_gpu = max(1, -(-asked // max(1, int(gpus))))
        per_gpu = min(per_gpu, packed or per_gpu)
        share = int(10_000 / per_gpu) / 10_000 if gpus >= 1 else 0.0  # Ray counts in ten-thousandths
    if share:
        slots = min(slots, _places("gpus", gpus, share, processes))
    return Slots(resources.cpus, share, slots)


def _places(kind: str, there: float, asked: float, processes: int) -> int:
    """Trials that have room side by side, each with `asked` of a kind for each of its processes.

    Raises:
        ValueError: Not even one.
    """
    whole = kind == "gpus" and asked < 1
    room = int(there) * _whole(1 / asked) if whole else _whole(there / asked)
    if room < processes:
        flag = f"--{kind}-per-trial" + (" x --workers-per-trial" if processes > 1 else "")
        raise ValueError(
            f"{flag} must fit the cluster's {there:g} {kind[:-1].upper()}s, got {asked * processes:g}; "
            "ask for less or join a larger cluster"
        )
    return room // processes


def _whole(value: float) -> int:
    """The whole part, forgiving the last digits of a division."""
    return int(value + 1e-6)
