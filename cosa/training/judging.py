"""How a run judges its networks on the way: metrics by their tracked names, and the files that go with them.

What an evaluation leaves in the run's folder:

    analysis/step_00000400.json   counts behind the paper's analysis figures, of AN and ON
    panels/step_00000400.png      a picture panel of AN
    panels/step_00000400.npz      the same as arrays (cosa/evaluation/panels.py)
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cosa.config import Config
from cosa.data.dataset import SegmentationDataset
from cosa.data.loader import evaluation_batches
from cosa.evaluation.evaluate import Evaluation, evaluate
from cosa.evaluation.panels import panel_indices, panel_rows, save_panels
from cosa.networks.network import CosaNetwork
from cosa.storage.files import write_atomically
from cosa.structures import Ranks
from cosa.training.step import TrainingState


@dataclass(frozen=True)
class Judgement:
    """What one evaluation found."""

    metrics: dict[str, float] = field(default_factory=dict)
    """By their tracked names, `val/assignment/seg_miou`."""
    details: dict[str, Any] = field(default_factory=dict)
    """Per-class IoU and curves, by network."""
    files: tuple[Path, ...] = ()
    """What was written; the name of its folder says what it is."""


def judge(
    state: TrainingState, validation: SegmentationDataset, config: Config, ranks: Ranks, out: Path
) -> Judgement:
    """Both networks on the validation split; the first rank writes the files.

    Raises:
        ValueError: A file of the data set is bad.
        OSError: The output could not be written.
    """
    metrics: dict[str, float] = {}
    details: dict[str, Any] = {}
    analysis: dict[str, Any] = {}
    for name, network in (("assignment", state.assignment), ("online", state.online)):
        found = _evaluated(state, network, validation, config, ranks)
        metrics |= {f"val/{name}/{key}": value for key, value in found.metrics.items()}
        details[name] = {"per_class": found.per_class, "curves": found.curves}
        if found.analysis:
            analysis[name] = found.analysis
    files = _write_files(state, validation, config, ranks, out, analysis) if ranks.first else ()
    return Judgement(metrics, details, files)


def judge_training_images(
    state: TrainingState, images: SegmentationDataset, config: Config, ranks: Ranks
) -> Judgement:
    """AN's CPL and classification on training images, as in Tab. 1 and 4a of the paper."""
    found = _evaluated(state, state.assignment, images, config, ranks, segmentation=False)
    metrics = {f"train/assignment/{key}": value for key, value in found.metrics.items()}
    return Judgement(metrics, {"assignment_train": {"per_class": found.per_class, "curves": found.curves}})


def _evaluated(
    state: TrainingState,
    network: CosaNetwork,
    images: SegmentationDataset,
    config: Config,
    ranks: Ranks,
    *,
    segmentation: bool = True,
) -> Evaluation:
    training = network.training
    network.eval()
    with _autocast(config, ranks):
        found = evaluate(
            network,
            evaluation_batches(images, config, rank=ranks.rank, world=ranks.world),
            config=config,
            classes=images.classes,
            xi=float(state.thresholds.cam.value),
            aux_xi=float(state.thresholds.aux_cam.value),
            reduce=ranks.total,
            device=ranks.device,
            segmentation=segmentation,
        )
    network.train(training)
    return found


def _write_files(
    state: TrainingState,
    validation: SegmentationDataset,
    config: Config,
    ranks: Ranks,
    out: Path,
    analysis: dict[str, Any],
) -> tuple[Path, ...]:
    files = []
    if analysis:
        record = {
            "step": state.step,
            "xi": float(state.thresholds.cam.value),
            "aux_xi": float(state.thresholds.aux_cam.value),
            "epsilon": _json_number(config.csc.epsilon),
            "networks": analysis,
        }
        files.append(out / "analysis" / f"step_{state.step:08d}.json")
        text = json.dumps(record, allow_nan=False) + "\n"
        write_atomically(files[-1], text)
    if config.evaluation.panel_images:
        files += _draw_panel(out / "panels" / f"step_{state.step:08d}.png", state, validation, config, ranks)
    return tuple(files)


def _json_number(value: float) -> float | None:
    """`value`, or None where it is infinite: JSON has no number for it."""
    return value if value < float("inf") else None


def _draw_panel(
    path: Path, state: TrainingState, validation: SegmentationDataset, config: Config, ranks: Ranks
) -> tuple[Path, ...]:
    """Chosen validation images as AN sees them; a picture, and its tiles as arrays."""
    chosen = panel_indices(validation.labels, validation.classes, config.evaluation)
    with _autocast(config, ranks):
        rows = panel_rows(
            state.assignment,
            evaluation_batches(validation, config, only=chosen),
            config=config.evaluation,
            xi=float(state.thresholds.cam.value),
            device=ranks.device,
        )
    return save_panels(path, rows, validation.classes)


def _autocast(config: Config, ranks: Ranks) -> torch.autocast:
    return torch.autocast(ranks.device.type, torch.bfloat16, enabled=config.train.precision == "bf16")
