"""A standalone segmentation network, trained on given label maps by plain cross-entropy (CoSA-MS, Tab. 2).

BatchNorm takes its statistics from the images that a process has at a time: over all ranks on GPUs (SyncBN),
of its own share on CPUs, and of each micro-batch with `train.accumulate`. A network that has BatchNorm
therefore trains differently with another number of CPU ranks or micro-batches; running statistics, which
evaluation reads, are averaged over ranks after every step. One without differs by rounding alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (torch's own convention)
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from cosa.config import Config
from cosa.networks.multiscale import resize
from cosa.networks.network import autocast
from cosa.networks.published import require_weights
from cosa.networks.segmentation import SegmentationNetwork, build_segmentation_network
from cosa.structures import IGNORE, Batch, Ranks, SegmentationOutput
from cosa.training.optim import build_optimizer
from cosa.training.state import Method, RunState, descend


@dataclass(kw_only=True)
class SegmentationState(RunState):
    """Of one network alone."""

    network: SegmentationNetwork

    terms: ClassVar[tuple[str, ...]] = ("seg", "aux_seg")

    @property
    def learning(self) -> SegmentationNetwork:
        """The network."""
        return self.network

    @property
    def networks(self) -> Mapping[str, SegmentationNetwork]:
        """The network."""
        return {"standalone": self.network}


def build_state(
    config: Config, classes: int, device: torch.device, momenta: Sequence[float] = ()
) -> SegmentationState:
    """The state before the first step: what no published weights give is drawn from the seed.

    Raises:
        ValueError: The config's sizes do not fit the network, BatchNorm would see one image at a time, or the
            full WideResNet38 has no weights.
        FileNotFoundError: `network.weights` names no file.
    """
    assert not momenta, "there is no AN"
    require_weights(config.network)
    torch.manual_seed(config.train.seed)
    network = build_segmentation_network(config.network, classes, config.data.crop_size)
    stride = network.patch_size
    if config.evaluation.size % stride:
        raise ValueError(
            f"evaluation.size must be a multiple of the network's stride {stride}, "
            f"got {config.evaluation.size}"
        )
    network, workers = network.to(device).train(), Ranks.current().world
    if (
        _batch_norms(network)
        and config.train.at_a_time(workers) < 2
        and (workers == 1 or device.type == "cpu")
    ):
        raise ValueError(
            f"train.batch_size must leave each worker 2 or more images at a time for BatchNorm, got "
            f"{config.train.batch_size} over workers x train.accumulate = {workers * config.train.accumulate}"
        )
    if config.train.compile:
        network.compile()
    return SegmentationState(
        network=network,
        optimizer=build_optimizer(network, config.optim),
        bad_step=torch.full((len(SegmentationState.terms),), -1, device=device),
    )


def wrap(state: SegmentationState, config: Config, ranks: Ranks) -> nn.Module:
    """The network itself, or in DDP, with SyncBN where ranks have GPUs."""
    if ranks.world == 1:
        return state.network
    on_gpus = ranks.device.type == "cuda"
    if on_gpus and _batch_norms(state.network):
        convert: Any = nn.SyncBatchNorm.convert_sync_batchnorm
        convert(state.network)  # in place: it is no BatchNorm itself
    return DistributedDataParallel(
        state.network,
        device_ids=[ranks.device] if on_gpus else None,
        broadcast_buffers=False,  # averaged after each step instead
        find_unused_parameters=state.network.aux_head is not None and config.segmentation.aux_weight == 0,
    )


def segmentation_step(
    state: SegmentationState, learner: nn.Module, batch: Batch, config: Config, ranks: Ranks
) -> dict[str, Tensor]:
    """One optimiser step on this rank's share of a batch; see `cosa.training.step.training_step`.

    The strong view is segmented; means are over the labelled pixels of the whole batch.
    """
    torch.manual_seed(config.train.seed * 2**32 + state.step)  # for dropout and stochastic depth
    assert batch.masks is not None, "the loader reads the labels of a standalone network"
    targets = batch.masks.where(batch.valid, IGNORE)
    count = config.train.accumulate
    pixels = ranks.total((targets != IGNORE).sum()).clamp(min=1) / (ranks.world * count)
    each = targets.chunk(count)

    def terms_of(place: int, part: Batch) -> dict[str, Tensor]:
        with autocast(config.train, ranks.device):
            output = learner(part.strong)
        return learn(output, each[place], config, pixels)

    terms = descend(state, learner, batch, config, terms_of, objective)
    _average_statistics(state.network, ranks)
    return terms


def learn(output: SegmentationOutput, targets: Tensor, config: Config, pixels: Tensor) -> dict[str, Tensor]:
    """Cross-entropy of both heads' logits, resized to the targets (b h w), as sums over `pixels`."""
    size = (targets.shape[1], targets.shape[2])
    logits = {"seg": output.seg_logits}
    if output.aux_logits is not None and config.segmentation.aux_weight:
        logits["aux_seg"] = output.aux_logits
    return {
        name: F.cross_entropy(resize(maps, size), targets, ignore_index=IGNORE, reduction="sum") / pixels
        for name, maps in logits.items()
    }


def objective(terms: dict[str, Tensor], config: Config) -> Tensor:
    """The weighted sum of the terms that are there."""
    weights = {"seg": 1.0, "aux_seg": config.segmentation.aux_weight}
    return torch.stack([weights[name] * term for name, term in terms.items()]).sum()


def _batch_norms(network: nn.Module) -> list[_BatchNorm]:
    """Those that are trained and know of their own process alone; frozen ones stay in evaluation."""
    norms = (module for module in network.modules() if isinstance(module, _BatchNorm))
    return [norm for norm in norms if norm.training and not isinstance(norm, nn.SyncBatchNorm)]


@torch.no_grad()
def _average_statistics(network: nn.Module, ranks: Ranks) -> None:
    """Give all ranks the mean of their running statistics."""
    norms = _batch_norms(network)
    if ranks.world == 1 or not norms:
        return
    buffers = [
        buffer for norm in norms for buffer in (norm.running_mean, norm.running_var) if buffer is not None
    ]
    mean = ranks.total(nn.utils.parameters_to_vector(buffers)) / ranks.world
    nn.utils.vector_to_parameters(mean, buffers)


SEGMENTATION = Method(
    build_state=build_state,
    wrap=wrap,
    phase=lambda state, config: False,  # noqa: ARG005 (there is but one)
    step=segmentation_step,
    objective=objective,
)
