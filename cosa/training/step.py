"""One optimiser step: AN assigns, ON learns, AN follows. No host synchronisation anywhere in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cosa.config import Config
from cosa.equations.threshold import make_threshold
from cosa.networks.ema import assignment_of, follow
from cosa.networks.network import CosaNetwork, autocast, build_network, in_bf16, plain_attention
from cosa.storage import checkpoint
from cosa.structures import Assignment, Batch, Ranks, split
from cosa.training.optim import build_optimizer
from cosa.training.state import Method, RunState, descend
from cosa.training.swap import Thresholds, assign, learn, middles, objective

TERMS = ("cls", "aux_cls", "c2s", "aux_c2s", "s2c", "csc")
"""Every term a step can report, in the order of Eq. 11."""


@dataclass(kw_only=True)
class TrainingState(RunState):
    """Of co-training: ON, AN that follows it, and both thresholds."""

    online: CosaNetwork
    assignment: CosaNetwork
    thresholds: Thresholds
    followers: dict[float, CosaNetwork] = field(default_factory=dict)
    """ANs of other momenta, which a shared warm-up carries along for the arms that will need them."""

    terms: ClassVar[tuple[str, ...]] = TERMS

    @property
    def learning(self) -> CosaNetwork:
        """ON."""
        return self.online

    @property
    def networks(self) -> Mapping[str, CosaNetwork]:
        """AN and ON."""
        return {"assignment": self.assignment, "online": self.online}

    @property
    def xis(self) -> tuple[float, float]:
        """The thresholds of M and M-dagger."""
        return self.thresholds.values()

    def to_dict(
        self, config: Config, classes: tuple[str, ...], fingerprint: str, run_id: str | None
    ) -> checkpoint.State:
        """With the queues of both thresholds and the followers."""
        return {
            **super().to_dict(config, classes, fingerprint, run_id),
            "followers": {repr(m): network.state_dict() for m, network in self.followers.items()},
            "threshold": self.thresholds.cam.state_dict(),
            "aux_threshold": self.thresholds.aux_cam.state_dict(),
        }

    def resume(self, saved: checkpoint.State) -> None:
        """Go on where `saved` stopped."""
        super().resume(saved)
        for momentum, network in self.followers.items():
            network.load_state_dict(saved["followers"][repr(momentum)])
        self.thresholds.cam.load_state_dict(saved["threshold"])
        self.thresholds.aux_cam.load_state_dict(saved["aux_threshold"])

    def fork(self, saved: checkpoint.State, momentum: float | None = None) -> None:
        """Start from another run's networks and optimiser, with an account of one's own.

        Args:
            saved: Where to start.
            momentum: Of the follower to take as AN; the run's own AN by default.
        """
        self.online.load_state_dict(saved["online"])
        assignment = saved["assignment"] if momentum is None else saved["followers"][repr(momentum)]
        self.assignment.load_state_dict(assignment)
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step = saved["step"]


def build_state(
    config: Config, classes: int, device: torch.device, momenta: Sequence[float] = ()
) -> TrainingState:
    """The state before the first step: heads drawn from the seed, AN an exact copy of ON.

    Args:
        config: What to train.
        classes: Foreground classes.
        device: Where to train.
        momenta: Momenta of further ANs that are to follow ON.

    Raises:
        ValueError: The config's sizes do not fit the encoder.
        FileNotFoundError: `network.weights` names no file.
    """
    torch.manual_seed(config.train.seed)
    online = build_network(config.network, classes, config.data.crop_size)
    patch, stride = online.patch_size, config.cam.stride
    if patch % stride:
        raise ValueError(f"cam.stride must divide the patch size {patch}, got {stride}")
    if config.evaluation.size % patch:
        raise ValueError(
            f"evaluation.size must be a multiple of the patch size {patch}, got {config.evaluation.size}"
        )
    if device.type == "cuda":
        torch.backends.cuda.matmul.fp32_precision = "tf32"  # as convolutions compute by torch's default
    online = online.to(device).train()
    assignment = assignment_of(online)
    if device.type == "cpu" and in_bf16(config.train, device):
        plain_attention(online)
    if config.train.compile:
        for network in (online, assignment):  # a copy of a compiled network is not compiled
            network.compile()
    ours = config.threshold
    threshold = (ours.mode, ours.xi, ours.queue, ours.min_activation, ours.min_std, device)
    return TrainingState(
        online=online,
        assignment=assignment,
        optimizer=build_optimizer(online, config.optim),
        thresholds=Thresholds(make_threshold(*threshold), make_threshold(*threshold)),
        bad_step=torch.full((len(TERMS),), -1, device=device),
        followers={momentum: assignment_of(online) for momentum in momenta},
    )


def wrap(state: TrainingState, config: Config, ranks: Ranks) -> nn.Module:
    """ON as the learner of this phase: itself, or in DDP, which averages gradients over ranks.

    The warm-up and a run without c2s leave the decoder without gradients, which DDP must be told.
    """
    if ranks.world == 1:
        return state.online
    unused = not cotraining(state, config) or config.c2s.weight == 0
    device_ids = [ranks.device] if ranks.device.type == "cuda" else None
    return DistributedDataParallel(
        state.online,
        device_ids=device_ids,
        find_unused_parameters=unused,
        gradient_as_bucket_view=True,  # no second copy of all gradients
    )


def cotraining(state: TrainingState, config: Config) -> bool:
    """Whether the next step co-trains; before that classification alone warms up."""
    return state.step >= config.train.warmup


def training_step(
    state: TrainingState, learner: nn.Module, batch: Batch, config: Config, ranks: Ranks
) -> dict[str, Tensor]:
    """One optimiser step on this rank's share of a batch.

    Every random number of a step is a function of (seed, step), never of what came before, so that a
    resumed run needs no generator's state. Means are taken over the whole batch: this rank divides by the
    mean count per share, and DDP and `descend` average over shares.

    Args:
        state: Changed in place.
        learner: What `wrap` made of `state.online` for this phase.
        batch: This rank's images, on its device.
        config: What to train.
        ranks: Who else has a share.

    Returns:
        The terms of the loss on this rank, unweighted, on the device.
    """
    torch.manual_seed(config.train.seed * 2**32 + state.step)  # for stochastic depth
    count, cotrains = config.train.accumulate, cotraining(state, config)
    assigned: Sequence[Assignment | None] = [None] * count
    keys: Sequence[Tensor | None] = [None] * count
    noise: Sequence[Tensor | None] = [None] * count
    pixels = patches = None
    if cotrains:
        with autocast(config.train, ranks.device):
            assigned = split(_assign(state, batch, config, ranks), count)
        valid = middles(batch.valid, config.cam.stride)
        pixels = ranks.total(valid.sum()) / (ranks.world * count)
        if config.s2c.cam == "relu":
            on_patches = middles(valid, state.online.patch_size // config.cam.stride)
            patches = ranks.total(on_patches.sum()) / (ranks.world * count)
        keys = _draw(state, batch, config, ranks).chunk(count)
        if config.s2c.source == "noise":
            noise = _draw(state, batch, config, ranks, stream=1).chunk(count)
    # DDP waits for the gradient of every weight whose output it sees: no c2s, no segmentation
    segment = cotrains and config.c2s.weight > 0
    detach = config.s2c.detach if cotrains and config.guided else "none"

    def terms_of(place: int, part: Batch) -> dict[str, Tensor]:
        # the network alone: CSC's similarities would be bfloat16, too
        with autocast(config.train, ranks.device):
            output = learner(part.strong, segment=segment, detach=detach)
        return learn(
            output,
            part,
            assigned[place],
            config,
            pixels=pixels,
            patches=patches,
            keys=keys[place],
            noise=noise[place],
        )

    terms = descend(state, learner, batch, config, terms_of, objective)
    follow(state.assignment, state.online, config.ema.momentum)
    for momentum, network in state.followers.items():
        follow(network, state.online, momentum)
    return terms


def _assign(state: TrainingState, batch: Batch, config: Config, ranks: Ranks) -> Assignment:
    """What the assigning network says of the batch; ON assigns in evaluation mode, too."""
    network = state.assignment if config.cam.source == "assignment" else state.online.eval()
    assigned = assign(network, batch, state.thresholds, config, ranks.total)
    state.online.train()
    return assigned


def _draw(state: TrainingState, batch: Batch, config: Config, ranks: Ranks, stream: int = 0) -> Tensor:
    """Random numbers in [0, 1) per patch of this rank's images, (b p q); the same however many ranks.

    Streams 0 and 1 are independent of each other.
    """
    side = config.data.crop_size // state.online.patch_size
    seed = config.train.seed * 2**32 + stream * 2**31 + state.step
    numbers = torch.rand(config.train.batch_size, side, side, generator=torch.Generator().manual_seed(seed))
    share = len(batch.labels)
    return numbers[ranks.rank * share : (ranks.rank + 1) * share].to(ranks.device, non_blocking=True)


COTRAINING = Method(
    build_state=build_state, wrap=wrap, phase=cotraining, step=training_step, objective=objective
)
