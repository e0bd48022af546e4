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
import secrets
import shutil
import traceback
from concurrent import futures
from dataclasses import dataclass
from logging.handlers import QueueHandler
from pathlib import Path
from queue import Empty
from typing import Any

import ray
import ray.train.torch
import torch
from ray.actor import ActorHandle
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cosa.config import absolute_paths, identity
from cosa.distributed.session import capacity, ray_session
from cosa.storage.files import one_line
from cosa.tracking import TrackingError, initialise_store, resolve_uri
from cosa.tracking.provenance import source_tags
from cosa.training.stop import StopCheck, StopFile, StopSignal, never
from cosa.training.trainer import NonFiniteLossError, Report, Result, RunSpec, TrainProgress, ignore, train

_log = logging.getLogger(__name__)
_ray: Any = ray  # partly without annotations
_ray_train: Any = ray.train  # its annotations describe the first version of Train; what runs is the second

_CPUS_PER_WORKER = 0.9  # below one, so that a Tune trial's own sliver of a CPU leaves room for its workers
_POLL_SECONDS = 0.5
_STOP_SECONDS = 60
_STOP = "stop"  # file that tells workers so


class WorkerError(RuntimeError):
    """Workers died more often than is forgiven; the message is one line."""


class _FinalError(Exception):
    """Raised in a worker in place of its one argument: an error that no restart can mend."""


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
    try:
        with ray_session():
            gpus = _check_resources(workers)
            # On this machine, so that the loss of another one does not end the run.
            here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
            queue = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
            worker = _Worker(spec, spec.storage.folder / "ray", secrets.token_hex(8), queue)
            _mark_storage(worker.notes, worker.token)
            return _follow(_trainer(worker, workers, max_failures, gpus=gpus), worker, report, should_stop)
    except (KeyboardInterrupt, SystemExit, WorkerError) as error:
        spec.tracking.close(spec.storage.folder, "FAILED" if isinstance(error, WorkerError) else "KILLED")
        raise


def _check_resources(workers: int) -> bool:
    """Whether workers get a GPU each; refuses more workers than the cluster will ever have room for.

    Ray would wait for them without a word.
    """
    cluster = capacity()
    kind = "GPU" if cluster.get("GPU", 0) >= 1 else "CPU"
    most = int(cluster.get(kind, 0))
    if workers > most:
        raise ValueError(
            f"workers must be at most {most}, the {kind}s of the Ray cluster, got {workers}; "
            f"use fewer workers or add machines"
        )
    free = _ray.available_resources().get(kind, 0)
    if free < workers * (1 if kind == "GPU" else _CPUS_PER_WORKER):
        _log.warning("waiting for %s %ss of the Ray cluster: others use all but %s", workers, kind, free)
    return kind == "GPU"


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
        config=absolute_paths(spec.config, Path.cwd()),
        out=storage.url or storage.folder,
        work_folder=str(storage.folder),
        fork_from=spec.fork_from.absolute() if spec.fork_from else None,
        tracking=tracking,
    )


def _mark_storage(notes: Path, token: str) -> None:
    """Leave `token` in fresh `notes`; what Ray noted of an earlier attempt must not steer this one."""
    shutil.rmtree(notes, ignore_errors=True)
    notes.mkdir(parents=True)
    (notes / token).touch()


def _check_storage(notes: Path, token: str) -> None:
    """Refuse a worker whose `out` is another folder than that of whoever started the run."""
    if not (notes / token).is_file():
        raise ValueError(
            f"out must lie on storage that every worker reaches, got {str(notes.parent)!r}, which is not the "
            f"same folder on {_ray.util.get_node_ip_address()}; choose a shared folder"
        )


def _trainer(worker: _Worker, workers: int, max_failures: int, *, gpus: bool) -> Any:
    return _ray_train.torch.TorchTrainer(
        worker,
        torch_config=_ray_train.torch.TorchConfig(backend="nccl" if gpus else "gloo"),
        scaling_config=_ray_train.ScalingConfig(
            num_workers=workers,
            use_gpu=gpus,
            resources_per_worker={"CPU": _CPUS_PER_WORKER, **({"GPU": 1} if gpus else {})},
        ),
        run_config=_ray_train.RunConfig(
            name=f"{worker.notes.parent.name}-{identity(worker.spec.config)[:8]}",
            storage_path=str(worker.notes),
            callbacks=[_Watch(worker.messages)],
            failure_config=_ray_train.FailureConfig(max_failures=max_failures, controller_failure_limit=0),
            # One thread each: workers that share cores are many times slower with more.
            worker_runtime_env={"env_vars": {} if gpus else {"OMP_NUM_THREADS": "1"}},
        ),
    )


