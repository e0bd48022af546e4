"""The confidence threshold xi: the two-Gaussian search (pure functions) and the state around it.

Everything works on a histogram of the activations, on the device: nothing is copied to the host, and the
cost does not depend on the number of pixels. Bin i of n holds [i / n, (i + 1) / n), the last one 1.0, too;
a threshold is always one of the inner edges, 1 / n to (n - 1) / n. Several workers add up the histograms of
their shares and then all compute the same threshold.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

BINS = 200
"""Bins of an activation histogram: thresholds are found to 0.005."""

# Enough to be within a bin or two of convergence; a test of convergence would wait for the device.
_EM_STEPS = 64


@dataclass(frozen=True)
class GaussianPair:
    """Two weighted Gaussians over activations: the background, with the lower mean, then the foreground."""

    pi: Float[Tensor, "2"]
    """Weights, sum 1."""
    mu: Float[Tensor, "2"]
    """Means, ascending."""
    var: Float[Tensor, "2"]
    """Variances, at least the floor of the fit."""

    def log_joint(self, x: Float[Tensor, " n"]) -> Float[Tensor, "2 n"]:
        """log(pi N(x | mu, var)) of both Gaussians."""
        pi, mu, var = self.pi[:, None], self.mu[:, None], self.var[:, None]
        return pi.log() - (x - mu) ** 2 / (2 * var) - (2 * math.pi * var).log() / 2


def activation_bin(activation: Float[Tensor, "*s"], bins: int = BINS) -> Int[Tensor, "*s"]:
    """Bin of each activation; exact, so that `bin >= i` is `activation >= i / bins`."""
    return torch.bucketize(activation.contiguous(), _inner_edges(bins, activation), right=True)


def _inner_edges(bins: int, like: Tensor) -> Float[Tensor, " n"]:
    """1 / bins ... (bins - 1) / bins on the device and in the precision of `like`."""
    edges = torch.arange(1, bins, device=like.device, dtype=torch.float64) / bins
    return edges.to(like.dtype)


def activation_histogram(
    activation: Float[Tensor, "b h w"], valid: Bool[Tensor, "b h w"], bins: int = BINS
) -> Int[Tensor, " bins"]:
    """Counts of the valid pixels' activations.

    Args:
        activation: nu in [0, 1].
        valid: False on padding, which is not counted.
        bins: Number of bins of equal width.
    """
    counts = torch.zeros(bins, dtype=torch.int64, device=activation.device)
    # not torch.bincount: on CUDA it waits for the device to learn the size of its result
    return counts.scatter_add_(0, activation_bin(activation, bins).flatten(), valid.flatten().long())


def fit_two_gaussians(
    histogram: Int[Tensor, " bins"], min_activation: float, min_std: float = 0.0
) -> GaussianPair:
    """Fit two Gaussians to a histogram by expectation maximisation.

    The start is the split at the mean and the number of steps is fixed, so equal histograms give equal
    Gaussians.
    Paper: names no floor on the variances; we need one. A trained CAM has a plateau near 1 and a spike at 0,
    a free Gaussian collapses onto either, and the threshold runs off to it.

    Args:
        histogram: Counts over equal bins of [0, 1].
        min_activation: Bins that reach down to this activation are left out; negative keeps all.
        min_std: Least standard deviation of either Gaussian; never less than a bin's width.

    Returns:
        Finite for every histogram, even an empty one.
    """
    weights, x = _fitted(histogram, min_activation)
    weights = weights / weights.sum().clamp_min(1)
    features = torch.stack([torch.ones_like(x), x, x**2])
    upper = x > (weights * x).sum()
    share = torch.stack([~upper, upper]).to(x.dtype)
    for _ in range(_EM_STEPS):
        pair = _maximisation(weights * share, features, min_std)
        share = pair.log_joint(x).softmax(0)
    return _ascending(_maximisation(weights * share, features, min_std))


def _maximisation(
    weights: Float[Tensor, "2 bins"], features: Float[Tensor, "3 bins"], min_std: float
) -> GaussianPair:
    """The Gaussians of the highest likelihood, given each one's share of every bin."""
    mass, first, second = (weights @ features.T).unbind(1)
    mass = mass.clamp_min(torch.finfo(mass.dtype).tiny)  # one that nothing belongs to stays finite
    mu = first / mass
    floor = max(min_std, 1 / features.shape[1])
    return GaussianPair(pi=mass / mass.sum(), mu=mu, var=(second / mass - mu**2).clamp_min(floor**2))


def _ascending(pair: GaussianPair) -> GaussianPair:
    """The pair with the lower mean first."""
    order = pair.mu.argsort()
    return GaussianPair(pi=pair.pi[order], mu=pair.mu[order], var=pair.var[order])


