"""What a run of any method has: its account, the optimiser step, and what the trainer asks of a method."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from cosa.config import Config, to_json
from cosa.networks.multiscale import AnyNetwork
from cosa.storage import checkpoint
from cosa.structures import Batch, Ranks, split
from cosa.training.optim import clip_gradients, learning_rate_scale, set_learning_rate


@dataclass(kw_only=True)
class RunState(ABC):
    """All that a step changes, and the account of the run so far."""

    optimizer: Optimizer
    bad_step: Tensor
    """First step at which each of `terms` was not finite, -1 while it always was; stays on the device."""
    step: int = 0
    seconds: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    """What the last evaluation found."""
    details: dict[str, Any] = field(default_factory=dict)
    """Per-class IoU and curves of the last evaluation, by network."""

    terms: ClassVar[tuple[str, ...]]
    """Every term of the loss that a step can report."""

    @property
    @abstractmethod
    def learning(self) -> AnyNetwork:
        """The network that gradients reach."""

    @property
    @abstractmethod
    def networks(self) -> Mapping[str, AnyNetwork]:
        """The networks that are judged and kept, by the names of `cosa.storage.model_files.NetworkName`."""

    @property
    def xis(self) -> tuple[float, float] | tuple[None, None]:
        """The thresholds of M and M-dagger, where there are CAMs."""
        return None, None

    def to_dict(
        self, config: Config, classes: tuple[str, ...], fingerprint: str, run_id: str | None
    ) -> checkpoint.State:
        """Plain data and tensors for a checkpoint; all that a reader needs who has neither data nor run."""
        xi, aux_xi = self.xis
        return {
            "step": self.step,
            "config": to_json(config),
            "classes": classes,
            "data_fingerprint": fingerprint,
            **{name: network.state_dict() for name, network in self.networks.items()},
            "optimizer": self.optimizer.state_dict(),
            "xi": xi,
            "aux_xi": aux_xi,
            "seconds": self.seconds,
            "run_id": run_id,
            "metrics": self.metrics,
            "details": self.details,
        }

    def resume(self, saved: checkpoint.State) -> None:
        """Go on where `saved` stopped."""
        for name, network in self.networks.items():
            network.load_state_dict(saved[name])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step = saved["step"]
        self.seconds, self.metrics, self.details = saved["seconds"], saved["metrics"], saved["details"]


S = TypeVar("S", bound=RunState)


@dataclass(frozen=True, kw_only=True)
class Method(Generic[S]):
    """What the trainer asks of a method: CoSA's co-training, or a standalone network's."""

    build_state: Callable[[Config, int, torch.device, Sequence[float]], S]
    """The state before the first step, for so many foreground classes; and momenta of further ANs."""
    wrap: Callable[[S, Config, Ranks], nn.Module]
    """The network that learns as the learner of this phase: itself, or in DDP."""
    phase: Callable[[S, Config], bool]
    """Whether the second of two phases has begun; a new one has a learner of its own."""
    step: Callable[[S, nn.Module, Batch, Config, Ranks], dict[str, Tensor]]
    """One optimiser step on this rank's share of a batch; returns the terms of the loss, unweighted."""
    objective: Callable[[dict[str, Tensor], Config], Tensor]
    """The weighted sum of the terms."""


def descend(
    state: RunState,
    learner: nn.Module,
    batch: Batch,
    config: Config,
    terms_of: Callable[[int, Batch], dict[str, Tensor]],
    objective: Callable[[dict[str, Tensor], Config], Tensor],
) -> dict[str, Tensor]:
    """Take the optimiser step of a batch, its micro-batches one after the other, and count it.

    Args:
        state: Changed in place.
        learner: What a method's `wrap` made for this phase.
        batch: This rank's images, on its device.
        config: What to train.
        terms_of: The terms of a micro-batch, given its place and its images.
        objective: Their weighted sum.

    Returns:
        The terms of the loss on this rank, unweighted, on the device.
    """
    count = config.train.accumulate
    state.optimizer.zero_grad(set_to_none=True)
    terms: dict[str, Tensor] = {}
    for i, part in enumerate(split(batch, count)):
        exchange: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if isinstance(learner, DistributedDataParallel) and i < count - 1:
            exchange = learner.no_sync()  # ranks exchange gradients once, after the last micro-batch
        with exchange:
            part_terms = terms_of(i, part)
            torch.autograd.backward(objective(part_terms, config) / count)
        for name, term in part_terms.items():
            terms[name] = terms.get(name, 0) + term.detach() / count
    clip_gradients(state.learning, config.optim.clip_norm)
    set_learning_rate(state.optimizer, learning_rate_scale(state.step, config.train.iterations, config.optim))
    state.optimizer.step()
    _note_non_finite(state, terms)
    state.step += 1
    return terms


def _note_non_finite(state: RunState, terms: dict[str, Tensor]) -> None:
    """Remember on the device which term first broke at which step; read at the next log step."""
    for i, name in enumerate(state.terms):
        if name in terms:
            broke = ~torch.isfinite(terms[name]) & (state.bad_step[i] < 0)
            state.bad_step[i] = torch.where(broke, state.step, state.bad_step[i])
