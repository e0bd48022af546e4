"""Ray Train around `trainer.train`: the same run on N workers; the only file of cosa that knows Ray.

How N workers agree: each takes a contiguous share of every batch, so together they see the images that one
process would see. Gradients are averaged over the shares; the normaliser of RAW, the denominators of the
losses and the histograms behind both thresholds are summed over all workers before anything is derived from
them. The number of workers therefore changes nothing but rounding.

How a run survives: the trainer's own checkpoints in `out` are the one truth. A worker that dies takes its
group with it; Ray starts a new group, and the trainer goes on from the newest checkpoint. What Ray itself
keeps, in `out/ray`, are its notes of this one attempt: metrics and a pointer to each checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import logging
import os
import queue
import re
import secrets
import shutil
import signal
import socket
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cosa.config import Config, identity, override
from cosa.distributed.capacity import capacity
from cosa.distributed.loopback import loopback_only
from cosa.tracking import TrackingError, initialise_store, resolve_uri
from cosa.tracking.provenance import source_tags
from cosa.training.stop import StopCheck, StopFile, StoppedError, StopSignal, never
from cosa.training.trainer import NonFiniteLossError, Result, RunSpec, TrainProgress, ignore, train

_log = logging.getLogger(__name__)
_ray: Any = ray  # partly without annotations
_ray_train: Any = ray.train  # its annotations describe the first version of Train; what runs is the second

_CPUS_PER_WORKER = 0.9  # below one, so that a Tune trial's own sliver of a CPU leaves room for its workers
_OBJECT_STORE = 128 * 2**20  # bytes; nothing of size goes through Ray, whose default is a third of the memory
_POLL_SECONDS = 0.5
_STOP_SECONDS = 60
_CONNECT_SECONDS = 10

# What Ray reads from the environment; whoever runs us may have set it otherwise.
_ENVIRONMENT = {
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # also how long a report waits to be taken: 2 s by default
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "180",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}
_LOCAL_ENVIRONMENT = {
    "RAY_worker_niceness": "0",  # Ray's 15 makes workers crawl wherever anything else runs
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # nobody takes this machine back
}


class WorkerError(RuntimeError):
    """Workers died more often than is forgiven; the message is one line."""


@dataclass(frozen=True)
class _Begun:
    """The first worker has begun; by its actor the run can be ended at once."""

    worker: Any


@dataclass(frozen=True)
class _Line:
    """A line of a worker's log."""

    level: int
    text: str


_Message = TrainProgress | _Begun | Exception | _Line
"""What a worker tells whoever follows the run."""


class _FinalError(Exception):
    """Raised in a worker for what no restart can mend."""


@dataclass(frozen=True)
class _Job:
    """What every worker is told."""

    spec: RunSpec
    token: str
    messages: Queue

    @property
    def out(self) -> Path:
        """The run's folder."""
        return self.spec.storage.folder

    @property
    def stop_file(self) -> StopFile:
        """How whoever follows the run tells its workers to stop."""
        return StopFile(self.out / "ray" / "stop")


def fit(
    spec: RunSpec,
    *,
    workers: int,
    report: Callable[[TrainProgress], object] = ignore,
    should_stop: StopCheck = never,
    max_failures: int = 3,
    address: str = "local",
) -> Result:
    """Train on `workers` processes through Ray Train.

    Each has a GPU and speaks NCCL where the cluster has GPUs, else a CPU and gloo. The same `config` and
    `out` resume, whatever the number of workers was before.

    Args:
        spec: What to train; `out` lies where this process and all workers reach it under the same path, or is
            a URL: each machine then has a working folder of its own. The first worker tracks the run.
        workers: Processes, >= 1; must divide `train.batch_size`.
        report: Called in this process with the progress of the first worker; what it raises ends the run.
        should_stop: Asked in this process, twice a second; the signal to stop is passed on to the workers.
        max_failures: How many times workers may die before the run is given up.
        address: Cluster to join where this process is in none yet; `local` starts one for this run alone.

    Raises:
        WorkerError: Workers died too often, or Ray could not start them.
        StoppedError: `should_stop` said so; the checkpoint of the last step is saved.
        ValueError: More workers than the cluster has room for, or whatever `trainer.train` refuses.
        TrackingError, NonFiniteLossError, OSError: As `trainer.train` raises them.
    """
    if workers < 1:
        raise ValueError(f"workers must be >= 1, got {workers}; trainer.train needs no Ray for one process")
    spec = _portable(spec)
    out = spec.storage.folder
    try:
        with ray_instance(address):
            gpus = _check_resources(workers)
            messages = _queue_here()
            job = _Job(spec, secrets.token_hex(8), messages)
            try:
                _mark_storage(out, job.token)
                return _follow(_trainer(job, workers, max_failures, gpus=gpus), job, report, should_stop)
            finally:
                messages.shutdown(force=True)
    except (KeyboardInterrupt, SystemExit):
        spec.tracking.close(out, "KILLED")
        raise
    except WorkerError:
        spec.tracking.close(out, "FAILED")
        raise


