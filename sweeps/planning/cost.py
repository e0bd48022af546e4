"""What a plan costs in hours, from the speed that finished runs had; what nobody measured is not guessed.

A phase has the seconds per iteration of runs with the same network, crop, scales and batch, and an evaluation
the seconds of those that also evaluate alike. Runs on the newest run's hardware count, others do not.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from cosa.config import Config, difference, from_json
from cosa.distributed.session import TrialResources
from sweeps.planning.plan import Trial
from sweeps.runs import FORK_TAG, read_json

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

MOST_RUNS = 24
"""Runs that are read, the newest ones."""
_SPEED = "train/images_per_second"
_HARDWARE = ("cosa.host.system", "cosa.host.cpus", "cosa.host.memory_gib", "cosa.host.gpus")
_TRAINING = frozenset(
    {"data.crop_size", "cam.scales", "cam.flip", "cam.stride"}
    | {f"train.{name}" for name in ("batch_size", "accumulate", "precision", "compile")}
)
"""Settings that a step's time rests on, with those of the network."""
_UNTIMED = frozenset({"network.weights", "network.pretrained", "network.drop_path"})
"""What a network starts from costs no time."""
_EVALUATING = frozenset(
    {"data.layout", "data.val_split"}
    | {
        f"evaluation.{n}"
        for n in ("size", "scales", "flip", "batch_size", "max_images", "crf", "train_split")
    }
)


@dataclass(frozen=True)
class Speed:
    """How fast finished runs were; seconds are means over them."""

    warmup: float
    """Seconds per iteration of warm-up, evaluations left out."""
    cotraining: float
    """The same of co-training."""
    evaluation: float | None
    """Seconds per evaluation; None where none of the kind was measured."""
    runs: int
    hardware: str
    """What they ran on."""
    on_gpu: bool

    @property
    def basis(self) -> str:
        """What an estimate rests on, in words."""
        runs = "1 finished run" if self.runs == 1 else f"{self.runs} finished runs"
        return f"at the speed of {runs} like these on {self.hardware}"


def hours_of(trials: Sequence[Trial], speed: Speed) -> tuple[float, float | None]:
    """Hours of `trials` one after the other: of training, and of evaluations where one was measured."""
    seconds, evaluations = 0.0, 0
    for trial in trials:
        warmup = max(0, min(trial.last_step, trial.config.train.warmup) - trial.first_step)
        seconds += warmup * speed.warmup + (trial.steps - warmup) * speed.cotraining
        evaluations += evaluations_of(trial.config, trial.first_step, trial.last_step)
    return seconds / 3600, None if speed.evaluation is None else evaluations * speed.evaluation / 3600


def price(trials: Sequence[Trial], speed: Speed, resources: TrialResources) -> str:
    """What `trials` cost, in words: GPU-hours where the speed is a GPU's, else core-hours."""
    training, evaluation = hours_of(trials, speed)
    share = (1.0 if resources.gpus is None else resources.gpus) if speed.on_gpu else resources.cpus
    share *= max(1, resources.workers)
    unit = "GPU-hours" if speed.on_gpu else "core-hours"
    part = (
        "evaluations not included, none like these was measured"
        if evaluation is None
        else f"evaluations {share * evaluation:.2g} of them"
    )
    return f"about {share * (training + (evaluation or 0)):.2g} {unit}, {part}"


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
    steps: dict[str, list[float]] = {"warmup": [], "cotraining": [], "both": []}
    evaluations: list[float] = []
    for run in runs:  # newest first
        where = tuple(run.data.tags.get(tag, "") for tag in _HARDWARE)
        if run.data.metrics.get(_SPEED, 0) <= 0 or where != (hardware or where):
            continue
        trained = _config_of(client, run)
        if trained is None or _differs(trained, config, _TRAINING, "network."):
            continue
        hardware = where
        phase, first, last = _part_of(run, trained)
        steps[phase].append(trained.train.batch_size / run.data.metrics[_SPEED])
        seconds = read_json(client, run.info.run_id, "result.json").get("seconds")
        if seconds is not None and not _differs(trained, config, _EVALUATING):
            rest = max(0.0, seconds - steps[phase][-1] * (last - first))
            evaluations.append(rest / evaluations_of(trained, first, last))
    if hardware is None:
        return None
    system, cpus, memory, gpus = hardware
    known = [seconds for own in steps.values() for seconds in own]
    return Speed(
        warmup=fmean(steps["warmup"] or known),
        cotraining=fmean(steps["cotraining"] or known),
        evaluation=fmean(evaluations) if evaluations else None,
        runs=len(known),
        hardware=f"{system}, {cpus} CPUs, {memory} GiB, GPU: {gpus or 'none'}",
        on_gpu=gpus not in {"", "none"},
    )


def _config_of(client: MlflowClient, run: Run) -> Config | None:
    """What a run was trained with; None where another version of cosa trained it."""
    content = read_json(client, run.info.run_id, "config.json")
    try:
        return from_json(json.dumps(content)) if content else None
    except (ValueError, TypeError):
        return None


def _differs(one: Config, other: Config, names: Collection[str], section: str = "\0") -> bool:
    """Whether settings differ that cost time, of those called `names` and those of a section."""
    changed = {name for name, _, _ in difference(one, other)} - _UNTIMED
    return any(name in names or name.startswith(section) for name in changed)


def _part_of(run: Run, trained: Config) -> tuple[str, int, int]:
    """The phase that a run trained, and its first and last step."""
    if run.data.tags.get("cosa.kind") == "warmup":
        return "warmup", 0, trained.train.warmup
    if FORK_TAG in run.data.tags:
        return "cotraining", trained.train.warmup, trained.train.iterations
    return "both", 0, trained.train.iterations
