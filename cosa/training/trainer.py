"""One training run: `train(RunSpec(...))`. Speaks torch.distributed; knows no Ray, no MLflow, no CLI.

What a run leaves in its folder is listed in `cosa.storage.run_folder`.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cosa.config import Config, identity, to_json, warmup_identity
from cosa.data.loader import step_names, train_batches
from cosa.data.open import RunData, open_run_data
from cosa.evaluation.crf import require_crf
from cosa.evaluation.evaluate import coexistence_indices
from cosa.networks.network import in_bf16, warning_of
from cosa.networks.published import pinned, starting_point
from cosa.storage import checkpoint
from cosa.storage.files import write_atomically
from cosa.storage.label_files import read_summary
from cosa.storage.mirror import Storage, open_storage
from cosa.storage.model_files import facts_of, save_model
from cosa.storage.run_folder import TRAINING_TAG, VALIDATION_TAG, is_finished, require_same_run
from cosa.structures import Batch, Ranks
from cosa.tracking import Tracker, TrackingSpec
from cosa.training import memory
from cosa.training.standalone import SEGMENTATION
from cosa.training.state import Method, RunState
from cosa.training.step import COTRAINING, TrainingState
from cosa.training.stop import StopCheck, StoppedError, StopSignal, never
from cosa.training.validation import evaluate_networks

log = logging.getLogger(__name__)

_SIGNAL_EVERY = 10  # steps; the ranks must wait for each other to agree


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """One run, all that any process must know of it; plain data that travels."""

    config: Config
    """What to train; `train` first pins what it leaves to its encoder and its labels, see
    `cosa.networks.published`."""
    out: Path | str
    """The run's folder, made if needed, on storage that all ranks reach; or a URL, see
    `cosa.storage.mirror`."""
    work_folder: str = ""
    """Folder in which each machine works on a run at a URL; empty takes one below the current folder."""
    fork_from: Path | None = None
    """Checkpoint of a shared warm-up to start from, where `out` has none yet."""
    stop_at: int | None = None
    """Stop after this step instead of `train.iterations`, keeping the schedule of the whole run."""
    momenta: tuple[float, ...] = ()
    """Further momenta that a shared warm-up keeps an AN of: runs fork from it that differ from `config` in
    `ema.momentum` alone or in what only co-training reads."""
    data_tags: Mapping[str, str] = field(default_factory=dict)
    """Fingerprints by tag that the data must have on every machine, as `cosa.data.open.read_fingerprints`
    tells them; empty takes those of the data on the first rank."""
    tracking: TrackingSpec = field(default_factory=TrackingSpec)
    """Where metrics and pictures go beside `out`; nowhere by default."""

    @property
    def storage(self) -> Storage:
        """Where the run is kept; nothing is contacted or made yet."""
        return open_storage(self.out, self.work_folder)

    @property
    def last_step(self) -> int:
        """Optimiser steps that the run is to have behind it at its end."""
        return self.config.train.iterations if self.stop_at is None else self.stop_at


@dataclass(frozen=True)
class TrainProgress:
    """Where a run stands, told on every rank at each log step, evaluation and checkpoint."""

    step: int
    """Optimiser steps done."""
    iterations: int
    """Optimiser steps this call will reach."""
    metrics: Mapping[str, float]
    """Metrics that are new, by their tracked names."""
    checkpoint: Path | None
    """The checkpoint just written, if any."""
    images_per_second: float
    """Training speed over all ranks, evaluations left out."""
    seconds_left: float
    """Estimated from the speed so far; NaN where nobody knows."""


Report = Callable[[TrainProgress], object]
"""Told where a run stands."""


@dataclass(frozen=True)
class Result:
    """What a finished call of `train` hands back."""

    step: int
    """Optimiser steps done."""
    metrics: dict[str, float]
    """Metrics of the last evaluation, by their tracked names."""
    checkpoint: Path
    """The last whole-state checkpoint."""
    out: Path
    """The run's folder."""
    run_id: str | None
    """The tracker's id of the run; None where nothing is tracked or the store did not answer."""
    seconds: float
    """Seconds over all sessions of the run, evaluations included."""


