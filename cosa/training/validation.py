"""How a run evaluates its networks on the way: metrics by their tracked names, and the files beside them.

What an evaluation leaves in the run's folder:

    analysis/step_00000400.json   counts behind the paper's analysis figures, of AN and ON
    panels/step_00000400.png      a picture panel of AN
    panels/step_00000400.npz      the same as arrays (cosa/evaluation/panels.py)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cosa.config import Config
from cosa.data.dataset import SegmentationDataset
from cosa.data.loader import evaluation_batches
from cosa.data.open import RunData
from cosa.evaluation.evaluate import Evaluation, evaluate
from cosa.evaluation.panels import panel_indices, panel_rows, save_panels
from cosa.networks.network import CosaNetwork
from cosa.storage.files import write_atomically
from cosa.structures import Ranks
from cosa.training.step import TrainingState


@dataclass(frozen=True)
class Findings:
    """What one evaluation found."""

    metrics: dict[str, float]
    """By their tracked names, `val/assignment/seg_miou`."""
    details: dict[str, Any]
    """Per-class IoU and curves, by network."""
    files: tuple[Path, ...]
    """What was written; the name of its folder says what it is."""


def evaluate_networks(
    state: TrainingState, data: RunData, config: Config, ranks: Ranks, out: Path
) -> Findings:
    """Both networks on the validation split and, after the last step of all, AN's CPL on training images.

    Paper: Tab. 1 and 4a read CPL and classification on training images. The first rank writes the files.

    Raises:
        ValueError: A file of the data set is bad.
        OSError: The output could not be written.
    """
    found: dict[str, Evaluation] = {}
    files: tuple[Path, ...] = ()
    if data.validation:
        networks = {"assignment": state.assignment, "online": state.online}
        found = {
            name: _evaluate(state, network, data.validation, config, ranks)
            for name, network in networks.items()
        }
        if ranks.first:
            files = _write_files(state, data.validation, config, ranks, out, found)
    metrics = {
        f"val/{name}/{key}": value for name, one in found.items() for key, value in one.metrics.items()
    }
    if data.judged and state.step == config.train.iterations:
        one = _evaluate(state, state.assignment, data.judged, config, ranks, segmentation=False)
        metrics |= {f"train/assignment/{key}": value for key, value in one.metrics.items()}
        found["assignment_train"] = one
    details = {name: {"per_class": one.per_class, "curves": one.curves} for name, one in found.items()}
    return Findings(metrics, details, files)


def _evaluate(
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
    found: Mapping[str, Evaluation],
) -> tuple[Path, ...]:
    files = []
    analysis = {name: one.analysis for name, one in found.items() if one.analysis}
    if analysis:
        epsilon = config.csc.epsilon
        record = {
            "step": state.step,
            "xi": float(state.thresholds.cam.value),
            "aux_xi": float(state.thresholds.aux_cam.value),
            "epsilon": epsilon if epsilon < float("inf") else None,  # JSON has no number for infinity
            "networks": analysis,
        }
        files.append(out / "analysis" / f"step_{state.step:08d}.json")
        write_atomically(files[-1], json.dumps(record, allow_nan=False) + "\n")
    if config.evaluation.panel_images:
        files += _draw_panel(out / "panels" / f"step_{state.step:08d}.png", state, validation, config, ranks)
    return tuple(files)


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