@dataclass
class _Watch(ray.train.UserCallback):
    """Runs beside Ray's controller, where an exception ends the run without another attempt."""

    messages: Queue

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
    notes: Path
    """Where Ray keeps its notes of this attempt, and whoever follows the run leaves the order to stop."""
    token: str
    """Name of a file in `notes`."""
    messages: Queue
    """To whoever follows the run: lines to log, and from the first worker its actor and its progress."""

    def __call__(self) -> Result:
        first = ray.train.get_context().get_world_rank() == 0

        def report(progress: TrainProgress) -> None:
            ray.train.report({"step": progress.step, **progress.metrics})  # waits for every worker's
            if first:
                _publish(self.messages, progress)

        try:
            if first:
                _publish(self.messages, ray.get_runtime_context().current_actor)
                logger = logging.getLogger("cosa")  # a worker's own output ends in a file of Ray's
                logger.addHandler(QueueHandler(self.messages))
                logger.setLevel(logging.INFO)
            if not self.spec.storage.url:
                _check_storage(self.notes, self.token)
            return train(self.spec, report=report, should_stop=_stop_check(StopFile(self.notes / _STOP)))
        except Exception as error:
            if not _is_final(error):
                raise
            error.add_note(traceback.format_exc())  # of this process; travels with the error
            raise _FinalError(error) from None


def _stop_check(stop_file: StopFile) -> StopCheck:
    """Whether a worker is to stop, or to save because Ray has word that a machine will be taken back.

    Ray goes on after the loss of a machine from the newest checkpoint, as soon as there is another. Every
    worker must ask equally often: for the word of a loss they wait for each other.
    """
    warned = False

    def should_stop() -> StopSignal:
        nonlocal warned
        before, warned = warned, warned or _ray_train.get_preemption_info() is not None
        return max(stop_file.check(), StopSignal.GO_ON if warned == before else StopSignal.SAVE)

    return should_stop


_LASTING = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENOTDIR}


def _is_final(error: Exception) -> bool:
    """Whether another attempt is in vain: mistakes and bugs stay, a peer that was lost comes back.

    torch reports a lost peer as a RuntimeError, Ray as a RayError.
    """
    if isinstance(error, OSError):
        return error.errno is None or error.errno in _LASTING
    if isinstance(error, TrackingError | NonFiniteLossError | torch.OutOfMemoryError):
        return True
    return not isinstance(error, RuntimeError | ray.exceptions.RayError)


def _publish(messages: Queue, message: object) -> None:
    try:
        messages.put(message)
    except ray.exceptions.RayActorError:
        raise ConnectionError("whoever started the run is gone") from None


def _follow(trainer: Any, worker: _Worker, report: Report, should_stop: StopCheck) -> Result:
    """Run `trainer` to its end in a thread, passing on here what the first worker tells.

    In the main thread Ray would take over Ctrl-C and go on for seconds.
    """
    ended = futures.ThreadPoolExecutor(1, "ray-train").submit(trainer.fit)
    first, over = None, False
    try:
        while not over:
            over, message = ended.done(), None  # looked at first, so that all messages are read after the end
            if should_stop() == StopSignal.STOP:
                StopFile(worker.notes / _STOP).give()
            with contextlib.suppress(Empty):
                message = worker.messages.get(timeout=_POLL_SECONDS)
                over = False
            match message:
                case ActorHandle():
                    first = message
                case logging.LogRecord() if _log.isEnabledFor(message.levelno):
                    _log.handle(message)
                case str():
                    _log.warning("%s", message)
                case TrainProgress():
                    report(message)
    finally:
        worker.messages.shutdown(force=True)
        if not over:  # without its queue no worker goes on, and without a worker the group ends
            if first is not None:
                ray.kill(first)
            # Ray ends a process that leaves it while a thread still waits for it.
            futures.wait([ended], timeout=_STOP_SECONDS)
    return _result(ended)


def _result(ended: futures.Future[Any]) -> Result:
    """What `trainer.fit` came to.

    Raises:
        WorkerError: Ray Train failed; one line.
        Exception: What a worker raised, where no restart could mend it.
    """
    try:
        result: Result = ended.result().return_value
    except ray.train.WorkerGroupError as error:
        rank, first = min(error.worker_failures.items())
        raise WorkerError(f"worker {rank} failed: {one_line(first)}") from error
    except ray.train.ControllerError as error:
        if isinstance(error.controller_failure, _FinalError):
            raise error.controller_failure.args[0] from None
        raise WorkerError(f"Ray Train failed: {one_line(error.controller_failure)}") from error
    except ray.exceptions.RayError as error:
        cause = str(error).strip().splitlines()[-1]  # in the other process
        raise WorkerError(f"Ray failed: {one_line(error)} {cause}") from error
    return result
