"""What a plan costs in hours, from the speed that finished runs had; what nobody measured is not guessed.

A phase has the seconds per iteration of runs with the same network, crop, scales and batch, and an evaluation
the seconds of those that also evaluate alike. Runs on the newest run's hardware count, others do not.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from cosa.config import Config, flatten, from_json
from cosa.distributed.session import Request
from sweeps.planning.plan import Trial
from sweeps.runs import FORK_TAG, read_json

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

Phase = Literal["warmup", "cotraining", "both"]

MOST_RUNS = 24
"""Runs that are read, the newest ones."""
_SPEED = "train/images_per_second"
_HARDWARE = ("cosa.host.system", "cosa.host.cpus", "cosa.host.memory_gib", "cosa.host.gpus")
_TRAINING = frozenset({"data.crop_size", "cam.scales", "cam.flip", "cam.stride"}) | frozenset(
    {"train.batch_size", "train.accumulate", "train.precision", "train.compile"}
)
_JUDGING = frozenset({"data.layout", "data.val_split"}) | frozenset(
    f"evaluation.{name}"
    for name in ("size", "scales", "flip", "batch_size", "max_images", "crf", "train_split")
)


@dataclass(frozen=True)
class Sample:
    """What one finished run says."""

    phase: Phase
    """What its speed is the mean of."""
    step_seconds: float
    """Seconds per iteration, evaluations left out."""
    evaluation_seconds: float | None
    """Seconds per evaluation; None where the run evaluated otherwise, or where it is not known."""


@dataclass(frozen=True)
class Speed:
    """How fast finished runs were."""

    samples: tuple[Sample, ...]
    hardware: str
    """What they ran on."""
    on_gpu: bool

    def step(self, phase: Phase) -> float:
        """Seconds per iteration of a phase: of runs of this phase alone, else of any."""
        own = [sample.step_seconds for sample in self.samples if sample.phase == phase]
        return statistics.fmean(own or [sample.step_seconds for sample in self.samples])

    @property
    def evaluation(self) -> float | None:
        """Seconds per evaluation; None where none was measured."""
        known = [s.evaluation_seconds for s in self.samples if s.evaluation_seconds is not None]
        return statistics.fmean(known) if known else None


@dataclass(frozen=True)
class Hours:
    """What trials take, each by itself."""

    training: float
    evaluation: float | None
    """None where no evaluation of the kind was measured; it then comes on top."""


def hours_of(trials: Sequence[Trial], speed: Speed) -> Hours:
    """Hours of `trials` one after the other, at `speed`."""
    training = 0.0
    evaluations = 0
    for trial in trials:
        warmup = max(0, min(trial.last_step, trial.config.train.warmup) - trial.first_step)
        training += warmup * speed.step("warmup")
        training += (trial.last_step - trial.first_step - warmup) * speed.step("cotraining")
        evaluations += evaluations_of(trial.config, trial.first_step, trial.last_step)
    seconds = speed.evaluation
    return Hours(training / 3600, None if seconds is None else evaluations * seconds / 3600)


def told(trials: Sequence[Trial], speed: Speed, request: Request) -> str:
    """What `trials` cost, and by what that is known."""
    return f"to train: {price(trials, speed, request)}; {basis(speed)}"


def price(trials: Sequence[Trial], speed: Speed, request: Request) -> str:
    """What `trials` cost, in words: GPU-hours where the speed is a GPU's, else core-hours."""
    hours = hours_of(trials, speed)
    share = (1.0 if request.gpus is None else request.gpus) if speed.on_gpu else request.cpus
    share *= max(1, request.workers)
    unit = "GPU-hours" if speed.on_gpu else "core-hours"
    total = share * (hours.training + (hours.evaluation or 0))
    part = (
        "evaluations not included, none like these was measured"
        if hours.evaluation is None
        else f"evaluations {share * hours.evaluation:.2g} of them"
    )
    return f"about {total:.2g} {unit}, {part}"


def basis(speed: Speed) -> str:
    """What an estimate rests on."""
    count = len(speed.samples)
    runs = "1 finished run" if count == 1 else f"{count} finished runs"
    return f"at the speed of {runs} like these on {speed.hardware}"


def evaluations_of(config: Config, first: int, last: int) -> int:
    """Evaluations after `first` and up to `last`, where there always is one."""
    every = config.evaluation.every
    return last // every - first // every + (last % every != 0)


def measured(client: MlflowClient, experiment_id: str, config: Config) -> Speed | None:
    """The speed of finished runs like `config`; None where there is none."""
    params = {
        "network.encoder": config.network.encoder,
        "data.crop_size": config.data.crop_size,
        "train.batch_size": config.train.batch_size,
    }
    alike = " and ".join(f"params.`{name}` = '{value}'" for name, value in params.items())
    runs = client.search_runs(
        [experiment_id], f"attributes.status = 'FINISHED' and {alike}", max_results=MOST_RUNS
    )
    hardware: tuple[str, ...] | None = None
    samples: list[Sample] = []
    for run in runs:  # newest first
        where = tuple(run.data.tags.get(tag, "") for tag in _HARDWARE)
        if run.data.metrics.get(_SPEED, 0) <= 0 or where != (hardware or where):
            continue
        trained = _config_of(client, run)
        if trained is not None and not any(_differences(trained, config, _TRAINING, "network.")):
            hardware = where
            samples.append(_sample(client, run, trained, config))
    if hardware is None:
        return None
    system, cpus, memory, gpus = hardware
    told = f"{system}, {cpus} CPUs, {memory} GiB, GPU: {gpus or 'none'}"
    return Speed(tuple(samples), told, on_gpu=gpus not in {"", "none"})


def _config_of(client: MlflowClient, run: Run) -> Config | None:
    """What a run was trained with; None where another version of cosa trained it."""
    content = read_json(client, run.info.run_id, "config.json")
    try:
        return from_json(json.dumps(content)) if content else None
    except (ValueError, TypeError):
        return None


def _differences(one: Config, other: Config, names: frozenset[str], prefix: str = "\0") -> Iterator[str]:
    """Settings that differ, of those called `names` and those that begin with `prefix`."""
    left, right = flatten(one), flatten(other)
    for name in left:
        counts = (name in names or name.startswith(prefix)) and name not in _UNTIMED
        if counts and left[name] != right[name]:
            yield name


_UNTIMED = frozenset({"network.weights", "network.pretrained", "network.drop_path"})
"""What a network starts from costs no time."""


def _sample(client: MlflowClient, run: Run, trained: Config, config: Config) -> Sample:
    tags = run.data.tags
    phase: Phase = "both"
    first, last = 0, trained.train.iterations
    if tags.get("cosa.kind") == "warmup":
        phase, last = "warmup", trained.train.warmup
    elif FORK_TAG in tags:
        phase, first = "cotraining", trained.train.warmup
    step = trained.train.batch_size / run.data.metrics[_SPEED]
    evaluation = None
    if not any(_differences(trained, config, _JUDGING)):
        seconds = read_json(client, run.info.run_id, "result.json").get("seconds")
        if seconds is not None:
            rest = max(0.0, seconds - step * (last - first))
            evaluation = rest / evaluations_of(trained, first, last)
    return Sample(phase, step, evaluation)
