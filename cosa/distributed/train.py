"""Ray Train around `trainer.train`: the same run on N workers.

How N workers agree: each takes a contiguous share of every batch, so together they see the images that one
process would see. Gradients are averaged over the shares; the normaliser of RAW, the denominators of the
losses and the histograms behind both thresholds are summed over all workers before anything is derived from
them. The number of workers therefore changes nothing but rounding.

How a run survives: the trainer's own checkpoints in `out` are the one truth. A worker that dies takes its
group with it; Ray starts a new group, and the trainer goes on from the newest checkpoint. Ray itself is told
of metrics alone; its notes of this one attempt lie in `out/ray`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import queue
import secrets
import shutil
import threading
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from logging.handlers import QueueHandler
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.actor import ActorHandle
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cosa.config import Config, flatten, identity, override
from cosa.distributed.session import capacity, ray_session
from cosa.storage.files import one_line
from cosa.tracking import TrackingError, initialise_store, resolve_uri
from cosa.tracking.provenance import source_tags
from cosa.training.stop import StopCheck, StopFile, StoppedError, StopSignal, never
from cosa.training.trainer import NonFiniteLossError, Report, Result, RunSpec, TrainProgress, ignore, train

_log = logging.getLogger(__name__)
_ray: Any = ray  # partly without annotations
_ray_train: Any = ray.train  # its annotations describe the first version of Train; what runs is the second

_CPUS_PER_WORKER = 0.9  # below one, so that a Tune trial's own sliver of a CPU leaves room for its workers
_POLL_SECONDS = 0.5
_STOP_SECONDS = 60


class WorkerError(RuntimeError):
    """Workers died more often than is forgiven; the message is one line."""


_Message = TrainProgress | ActorHandle[Any] | Exception | logging.LogRecord | str
"""What a worker tells whoever follows the run; its actor says that the first one has begun."""


class _FinalError(Exception):
    """Raised in a worker for what no restart can mend."""


def fit(
    spec: RunSpec,
    *,
    workers: int,
    report: Report = ignore,
    should_stop: StopCheck = never,
    max_failures: int = 3,
) -> Result:
    """Train on `workers` processes through Ray Train, see `ray_session` for which Ray.

    Each has a GPU and speaks NCCL where the cluster has GPUs, else a CPU and gloo. The same `config` and
    `out` resume, whatever the number of workers was before.

    Args:
        spec: What to train; `out` lies where this process and all workers reach it under the same path, or is
            a URL: each machine then has a working folder of its own. The first worker tracks the run.
        workers: Processes, >= 1; must divide `train.batch_size`.
        report: Called in this process with the progress of the first worker; what it raises ends the run.
        should_stop: Asked in this process, twice a second; the signal to stop is passed on to the workers.
        max_failures: How many times workers may die before the run is given up.

    Raises:
        ConnectionError: There is no Ray, see `ray_session`.
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
        with ray_session():
            gpus = _check_resources(workers)
            worker = _Worker(spec, secrets.token_hex(8), _queue_here())
            try:
                _mark_storage(out, worker.token)
                return _follow(
                    _trainer(worker, workers, max_failures, gpus=gpus), worker, report, should_stop
                )
            finally:
                worker.messages.shutdown(force=True)
    except (KeyboardInterrupt, SystemExit):
        spec.tracking.close(out, "KILLED")
        raise
    except WorkerError:
        spec.tracking.close(out, "FAILED")
        raise


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
    settings = flatten(config)
    names = ("data.root", "data.cache", "data.archive", "network.weights")
    places = {name: str(settings[name]) for name in names if settings[name]}
    return override(
        config, {n: str(Path(p).expanduser().absolute()) for n, p in places.items() if "://" not in p}
    )


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


def _trainer(worker: _Worker, workers: int, max_failures: int, *, gpus: bool) -> Any:
    trainer: Any = TorchTrainer
    return trainer(
        worker,
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        scaling_config=_ray_train.ScalingConfig(
            num_workers=workers,
            use_gpu=gpus,
            resources_per_worker={"CPU": _CPUS_PER_WORKER, **({"GPU": 1} if gpus else {})},
        ),
        run_config=_ray_train.RunConfig(
            name=f"{worker.out.name}-{identity(worker.spec.config)[:8]}",
            storage_path=str(worker.out / "ray"),
            callbacks=[_Watch(worker.messages)],
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
        text = f"worker {rank} failed, all go on from the newest checkpoint: {one_line(error)}"
        _publish(self.messages, text)


@dataclass(frozen=True)
class _Worker:
    """What runs in each worker; a callable object rather than a config, which Ray would show to others."""

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

    def __call__(self) -> Result:
        first = ray.train.get_context().get_world_rank() == 0
        try:
            if first:
                _publish(self.messages, ray.get_runtime_context().current_actor)
            if not self.spec.storage.url:
                _check_storage(self.out, self.token)

            def report(progress: TrainProgress) -> None:
                ray.train.report({"step": progress.step, **progress.metrics})  # waits for every worker's
                if first:
                    _publish(self.messages, progress)

            with _forwarded_log(self.messages) if first else contextlib.nullcontext():
                return train(self.spec, report=report, should_stop=_stop_check(self.stop_file))
        except Exception as error:
            if isinstance(error, _FinalError) or not _is_final(error):
                raise
            error.add_note(traceback.format_exc())  # of this process; travels with the error
            _publish(self.messages, error)
            raise _FinalError(one_line(error)) from error


def _stop_check(stop_file: StopFile) -> StopCheck:
    """Whether a worker is to stop, or to save because Ray has word that a machine will be taken back.

    Ray goes on after the loss of a machine from the newest checkpoint, as soon as there is another. Every
    worker must ask equally often: for the word of a loss they wait for each other.
    """
    warned = False

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


def _publish(messages: Queue, message: _Message) -> None:
    try:
        messages.put(message)
    except ray.exceptions.RayActorError:
        raise _FinalError("whoever started the run is gone") from None


@contextlib.contextmanager
def _forwarded_log(messages: Queue) -> Iterator[None]:
    """Send cosa's log to whoever follows the run: a worker's own output ends in a file of Ray's."""
    handler = QueueHandler(messages)
    logger = logging.getLogger("cosa")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def _follow(trainer: Any, worker: _Worker, report: Report, should_stop: StopCheck) -> Result:
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
    first, messages = None, worker.messages
    try:
        running = True
        while running:
            running = thread.is_alive()  # looked at first, so that the last messages are read after the end
            if should_stop() == StopSignal.STOP:
                worker.stop_file.give()
            for message in _received(messages):
                match message:
                    case ActorHandle():
                        first = message
                    case Exception():
                        failures.append(message)
                    case logging.LogRecord() if _log.isEnabledFor(message.levelno):
                        _log.handle(message)
                    case str():
                        _log.warning("%s", message)
                    case TrainProgress():
                        report(message)
    except BaseException:
        _stop(thread, messages, first)
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
        return WorkerError(f"worker {rank} failed: {one_line(first)}")
    if isinstance(error, ray.train.ControllerError):
        return WorkerError(f"Ray Train failed: {one_line(error.controller_failure)}")
    if isinstance(error, ray.exceptions.RayError):  # its last line is the cause in the other process
        return WorkerError(f"Ray failed: {one_line(error)} {str(error).strip().splitlines()[-1]}")
    return error