@contextlib.contextmanager
def ray_instance(address: str = "local") -> Iterator[None]:
    """A connection to Ray: the one this process has, else to `address`, ended afterwards.

    `local` starts an instance for this process alone, on 127.0.0.1 and locked by a random token, which stays
    in this process's environment: Ray's own way would leave one in the home folder, and a later `ray start`
    would silently ask everybody for it. The dashboard stays on: without it Train inside Tune never finishes.

    Raises:
        WorkerError: No cluster answers at `address`, or none could be started.
    """
    _set_environment(_ENVIRONMENT)
    if ray.is_initialized():
        yield
        return
    on_terminate = signal.getsignal(signal.SIGTERM)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    if address == "local":
        _set_environment({**_LOCAL_ENVIRONMENT, "RAY_AUTH_TOKEN": secrets.token_hex(32)})
        options |= {"dashboard_host": "127.0.0.1", "include_dashboard": True}
        options |= {"object_store_memory": _OBJECT_STORE}
    else:
        _check_address(address)
    with loopback_only() if address == "local" else contextlib.nullcontext():
        try:
            ray.init(address=address, **options)
        except Exception as error:  # Ray raises bare ones, with pages of its logs
            where = "start on this machine" if address == "local" else f"run at {address!r}"
            raise WorkerError(f"Ray must {where}, got {_one_line(error)}") from error
        if callable(on_terminate) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_terminate)  # Ray has put its own there, which prints C++ frames
        try:
            yield
        finally:
            ray.shutdown()


