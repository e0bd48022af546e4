"""What a plan costs in hours, from the speed that finished runs had; what nobody measured is not guessed.

A phase has the seconds per iteration of runs with the same network, crop, scales and batch, and an evaluation
the seconds of those that also evaluate alike. Runs on the newest run's hardware count, others do not.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from cosa.config import Config, difference, from_json
from cosa.distributed.session import TrialResources
from sweeps.planning.plan import Trial, counted
from sweeps.runs import FORK_TAG, read_json

if TYPE_CHECKING:
    from mlflow import MlflowClient

MOST_RUNS = 24
"""Runs that are read, the newest ones."""
_SPEED = "train/images_per_second"
_HARDWARE = ("cosa.host.system", "cosa.host.cpus", "cosa.host.memory_gib", "cosa.host.gpus")
_TRAINING = {"data.crop_size", "cam.scales", "cam.flip", "cam.stride"} | {
    f"train.{name}" for name in ("batch_size", "accumulate", "precision", "compile")
}
"""Settings that a step's time rests on, with those of the network."""
_UNTIMED = {f"network.{name}" for name in ("weights", "weights_sha256", "pretrained", "drop_path")}
"""What a network starts from costs no time."""
_EVALUATING = {"data.layout", "data.val_split"} | {
    f"evaluation.{name}"
    for name in ("size", "scales", "flip", "batch_size", "max_images", "crf", "train_split")
}


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
        return f"at the speed of {counted(self.runs, 'finished run')} like these on {self.hardware}"


def price(trials: Sequence[Trial], speed: Speed, resources: TrialResources) -> str:
    """What `trials` cost, in words: GPU-hours where the speed is a GPU's, else core-hours."""
    seconds, evaluations = 0.0, 0
    for trial in trials:
        warmup = max(0, min(trial.last_step, trial.config.train.warmup) - trial.first_step)
        seconds += warmup * speed.warmup + (trial.steps - warmup) * speed.cotraining
        evaluations += evaluations_of(trial.config, trial.first_step, trial.last_step)
    share = (1.0 if resources.gpus is None else resources.gpus) if speed.on_gpu else resources.cpus
    hours = share * resources.processes / 3600
    evaluating = hours * evaluations * (speed.evaluation or 0)
    part = (
        "evaluations not included, none like these was measured"
        if speed.evaluation is None
        else f"evaluations {evaluating:.2g} of them"
    )
    unit = "GPU-hours" if speed.on_gpu else "core-hours"
    return f"about {hours * seconds + evaluating:.2g} {unit}, {part}"


def evaluations_of(config: Config, first: int, last: int) -> int:
    """Evaluations after `first` and up to `last`, where there always is one."""
    every = config.evaluation.every
    return last // every - first // every + (last % every != 0)


def measured(client: MlflowClient, experiment_id: str, config: Config) -> Speed | None:
    """The speed of finished runs like `config`; None where there is none."""
    alike = (
        f"params.`network.encoder` = '{config.network.encoder}'"
        f" and params.`data.crop_size` = '{config.data.crop_size}'"
        f" and params.`train.batch_size` = '{config.train.batch_size}'"
    )
    query = f"attributes.status = 'FINISHED' and {alike}"
    hardware: tuple[str, ...] | None = None
    steps: dict[str, list[float]] = defaultdict(list)  # seconds by phase
    evaluations: list[float] = []
    for run in client.search_runs([experiment_id], query, max_results=MOST_RUNS):  # newest first
        speed, tags = run.data.metrics.get(_SPEED, 0), run.data.tags
        where = tuple(tags.get(tag, "") for tag in _HARDWARE)
        if speed <= 0 or where != (hardware or where):
            continue
        try:
            trained = from_json(json.dumps(read_json(client, run.info.run_id, "config.json") or None))
        except (ValueError, TypeError):  # lost, or of another version of cosa
            continue
        changed = {name for name, _, _ in difference(trained, config)} - _UNTIMED
        if any(name in _TRAINING or name.startswith("network.") for name in changed):
            continue
        hardware, train = where, trained.train
        phase = (
            "warmup" if tags.get("cosa.kind") == "warmup" else "cotraining" if FORK_TAG in tags else "both"
        )
        first = train.warmup if phase == "cotraining" else 0
        last = train.warmup if phase == "warmup" else train.iterations
        step = train.batch_size / speed
        steps[phase].append(step)
        seconds = read_json(client, run.info.run_id, "result.json").get("seconds")
        if seconds is not None and not changed & _EVALUATING:
            rest = max(0.0, seconds - step * (last - first))
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