def _fitted(
    histogram: Int[Tensor, " bins"], min_activation: float
) -> tuple[Float[Tensor, " bins"], Float[Tensor, " bins"]]:
    """Counts with the bins under the cut emptied, and the bins' centres."""
    bins = len(histogram)
    low = torch.arange(bins, device=histogram.device, dtype=torch.float64) / bins
    return torch.where(low > min_activation, histogram, 0).double(), low + 0.5 / bins


def search_threshold(
    histogram: Int[Tensor, " bins"],
    pair: GaussianPair,
    min_activation: float,
    fallback: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """xi*: the bin edge that best splits the activations between the two Gaussians.

    Paper: Eq. (6).
    Paper: adds two products of densities; we maximise the log-likelihood of the split, the sum over
    nu >= xi of log(pi_fg N_fg) plus the sum over nu < xi of log(pi_bg N_bg).
    Paper: takes all activations; we leave out those up to `min_activation`, unless it is negative.

    Args:
        histogram: Counts the pair was fitted to.
        pair: Background and foreground.
        min_activation: Same cut as in the fit; xi lies above it.
        fallback: Returned where fewer than two bins are occupied, so that there is nothing to split.

    Returns:
        An inner bin edge, or `fallback`; the lowest of equally good edges.
    """
    bins = len(histogram)
    weights, x = _fitted(histogram, min_activation)
    background, foreground = pair.log_joint(x)
    # likelihood of the split at bin i = constant + what bins i, i + 1, ... gain as foreground
    gain = (weights * (foreground - background)).flip(0).cumsum(0).flip(0)[1:]
    edges = _inner_edges(bins, fallback)
    # not edges[argmax]: on CUDA a scalar index waits for the device
    best = edges.take(gain.masked_fill(edges <= min_activation, -torch.inf).argmax())
    return torch.where((weights > 0).sum() >= 2, best, fallback)


@runtime_checkable
class Threshold(Protocol):
    """What yields xi during training, whether it moves or not."""

    @property
    def value(self) -> Float[Tensor, ""]:
        """xi in (0, 1), on the device."""

    def update(self, histogram: Int[Tensor, " bins"]) -> None:
        """Take in the activations of one batch, over all workers."""

    def state_dict(self) -> dict[str, Tensor]:
        """Everything a resumed run needs."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` returned."""


class FixedThreshold:
    """A threshold that stays where it is."""

    def __init__(self, xi: float, device: torch.device) -> None:
        self.value = torch.full((), xi, device=device)

    def update(self, histogram: Int[Tensor, " bins"]) -> None:
        """Nothing moves."""

    def state_dict(self) -> dict[str, Tensor]:
        """Empty: the configuration says it all."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Nothing to go on from."""


class DynamicThreshold:
    """xi* of the last batches, moving away from its start as the queue fills.

    After n updates xi is w xi* + (1 - w) start with w = min(1, n / queue): one batch says little.
    """

    def __init__(
        self, start: float, queue: int, min_activation: float, min_std: float, device: torch.device
    ) -> None:
        self._start = torch.full((), start, device=device)
        self._min_activation, self._min_std = min_activation, min_std
        self._queue = torch.zeros(queue, BINS, dtype=torch.int64, device=device)
        self._updates = 0
        self.value = self._start

    def update(self, histogram: Int[Tensor, " bins"]) -> None:
        """Enqueue one batch, over all workers, in place of the oldest one and search anew."""
        self._queue[self._updates % len(self._queue)] = histogram
        self._updates += 1
        total = self._queue.sum(0)
        pair = fit_two_gaussians(total, self._min_activation, self._min_std)
        found = search_threshold(total, pair, self._min_activation, self._start)
        self.value = torch.lerp(self._start, found, min(1.0, self._updates / len(self._queue)))

    def state_dict(self) -> dict[str, Tensor]:
        """The queue, the number of updates and xi."""
        return {
            "queue": self._queue.clone(),
            "updates": torch.tensor(self._updates),
            "value": self.value.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` returned.

        Raises:
            ValueError: The state belongs to a queue of another length.
        """
        if state["queue"].shape != self._queue.shape:
            raise ValueError(
                f"threshold.queue must be that of the checkpoint, {len(state['queue'])}, "
                f"got {len(self._queue)}; resume with the setting the run began with"
            )
        self._queue.copy_(state["queue"])
        self._updates = int(state["updates"])
        self.value = state["value"].to(self._start)


def make_threshold(
    mode: Literal["dynamic", "fixed"],
    xi: float,
    queue: int,
    min_activation: float,
    min_std: float,
    device: torch.device,
) -> Threshold:
    """The threshold of one CAM head; M' and M-dagger' have one each."""
    if mode == "fixed":
        return FixedThreshold(xi, device)
    return DynamicThreshold(xi, queue, min_activation, min_std, device)