def _check_address(address: str) -> None:
    """Refuse a cluster that does not answer; Ray would try for minutes."""
    found = re.fullmatch(r"(?:ray://)?([^/:]+):(\d+)", address)
    if found is None:
        return  # `auto`, or another form that Ray knows
    try:
        socket.create_connection((found[1], int(found[2])), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        raise WorkerError(
            f"a Ray cluster must answer at {address!r} (RAY_ADDRESS), got {error}; start it or unset that"
        ) from None


def _set_environment(values: Mapping[str, str]) -> None:
    for name, value in values.items():
        os.environ.setdefault(name, value)


def _check_resources(workers: int) -> bool:
    """Whether workers get a GPU each; refuses more workers than the cluster will ever have room for.

    Ray would wait for them without a word.
    """
    cluster = capacity()
    gpus = int(cluster.get("GPU", 0))
    most, kind = (gpus, "GPU") if gpus else (int(cluster.get("CPU", 0)), "CPU")
    if workers > most:
        raise ValueError(
            f"workers must be at most {most}, the {kind}s of the Ray cluster, got {workers}; "
            f"use fewer workers or add machines"
        )
    free = _ray.available_resources().get(kind, 0)
    if free < workers * (1 if gpus else _CPUS_PER_WORKER):
        _log.warning("waiting for %s %ss of the Ray cluster: others use all but %s", workers, kind, free)
    return gpus > 0


def _portable(spec: RunSpec) -> RunSpec:
    """`spec` with what only this process knows: absolute paths, and the commit, which jobs leave behind.

    The store is met here first, so that one that does not answer is told before anything starts.
    """
    tracking = spec.tracking
    if tracking.uri:
        initialise_store(tracking.uri, tracking.experiment)
        tags = {**source_tags(), **tracking.tags}
        tracking = dataclasses.replace(tracking, uri=resolve_uri(tracking.uri), tags=tags)
    storage = spec.storage
    return dataclasses.replace(
        spec,
        config=_absolute_paths(spec.config),
        out=storage.url or storage.folder,
        work_folder=str(storage.folder),
        fork_from=spec.fork_from.absolute() if spec.fork_from else None,
        tracking=tracking,
    )


def _queue_here() -> Queue:
    """A queue that lives on this machine, so that the loss of another one does not end the run."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})


def _absolute_paths(config: Config) -> Config:
    """`config` with its paths made absolute, since workers run in folders of their own."""
    changes = {
        "data.root": str(Path(config.data.root).expanduser().absolute()),
        "data.cache": str(Path(config.data.cache).expanduser().absolute()),
    }
    if config.data.archive and "://" not in config.data.archive:
        changes["data.archive"] = str(Path(config.data.archive).expanduser().absolute())
    if config.network.weights:
        changes["network.weights"] = str(Path(config.network.weights).expanduser().absolute())
    return override(config, changes)


def _mark_storage(out: Path, token: str) -> None:
    """Leave `token` in a fresh `out/ray`; what Ray noted of an earlier attempt must not steer this one."""
    folder = out / "ray"
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / "token").write_text(token)


def _check_storage(out: Path, token: str) -> None:
    """Refuse a worker whose `out` is another folder than that of whoever started the run."""
    path = out / "ray" / "token"
    if not path.is_file() or path.read_text() != token:
        raise ValueError(
            f"out must lie on storage that every worker reaches, got {str(out)!r}, which is not the same "
            f"folder on {_ray.util.get_node_ip_address()}; choose a shared folder"
        )


def _trainer(job: _Job, workers: int, max_failures: int, *, gpus: bool) -> Any:
    resources = {"CPU": _CPUS_PER_WORKER, "GPU": 1} if gpus else {"CPU": _CPUS_PER_WORKER}
    trainer: Any = TorchTrainer
    return trainer(
        _Worker(job),
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        scaling_config=_ray_train.ScalingConfig(
            num_workers=workers, use_gpu=gpus, resources_per_worker=resources
        ),
        run_config=_ray_train.RunConfig(
            name=f"{job.out.name}-{identity(job.spec.config)[:8]}",
            storage_path=str(job.out / "ray"),
            callbacks=[_Watch(job.messages)],
            checkpoint_config=_ray_train.CheckpointConfig(num_to_keep=1),
            failure_config=_ray_train.FailureConfig(max_failures=max_failures, controller_failure_limit=0),
            # One thread each: workers that share cores are many times slower with more.
            worker_runtime_env={"env_vars": {} if gpus else {"OMP_NUM_THREADS": "1"}},
        ),
    )


class _Watch(ray.train.UserCallback):
    """Runs beside Ray's controller, where an exception ends the run without another attempt."""

    def __init__(self, messages: Queue) -> None:
        self.messages = messages

    def after_exception(
        self,
        run_context: object,  # noqa: ARG002 (Ray passes both by name)
        worker_exceptions: dict[int, Exception],
    ) -> None:
        """Called with what the workers failed with, by rank; one that was killed has an error of Ray's."""
        for error in worker_exceptions.values():
            if isinstance(error, _FinalError):
                raise error
        rank, error = min(worker_exceptions.items())
        text = f"worker {rank} failed, all go on from the newest checkpoint: {_one_line(error)}"
        _publish(self.messages, _Line(logging.WARNING, text))


@dataclass(frozen=True)
class _Worker:
    """What runs in each worker; a callable object rather than a config, which Ray would show to others."""

    job: _Job

    def __call__(self) -> Result:
        job = self.job
        first = ray.train.get_context().get_world_rank() == 0
        try:
            if first:
                _publish(job.messages, _Begun(ray.get_runtime_context().current_actor))
            if not job.spec.storage.url:
                _check_storage(job.out, job.token)
            with _forwarded_log(job.messages) if first else contextlib.nullcontext():
                return train(
                    job.spec,
                    report=lambda progress: _report(progress, job, first=first),
                    should_stop=_stop_check(job),
                )
        except Exception as error:
            if isinstance(error, _FinalError) or not _is_final(error):
                raise
            error.add_note(traceback.format_exc())  # of this process; travels with the error
            _publish(job.messages, error)
            raise _FinalError(_one_line(error)) from error


def _stop_check(job: _Job) -> StopCheck:
    """Whether a worker is to stop, or to save because Ray has word that a machine will be taken back.

    Ray goes on after the loss of a machine from the newest checkpoint, as soon as there is another. Every
    worker must ask equally often: for the word of a loss they wait for each other.
    """
    stop_file, warned = job.stop_file, False

    def should_stop() -> StopSignal:
        nonlocal warned
        signal = stop_file.check()
        if not warned and _ray_train.get_preemption_info() is not None:
            warned = True
            signal = max(signal, StopSignal.SAVE)
        return signal

    return should_stop


_LASTING = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENOTDIR}