class NonFiniteLossError(RuntimeError):
    """A term of the loss became NaN or infinite; the last checkpoint is from before."""


def ignore(progress: TrainProgress) -> None:
    """Listen to none of it."""


def train(spec: RunSpec, *, report: Report = ignore, should_stop: StopCheck = never) -> Result:
    """Train CoSA or a standalone network, or go on where this run stopped.

    The same `config` and `out` resume from the newest checkpoint in `out`, bit for bit on a CPU. Losses are
    means over the whole batch and randomness is a function of (seed, step), so the number of ranks changes
    nothing but rounding; where `network.drop_path` > 0, also which paths are dropped, and where there is
    BatchNorm, see `cosa.training.standalone`.

    Args:
        spec: What to train, the same on every rank.
        report: Called on every rank at each log step, evaluation and checkpoint.
        should_stop: Asked on every rank after each step or, where ranks must agree, each tenth.

    Raises:
        StoppedError: `should_stop` said so; the checkpoint of the last step is saved.
        ValueError: `out` holds another run, the fork's warm-up is another, or data or weights are unfit.
        NonFiniteLossError: A term of the loss became NaN or infinite.
        StorageError: The URL of `out` does not answer at the start, or took not everything by the end.
        OSError: The output could not be written; what was written before is whole.
    """
    spec = replace(spec, config=pinned(spec.config))
    config, ranks, storage = spec.config, Ranks.current(), spec.storage
    storage.pull()
    _check_call(spec, storage.folder, ranks)
    if ranks.device.type == "cpu":
        memory.keep_heap()
    memory.forget_peak(ranks.device)
    data = open_run_data(config, ranks, spec.data_tags)
    coexistence_indices(config.evaluation, data.training.classes)  # or the first evaluation would end it all
    momenta = [momentum for momentum in spec.momenta if momentum != config.ema.momentum]
    method: Method[Any] = SEGMENTATION if config.standalone else COTRAINING
    state = method.build_state(config, len(data.training.classes), ranks.device, momenta)
    begun_from: Mapping[str, str] = {}
    if ranks.first and not config.network.from_scratch:
        begun_from = starting_point(config, state.learning.encoder.digest())
    run = _Run(
        spec=spec,
        storage=storage,
        ranks=ranks,
        tracker=spec.tracking.tracker() if ranks.first else Tracker(),
        report=report,
        should_stop=should_stop,
        data=data,
        method=method,
        state=state,
        begun_from=begun_from,
    )
    run.begin()
    try:
        run.loop()
        run.end()
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt | SystemExit | StoppedError)
        run.tracker.finish("KILLED" if stopped else "FAILED")
        raise
    run.tracker.finish("FINISHED")
    if ranks.first:
        storage.close(keep=config.train.keep_checkpoints)
    return Result(
        step=run.state.step,
        metrics=run.state.metrics,
        checkpoint=checkpoint.checkpoint_path(run.checkpoints, run.state.step),
        out=run.out,
        run_id=run.tracker.run_id,  # a slow store may have told it only now
        seconds=run.state.seconds,
    )


