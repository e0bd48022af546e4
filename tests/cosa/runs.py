"""What tests of whole runs share: a run's folder read back, and two workers started without Ray."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import distributed

from cosa.config import Config, from_json
from cosa.storage import checkpoint
from cosa.storage.run_folder import read_metrics
from cosa.tracking import Tracker, TrackingSpec
from cosa.training import trainer
from cosa.training.stop import StopCheck, StoppedError, StopSignal, never
from cosa.training.trainer import NonFiniteLossError, Result, RunSpec, TrainProgress, ignore

TIMES = ("seconds", "train/images_per_second")
"""What two runs of the same experiment may differ in."""


def train(
    config: Config,
    *,
    out: Path | str,
    report: Callable[[TrainProgress], object] = ignore,
    should_stop: StopCheck = never,
    tracker: Tracker | None = None,
    **more: Any,
) -> Result:
    """`trainer.train` of the RunSpec that these words make, tracked by `tracker` if there is one."""
    spec = RunSpec(config=config, out=out, **more)
    with mock.patch.object(TrackingSpec, "tracker", (lambda _: tracker) if tracker else TrackingSpec.tracker):
        return trainer.train(spec, report=report, should_stop=should_stop)


def saved_state(out: Path, step: int) -> dict[str, Any]:
    """Everything that the checkpoint of a step holds, flat, by its path in the state; times left out."""
    return dict(_leaves("", checkpoint.load(checkpoint.checkpoint_path(out / "checkpoints", step))))


def _leaves(name: str, item: Any) -> Any:
    if isinstance(item, dict):
        for key, value in item.items():
            if key not in TIMES:
                yield from _leaves(f"{name}/{key}", value)
    elif isinstance(item, list | tuple):
        for i, value in enumerate(item):
            yield from _leaves(f"{name}/{i}", value)
    else:
        yield name, item


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of what is not the same, bit for bit, in two saved states."""
    return sorted(name for name in one.keys() | other.keys() if not _same(one.get(name), other.get(name)))


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return repr(one) == repr(other)  # in which NaN is NaN


def read_journal(out: Path, after: int = 0) -> list[dict[str, float]]:
    """The journal's entries of steps beyond `after`, times left out."""
    return [
        {"step": step, **{key: value for key, value in metrics.items() if key not in TIMES}}
        for step, metrics in read_metrics(out, after)
    ]


def step_files(out: Path) -> list[str]:
    """Names of everything in the folder of checkpoints, drafts and hidden files too; hashes left out."""
    return sorted(path.name for path in (out / "checkpoints").iterdir() if path.suffix != ".sha256")


class Recorder(Tracker):
    """A tracker that remembers what it was told."""

    run_id = "run-7"

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.costs: dict[str, float] = {}

    def start(self, config: Any, *, out: Path, tags: Any = None, resume_step: int | None = None) -> None:
        super().start(config, out=out, tags=tags, resume_step=resume_step)
        self.calls.append(("start", resume_step))

    def log_metrics(self, metrics: Any, step: int) -> None:
        super().log_metrics(metrics, step)
        self.calls.append(("metrics", step, tuple(metrics)))

    def log_costs(self, costs: Mapping[str, float]) -> None:
        self.costs |= costs

    def log_artifact(self, path: Path, folder: str = "") -> None:
        assert path.is_file()
        self.calls.append(("artifact", f"{folder}/{path.name}" if folder else path.name))

    def log_text(self, text: str, name: str) -> None:
        self.calls.append(("text", name))

    def finish(self, status: str = "FINISHED") -> None:
        self.calls.append(("finish", status))


def work(rank: int, world: int, folder: Path, jobs: dict[str, dict[str, Any]]) -> None:
    """One worker of a group of gloo: trains each job into a folder of its name, one after the other.

    A job holds a `config`. It may name a rank and a step whose contrast is to become NaN, or a rank that is
    told to stop. The reason of a run that stopped is left in `JOB.RANK.txt`.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # gloo, on the CPU
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    for name, job in jobs.items():
        config = from_json(job["config"])
        if job.get("broken_rank") == rank:
            _break_contrast(config.train.warmup, job["broken_step"])
        told = job.get("stop_rank") == rank
        try:
            train(config, out=folder / name, should_stop=(lambda: StopSignal.STOP) if told else never)
        except (NonFiniteLossError, StoppedError) as error:
            (folder / f"{name}.{rank}.txt").write_text(str(error))
    distributed.destroy_process_group()


def _break_contrast(warmup: int, broken_step: int) -> None:
    """Make the contrastive term NaN at one step, from now on in this process."""
    from cosa.training import swap

    whole, steps = swap.csc_loss, iter(range(warmup, 1_000_000))

    def broken(*args: Any, **kwargs: Any) -> torch.Tensor:
        loss = whole(*args, **kwargs)
        return loss * torch.nan if next(steps) == broken_step else loss

    swap.csc_loss = broken