def _is_final(error: Exception) -> bool:
    """Whether another attempt is in vain: mistakes and bugs stay, a peer that was lost comes back.

    torch reports a lost peer as a RuntimeError, Ray as a RayError.
    """
    match error:
        case StoppedError() | TrackingError() | NonFiniteLossError() | torch.OutOfMemoryError():
            return True
        case OSError():
            return error.errno is None or error.errno in _LASTING
        case RuntimeError() | ray.exceptions.RayError():
            return False
    return True


def _report(progress: TrainProgress, job: _Job, *, first: bool) -> None:
    """Tell Ray, which waits here until every worker does, and whoever follows the run.

    Ray keeps what it is told of checkpoints in a folder that all machines reach: with a URL there is none.
    """
    metrics = {"step": progress.step, **progress.metrics}
    if first and progress.checkpoint and not job.spec.storage.url:
        with tempfile.TemporaryDirectory() as folder:
            pointer = {"path": str(progress.checkpoint), "step": progress.step}
            (Path(folder) / "checkpoint.json").write_text(json.dumps(pointer) + "\n")
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))
    else:
        ray.train.report(metrics)
    if first:
        _publish(job.messages, progress)


def _publish(messages: Queue, message: _Message) -> None:
    try:
        messages.put(message)
    except ray.exceptions.RayActorError:
        raise _FinalError("whoever started the run is gone") from None


@contextlib.contextmanager
def _forwarded_log(messages: Queue) -> Iterator[None]:
    """Send cosa's log to whoever follows the run: a worker's own output ends in a file of Ray's."""
    handler = _QueueHandler(messages)
    logger = logging.getLogger("cosa")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class _QueueHandler(logging.Handler):
    def __init__(self, messages: Queue) -> None:
        super().__init__(logging.INFO)
        self.messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        """Send the text of one record."""
        _publish(self.messages, _Line(record.levelno, record.getMessage()))


def _follow(
    trainer: Any, job: _Job, report: Callable[[TrainProgress], object], should_stop: StopCheck
) -> Result:
    """Run `trainer` to its end in a thread, passing on here what the first worker tells.

    In the main thread Ray would take over Ctrl-C and go on for seconds.
    """
    ended: list[Any] = []

    def run() -> None:
        try:
            ended.append(trainer.fit())
        except Exception as error:  # noqa: BLE001 (raised again in the thread that waits)
            ended.append(error)

    thread = threading.Thread(target=run, name="ray-train", daemon=True)
    thread.start()
    failures: list[Exception] = []
    worker, messages = None, job.messages
    try:
        running = True
        while running:
            running = thread.is_alive()  # looked at first, so that the last messages are read after the end
            if should_stop() == StopSignal.STOP:
                job.stop_file.give()
            for message in _received(messages):
                match message:
                    case _Begun():
                        worker = message.worker
                    case Exception():
                        failures.append(message)
                    case _Line():
                        _log.log(message.level, "%s", message.text)
                    case TrainProgress():
                        report(message)
    except BaseException:
        _stop(thread, messages, worker)
        raise
    if failures:
        raise failures[0]
    if isinstance(ended[0], Exception):
        raise _explain(ended[0]) from ended[0]
    result: Result = ended[0].return_value
    return result


def _stop(thread: threading.Thread, messages: Queue, worker: Any) -> None:
    """End a run early: without its queue no worker goes on, and without a worker the group ends.

    Waited for, since Ray ends a process that leaves it while a thread still waits for it.
    """
    messages.shutdown(force=True)
    if worker is not None:
        ray.kill(worker)
    thread.join(timeout=_STOP_SECONDS)


def _received(messages: Queue) -> Iterator[_Message]:
    """What has been told, waiting a moment for the first of it."""
    seconds = _POLL_SECONDS
    with contextlib.suppress(queue.Empty):
        while True:
            yield messages.get(timeout=seconds)
            seconds = 0.01


def _explain(error: Exception) -> Exception:
    """One line for what Ray Train raises; anything else as it is."""
    if isinstance(error, ray.train.WorkerGroupError):
        rank, first = min(error.worker_failures.items())
        return WorkerError(f"worker {rank} failed: {_one_line(first)}")
    if isinstance(error, ray.train.ControllerError):
        return WorkerError(f"Ray Train failed: {_one_line(error.controller_failure)}")
    if isinstance(error, ray.exceptions.RayError):  # its last line is the cause in the other process
        return WorkerError(f"Ray failed: {_one_line(error)} {str(error).strip().splitlines()[-1]}")
    return error


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:300]
