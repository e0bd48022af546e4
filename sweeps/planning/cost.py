"""What a plan costs in hours, from the speed that finished runs had; what nobody measured is not guessed.

A phase has the seconds per iteration of runs that are alike, see `cosa.tracking.costs`, and an evaluation the
seconds of those that also evaluate alike.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from cosa.config import Config
from cosa.distributed.session import TrialResources
from cosa.tracking import read_json
from cosa.tracking.costs import EVALUATING, SPEED, hardware_text, runs_like
from sweeps.planning.plan import Trial, counted
from sweeps.runs import FORK_TAG

if TYPE_CHECKING:
    from mlflow import MlflowClient


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
    like = runs_like(client, experiment_id, config)
    steps: dict[str, list[float]] = defaultdict(list)  # seconds by phase
    evaluations: list[float] = []
    for one in like:
        train, tags = one.config.train, one.run.data.tags
        phase = (
            "warmup" if tags.get("cosa.kind") == "warmup" else "cotraining" if FORK_TAG in tags else "both"
        )
        first = train.warmup if phase == "cotraining" else 0
        last = train.warmup if phase == "warmup" else train.iterations
        step = train.batch_size / one.run.data.metrics[SPEED]
        steps[phase].append(step)
        seconds = read_json(client, one.run.info.run_id, "result.json").get("seconds")
        if seconds is not None and not one.changed & EVALUATING:
            rest = max(0.0, seconds - step * (last - first))
            evaluations.append(rest / evaluations_of(one.config, first, last))
    if not like:
        return None
    known = [seconds for own in steps.values() for seconds in own]
    return Speed(
        warmup=fmean(steps["warmup"] or known),
        cotraining=fmean(steps["cotraining"] or known),
        evaluation=fmean(evaluations) if evaluations else None,
        runs=len(known),
        hardware=hardware_text(like[0].hardware),
        on_gpu=like[0].on_gpu,
    )