@dataclass(kw_only=True)
class _Run:
    """The parts of one run, wired together."""

    spec: RunSpec
    storage: Storage
    ranks: Ranks
    tracker: Tracker
    """Of the first rank; the others' keep nothing."""
    report: Report
    should_stop: StopCheck
    data: RunData
    method: Method[Any]
    state: RunState
    begun_from: Mapping[str, str]
    """What is known of the encoder's published weights, on the first rank; empty from scratch."""

    def __post_init__(self) -> None:
        self.config, self.target, self.out = self.spec.config, self.spec.last_step, self.storage.folder
        self.checkpoints = self.out / "checkpoints"

    def begin(self) -> None:
        """Resume, fork, or start; then tell the tracker."""
        state, fork_from = self.state, self.spec.fork_from
        saved = self.storage.agree(checkpoint.newest(self.checkpoints, log.warning), self.ranks)
        if saved is not None:
            checkpoint.require_classes(self.out, saved, self.data.training.classes)
            if isinstance(state, TrainingState):
                checkpoint.require_momenta(self.out, saved, [*state.followers])
            state.resume(saved)
        elif fork_from is not None:
            assert isinstance(state, TrainingState), "a standalone network has no warm-up to share"
            saved, momentum = checkpoint.load_warmup(fork_from, self.config)
            checkpoint.require_classes(fork_from, saved, self.data.training.classes)
            state.fork(saved, momentum)
        if state.step > self.target:
            raise ValueError(
                f"stop_at must be at least {state.step}, the steps that {str(self.out)!r} has behind it, "
                f"got {self.target}"
            )
        if saved and saved["data_fingerprint"] != self.data.tags[TRAINING_TAG]:
            log.warning(
                "data.root holds other images, masks or labels than %s steps were trained on", state.step
            )
        self.ranks.wait()  # every rank has read before the first one writes
        if self.ranks.first:
            write_atomically(self.out / "config.json", to_json(self.config))
            if not is_finished(self.out, self.target):  # a run that goes on is not finished
                (self.out / "result.json").unlink(missing_ok=True)
            begun_from = {f"cosa.encoder.{name}": text for name, text in self.begun_from.items()}
            tags, device = {**self.data.tags, **_supervision(self.config), **begun_from}, self.ranks.device
            if self.config.train.precision == "auto":
                tags["cosa.precision"] = "bf16" if in_bf16(self.config.train, device) else "fp32"
                log.info("train.precision auto is %s on %s", tags["cosa.precision"], device)
            if warning := warning_of(self.config.train, device):
                log.warning(warning)
            self._record_encoder()
            self.tracker.start(self.config, out=self.out, tags=tags, resume_step=state.step)
            self.storage.push(keep=self.config.train.keep_checkpoints)
        self.first_step, self.seconds_before = state.step, state.seconds
        self.begun, self.evaluating, self.waiting = time.perf_counter(), 0.0, 0.0

    def _record_encoder(self) -> None:
        """Leave in the folder what the run begins from; a run that goes on keeps what it began from."""
        path = self.out / "encoder.json"
        if not self.begun_from:
            return
        if not path.is_file():
            write_atomically(path, json.dumps(self.begun_from, indent=2) + "\n")
        elif json.loads(path.read_text()) != self.begun_from:
            log.warning(
                "the weights of %s are no longer what this run began from: see %s",
                self.config.network.encoder,
                path,
            )

    def loop(self) -> None:
        """Train from the state's step to the target; log, evaluate and save on the way."""
        config, state, ranks, method = self.config, self.state, self.ranks, self.method
        learner, phase = method.wrap(state, config, ranks), method.phase(state, config)
        batches = train_batches(
            self.data.training, config, start=state.step, rank=ranks.rank, world=ranks.world
        )
        for batch in self._timed(itertools.islice(batches, self.target - state.step)):
            if method.phase(state, config) != phase:
                learner, phase = method.wrap(state, config, ranks), method.phase(state, config)
            terms = method.step(state, learner, batch.to(ranks.device), config, ranks)
            measure, evaluation_due, save = (
                state.step == self.target or state.step % every == 0
                for every in (config.train.log_every, config.evaluation.every, config.train.checkpoint_every)
            )
            due = measure or evaluation_due or save
            if due:
                self._check_finite()
                metrics = self._measure(terms) if measure else {}
                if evaluation_due:
                    self._evaluate()
                    metrics |= state.metrics
                self._publish(metrics, save=save)
            if due or ranks.world == 1 or state.step % _SIGNAL_EVERY == 0:
                self._handle_signal(saved=save)

    def _timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """`batches`; counts the seconds that each was late but the first, for which the loader starts."""
        asked = math.inf
        for batch in batches:
            self.waiting += max(0.0, time.perf_counter() - asked)
            yield batch
            asked = time.perf_counter()

    def _handle_signal(self, *, saved: bool) -> None:
        """Do between two steps what `should_stop` says to any rank.

        Raises:
            StoppedError: The signal was to stop.
        """
        signal = max(self.ranks.gather(self.should_stop()))
        if signal >= StopSignal.SAVE and not saved:
            self._check_finite()
            self._publish({}, save=True)
        if signal == StopSignal.STOP and self.state.step < self.target:
            raise StoppedError(
                f"told to stop, and stopped after step {self.state.step} of {self.target}, whose checkpoint "
                f"is saved in {str(self.out)!r}; the same command goes on from there"
            )

    def _measure(self, terms: Mapping[str, Tensor]) -> dict[str, float]:
        """Losses, thresholds and the learning rate as numbers: the one place where the host waits."""
        config, state = self.config, self.state
        means = self.ranks.total(torch.stack([*terms.values()])) / self.ranks.world
        losses = dict(zip(terms, means.tolist(), strict=True))
        total = self.method.objective({k: torch.tensor(value) for k, value in losses.items()}, config)
        metrics = {f"train/loss/{name}": value for name, value in losses.items()}
        metrics["train/loss/total"] = float(total)
        metrics["train/learning_rate"] = state.optimizer.param_groups[0]["lr"]
        metrics["train/images_per_second"] = self._speed()
        if isinstance(state, TrainingState) and state.step > config.train.warmup:
            metrics["train/threshold"], metrics["train/aux_threshold"] = state.xis
        return metrics

    def _speed(self) -> float:
        """Images per second over all ranks in this session, evaluations left out."""
        images = (self.state.step - self.first_step) * self.config.train.batch_size
        return images / self._training_seconds()

    def _training_seconds(self) -> float:
        """Seconds of this session, evaluations left out."""
        return max(time.perf_counter() - self.begun - self.evaluating, 1e-9)

    def _evaluate(self) -> None:
        """Judge the networks; the state keeps what is found."""
        begun = time.perf_counter()
        files = evaluate_networks(self.state, self.data, self.config, self.ranks, self.out)
        if self.ranks.device.type == "cpu":
            memory.trim_heap()
        took = time.perf_counter() - begun
        self.evaluating += took
        if images := self._judged():
            self.tracker.log_costs({"cost/evaluation_images_per_second": images / took})
        for path in files:
            self.tracker.log_artifact(path, path.parent.name)

    def _judged(self) -> int:
        """Images that this step's evaluation judges, those of each network counted."""
        data, most = self.data, self.config.evaluation.max_images
        splits = [data.validation] * len(self.state.networks)
        splits += [data.judged] if self.state.step == self.config.train.iterations else []
        return sum(min(len(split), most or len(split)) for split in splits if split)

    def _costs(self) -> dict[str, float]:
        """What the run took, by the names that a store keeps it under.

        GPU-hours are those of all sessions with the ranks of this one; memory is the most that the first
        rank's process held in this session, on its GPU where it has one; the loader's wait is the part of
        this session's time of training in which that rank had no batch. A GPU may be busy even then.
        """
        state, ranks, gpu = self.state, self.ranks, self.ranks.device.type == "cuda"
        final = state.networks[self.config.final_network]
        return {
            "cost/parameters": sum(one.numel() for one in final.parameters()),
            "cost/seconds": state.seconds,
            "cost/gpu_hours": state.seconds / 3600 * ranks.world * gpu,
            "cost/peak_memory_gib": memory.peak(ranks.device) / 2**30,
            "cost/loader_wait": self.waiting / self._training_seconds(),
        }

    def _whole(self) -> checkpoint.State:
        """The whole state, as a checkpoint holds it."""
        classes, fingerprint = self.data.training.classes, self.data.tags[TRAINING_TAG]
        return self.state.to_dict(self.config, classes, fingerprint, self.tracker.run_id)

    def _publish(self, metrics: dict[str, float], *, save: bool) -> None:
        """Write metrics, then the checkpoint, then tell whoever listens."""
        state, keep = self.state, self.config.train.keep_checkpoints
        state.seconds = self.seconds_before + time.perf_counter() - self.begun
        if metrics:
            self.tracker.log_metrics(metrics, state.step)
        if save and self.ranks.first:
            checkpoint.save(self.checkpoints, self._whole(), keep=keep)
            self.storage.push(keep=keep)
        speed = self._speed()
        self.report(
            TrainProgress(
                step=state.step,
                iterations=self.target,
                metrics=metrics,
                checkpoint=checkpoint.checkpoint_path(self.checkpoints, state.step) if save else None,
                images_per_second=speed,
                seconds_left=(self.target - state.step) * self.config.train.batch_size / speed,
            )
        )

    def _check_finite(self) -> None:
        """Stop where a loss on any rank, or the weights, have not been finite since the last check.

        All ranks stop together, before anything of a broken network is judged or kept.
        """
        state = self.state
        broken = [
            (step, name)
            for steps in self.ranks.gather(state.bad_step.tolist())
            for step, name in zip(steps, state.terms, strict=True)
            if step >= 0
        ]
        if broken:
            step, name = min(broken)
            names = step_names(self.data.training, self.config, step)
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            raise NonFiniteLossError(
                f"loss term {name!r} must stay finite, got NaN or infinity at step {step} on the images "
                f"{', '.join(names[:8])}{more}; "
                "lower optim.lr or set optim.clip_norm, and look at these images"
            )
        if not torch.stack([torch.isfinite(p).all() for p in state.learning.parameters()]).all():
            raise NonFiniteLossError(
                f"weights must stay finite, got NaN or infinity by step {state.step - 1}, where every loss "
                "was finite; lower optim.lr or set optim.clip_norm"
            )

    def end(self) -> None:
        """Leave the network and, last of all, `result.json`, the mark of a finished run."""
        state, whole = self.state, self._whole()
        momenta = [self.config.ema.momentum, *state.followers] if isinstance(state, TrainingState) else []
        if self.ranks.first and not is_finished(self.out, state.step):
            model, classes = self.out / "model", self.data.training.classes
            final = self.config.final_network
            facts = facts_of({**whole, "network": final})
            for path in save_model(model, state.networks[final], self.config, classes, facts=facts):
                self.tracker.log_artifact(path, model.name)
            result = {
                "identity": identity(self.config),
                "warmup_identity": warmup_identity(self.config),
                "step": state.step,
                "momenta": momenta,
                "metrics": state.metrics,
                **state.details,
                **{name: whole[name] for name in ("classes", "seconds", "run_id", "data_fingerprint")},
                "val_fingerprint": self.data.tags[VALIDATION_TAG],
            }
            self.tracker.log_costs(self._costs())
            write_atomically(self.out / "result.json", json.dumps(result, indent=2) + "\n")
            self.tracker.log_artifact(self.out / "result.json")
        self.ranks.wait()


