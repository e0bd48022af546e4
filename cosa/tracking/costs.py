"""What a run will take: as finished runs like it did, or, of memory, at most by a formula.

Runs are alike that have the same network, crop, scales and batch; of these, those on the newest one's
hardware count. What nobody measured and no formula says is None, never a guess.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from cosa.config import Config, difference, flatten, from_json
from cosa.tracking.store import explained, read_json

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
else:
    MlflowClient = Run = Any  # tests check annotations as the program runs

MOST_RUNS = 24
"""Runs that are read, the newest ones."""
SPEED = "train/images_per_second"
EVALUATING = frozenset({"data.layout", "data.val_split"}) | {
    f"evaluation.{name}"
    for name in ("size", "scales", "flip", "batch_size", "max_images", "crf", "train_split")
}
"""Settings that an evaluation's time and memory rest on."""
GPU_GIB = 24.0
"""Memory of the paper's GPU (RTX 3090), on which it trains two images of 448 pixels with ViT-B/16."""
_HARDWARE = ("cosa.host.system", "cosa.host.cpus", "cosa.host.memory_gib", "cosa.host.gpus")
_TRAINING = {"data.crop_size", "cam.scales", "cam.flip", "cam.stride"} | {
    f"train.{name}" for name in ("batch_size", "accumulate", "precision", "compile")
}
"""Settings that a step's time rests on, with those of the network."""
_UNTIMED = {f"network.{name}" for name in ("weights", "weights_sha256", "pretrained", "drop_path")}
"""What a network starts from costs no time."""
_STATE_BYTES = 20
"""Of a parameter in fp32: ON's, AN's, its gradient, AdamW's two moments."""
_PAPER_STATE = _STATE_BYTES * 92_189_952 / 2**30
_PAPER_WORK = 448**2 / 16**2 * 768 * 12
"""Patches x width x blocks of one of the paper's images."""


@dataclass(frozen=True)
class Finished:
    """A finished run that is like another."""

    run: Run
    config: Config
    changed: frozenset[str]
    """Settings in which it differs all the same."""

    @property
    def hardware(self) -> tuple[str, ...]:
        """System, CPUs, GiB of memory and GPUs of its first machine."""
        return tuple(self.run.data.tags.get(tag, "") for tag in _HARDWARE)

    @property
    def on_gpu(self) -> bool:
        """Whether it trained on a GPU."""
        return self.hardware[-1] not in {"", "none"}

    @property
    def processes(self) -> int:
        """GPUs that it trained on, as its hours tell; 0 on CPUs."""
        cost = self.run.data.metrics
        return round(3600 * cost.get("cost/gpu_hours", 0) / (cost.get("cost/seconds") or 1))

    def peak(self, workers: int) -> float | None:
        """GiB of a GPU that it held; None for one of other shares or evaluations, and for a warm-up."""
        warmup = self.run.data.tags.get("cosa.kind") == "warmup"
        if warmup or not self.on_gpu or self.processes != max(1, workers) or self.changed & EVALUATING:
            return None
        found: float | None = self.run.data.metrics.get("cost/peak_memory_gib")
        return found


def hardware_text(hardware: Sequence[str]) -> str:
    """`Finished.hardware` in words."""
    system, cpus, memory, gpus = hardware
    return f"{system}, {cpus} CPUs, {memory} GiB, GPU: {gpus or 'none'}"


def speed_text(like: Sequence[Finished]) -> str:
    """How fast finished runs were and how much of that time they waited for the loader; empty without any."""
    if not like:
        return ""
    metrics = [one.run.data.metrics for one in like]
    waits = [own["cost/loader_wait"] for own in metrics if "cost/loader_wait" in own]
    waited = f", {fmean(waits):.0%} of the time waiting for the loader" if waits else ""
    return (
        f"{fmean(own[SPEED] for own in metrics):.3g} images/s{waited}, mean of {len(like)} finished like it "
        f"on {hardware_text(like[0].hardware)}"
    )


