"""How a run evaluates its networks on the way: metrics by their tracked names, and the files beside them.

What an evaluation leaves in the run's folder:

    analysis/step_00000400.json   counts behind the paper's analysis figures, of AN and ON
    panels/step_00000400.png      a picture panel of AN, of ON where it assigns its own labels
    panels/step_00000400.npz      the same as arrays (cosa/evaluation/panels.py)

A run whose `cam.source` is `online` has no AN: its average of ON has no part in training. A standalone
network has no CAMs, and its run no analysis.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from cosa.config import Config
from cosa.data.dataset import SegmentationDataset
from cosa.data.loader import evaluation_batches
from cosa.data.open import RunData
from cosa.evaluation.evaluate import Evaluation, evaluate
from cosa.evaluation.panels import panel_indices, panel_rows, save_panels
from cosa.networks.multiscale import AnyNetwork
from cosa.networks.network import autocast
from cosa.storage.files import write_atomically
from cosa.structures import Ranks
from cosa.training.state import RunState


def evaluate_networks(state: RunState, data: RunData, config: Config, ranks: Ranks, out: Path) -> list[Path]:
    """The networks on the validation split and, after the last step of all, CPL on training images.

    Paper: Tab. 1 and 4a read CPL and classification on training images. They are those of the assigning
    network, `cam.source`. What is found is kept in the state.

    Returns:
        The files that the first rank wrote; the name of its folder says what a file is.

    Raises:
        ValueError: A file of the data set is bad.
        OSError: The output could not be written.
    """
    xi, aux_xi = state.xis

    def judge(network: AnyNetwork, images: SegmentationDataset, *, segmentation: bool = True) -> Evaluation:
        return evaluate(
            network,
            evaluation_batches(images, config, rank=ranks.rank, world=ranks.world),
            config=config,
            classes=images.classes,
            xi=xi,
            aux_xi=aux_xi,
            reduce=ranks.total,
            device=ranks.device,
            segmentation=segmentation,
        )

    state.metrics, state.details, files = {}, {}, []
    state.learning.eval()
    with autocast(config.train, ranks.device):
        if data.validation:
            found = {name: judge(network, data.validation) for name, network in state.networks.items()}
            for name, one in found.items():
                _keep(state, name, f"val/{name}", one)
            if ranks.first:
                files = _write_files(state, found, data.validation, config, ranks, out)
        if data.judged and state.step == config.train.iterations:
            source = config.cam.source
            one = judge(state.networks[source], data.judged, segmentation=False)
            _keep(state, f"{source}_train", f"train/{source}", one)
    state.learning.train()
    return files


def _keep(state: RunState, name: str, prefix: str, found: Evaluation) -> None:
    state.metrics |= {f"{prefix}/{key}": value for key, value in found.metrics.items()}
    state.details[name] = {"per_class": found.per_class, "curves": found.curves}


def _write_files(
    state: RunState,
    found: Mapping[str, Evaluation],
    validation: SegmentationDataset,
    config: Config,
    ranks: Ranks,
    out: Path,
) -> list[Path]:
    """Counts for the analysis figures, and chosen images as the assigning network sees them, with tiles."""
    files: list[Path] = []
    xi, aux_xi = state.xis
    analysis = {name: one.analysis for name, one in found.items() if one.analysis}
    if analysis:
        epsilon = config.csc.epsilon
        record = {
            "step": state.step,
            "xi": xi,
            "aux_xi": aux_xi,
            "epsilon": epsilon if epsilon < float("inf") else None,  # JSON has no number for infinity
            "networks": analysis,
        }
        files.append(out / "analysis" / f"step_{state.step:08d}.json")
        write_atomically(files[-1], json.dumps(record, allow_nan=False) + "\n")
    if config.evaluation.panel_images:
        chosen = panel_indices(validation.labels, validation.classes, config.evaluation)
        source = config.judged_network
        rows = panel_rows(
            state.networks[source],
            evaluation_batches(validation, config, only=chosen),
            config=config,
            xi=xi,
            device=ranks.device,
        )
        path = out / "panels" / f"step_{state.step:08d}.png"
        files += save_panels(path, rows, validation.classes, network=source)
    return files