def _supervision(config: Config) -> dict[str, str]:
    """Tags that tell what supervises a run beyond image-level labels, or through which pseudo-labels."""
    if config.standalone and not config.oracle:
        known = read_summary(Path(config.segmentation.labels).expanduser())
        names = ("fingerprint", "run_id", "identity", "step", "network", "source", "xi", "miou")
        return {f"cosa.labels.{name}": str(known[name]) for name in names if known.get(name) is not None}
    source = config.segmentation.supervision if config.standalone else config.s2c.source
    return {"cosa.oracle": source} if config.oracle else {}


def _check_call(spec: RunSpec, out: Path, ranks: Ranks) -> None:
    """Refuse what cannot be trained here before anything is read or written."""
    config, target = spec.config, spec.last_step
    if not 0 < target <= config.train.iterations:
        raise ValueError(f"stop_at must lie in [1, {config.train.iterations}], got {target}")
    if config.standalone and (spec.momenta or spec.fork_from):
        raise ValueError("fork_from and momenta must be empty for a standalone network, which has no warm-up")
    if spec.momenta and target > config.train.warmup:
        raise ValueError(
            f"stop_at must end a warm-up of several momenta by {config.train.warmup}, got {target}"
        )
    if config.evaluation.crf:
        require_crf()
    config.train.at_a_time(ranks.world)  # or the shares of a batch would not be of one size
    require_same_run(out, config)