def find_experiment(uri: str, experiment: str) -> tuple[MlflowClient, str] | None:
    """A client and the experiment's id, making nothing; None where there is no such store or experiment.

    Raises:
        TrackingError: The store does not answer.
    """
    path = Path(uri.partition(":///")[2])
    if not uri or (uri.startswith("sqlite") and not path.is_file()):  # or MLflow would make one
        return None
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # by default it tries for minutes
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    with explained(uri):
        from mlflow import MlflowClient

        client = MlflowClient(uri)
        found = client.get_experiment_by_name(experiment)
    if found is None or found.lifecycle_stage != "active":
        return None
    return client, str(found.experiment_id)


def runs_like(client: MlflowClient, experiment_id: str, config: Config) -> list[Finished]:
    """Finished runs like `config` on the newest one's hardware, newest first."""
    alike = (
        f"params.`network.encoder` = '{config.network.encoder}'"
        f" and params.`data.crop_size` = '{config.data.crop_size}'"
        f" and params.`train.batch_size` = '{config.train.batch_size}'"
    )
    query = f"attributes.status = 'FINISHED' and {alike}"
    found: list[Finished] = []
    kind = kind_of(config)
    for run in client.search_runs([experiment_id], query, max_results=MOST_RUNS):
        if run.data.metrics.get(SPEED, 0) <= 0:
            continue
        try:
            trained = from_json(json.dumps(read_json(client, run.info.run_id, "config.json") or None))
        except (ValueError, TypeError):  # lost, or of another version of cosa
            continue
        changed = frozenset(name for name, _, _ in difference(trained, config))
        one = Finished(run, trained, changed)
        if kind_of(trained) == kind and (not found or one.hardware == found[0].hardware):
            found.append(one)
    return found


def kind_of(config: Config) -> tuple[tuple[str, Any], ...]:
    """The settings in which runs are the same that are alike."""
    return tuple(
        (name, value)
        for name, value in flatten(config).items()
        if (name in _TRAINING or name.startswith("network.")) and name not in _UNTIMED
    )


def size_of(config: Config) -> tuple[int, float | None]:
    """Parameters of the network for VOC's 20 classes, and GiB at most of a GPU for each image at a time.

    The second is a bound: the paper's two images fit its GPU beside the state of its networks, and others
    need of that the part that their pixels are of the paper's or, if more, their patches x width x blocks. It
    is None for standalone networks, of which the paper tells no such size.
    """
    import torch

    from cosa.networks.network import build_network
    from cosa.networks.segmentation import build_segmentation_network

    network, side = (
        config.network.replace(pretrained=False, weights="", weights_sha256=""),
        config.data.crop_size,
    )
    build = build_segmentation_network if config.standalone else build_network
    with torch.device("meta"):  # shapes alone
        built: Any = build(network, 20, side)
    parameters = sum(one.numel() for one in built.parameters())
    if config.standalone:
        return parameters, None
    work = side**2 / built.patch_size**2 * built.encoder.vit.embed_dim * len(built.encoder.vit.blocks)
    share = max(work / _PAPER_WORK, side**2 / 448**2) * max(1.0, max(config.cam.scales) / 1.5) ** 2
    return parameters, share * (GPU_GIB - _PAPER_STATE) / 2


def expected_gib(config: Config, workers: int, like: Sequence[Finished]) -> tuple[float | None, str]:
    """GiB of a GPU that each process of a run takes, and how that is known.

    Args:
        config: What it trains.
        workers: Its data-parallel processes.
        like: What `runs_like` found.
    """
    peaks = [peak for one in like if (peak := one.peak(workers)) is not None]
    if peaks:
        return max(peaks), f"the most of {len(peaks)} finished like it"
    parameters, each = size_of(config)
    if each is None:
        return None, "not known: none like it has finished on a GPU, and the formula is CoSA's alone"
    return formula_gib(
        parameters, each, config.train.at_a_time(workers)
    ), "at most: the paper trains 2 images of 448 pixels on 24 GB"


def formula_gib(parameters: int, each: float, images: int) -> float:
    """GiB of a GPU that a process of CoSA needs at most for so many images at a time, see `size_of`."""
    return _STATE_BYTES * parameters / 2**30 + each * images


def images_on(gib: float, parameters: int, each: float) -> int:
    """Images at a time for which a GPU of so many GiB has room, by the same formula."""
    return int((gib - _STATE_BYTES * parameters / 2**30) / each + 1e-6)
