"""The optimiser over parameter groups, and the learning rate of every step."""

from __future__ import annotations

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from cosa.config import OptimConfig
from cosa.networks.multiscale import AnyNetwork


def build_optimizer(network: AnyNetwork, config: OptimConfig) -> Optimizer:
    """AdamW or SGD with the heads at `head_lr_scale`, and vectors (biases, norms) decayed or not.

    Each group keeps its peak learning rate as `peak_lr`; `set_learning_rate` scales from there.
    """
    encoder = set(network.encoder.parameters())
    groups = []
    for heads in (False, True):
        for matrices in (False, True):
            members = [
                p for p in network.parameters() if (p not in encoder) == heads and (p.ndim > 1) == matrices
            ]
            peak = config.lr * (config.head_lr_scale if heads else 1)
            decay = config.weight_decay if matrices or config.decay_vectors else 0.0
            groups.append({"params": members, "lr": peak, "peak_lr": peak, "weight_decay": decay})
    groups = [group for group in groups if group["params"]]
    if config.algorithm == "sgd":
        return SGD(groups, momentum=config.beta1, fused=True)
    return AdamW(groups, betas=(config.beta1, config.beta2), fused=True)


def learning_rate_scale(step: int, iterations: int, config: OptimConfig) -> float:
    """The factor on the peak learning rate at `step` (0-based): linear rise, then polynomial decay.

    Paper: polynomial decay; we add the linear rise and the power 0.9 of the authors' code.
    """
    rise = min(1.0, (step + 1) / config.lr_warmup) if config.lr_warmup else 1.0
    return float(rise * (1 - step / iterations) ** config.power)


def set_learning_rate(optimizer: Optimizer, scale: float) -> None:
    """Set each group's learning rate to `scale` of its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * scale


def clip_gradients(network: nn.Module, max_norm: float) -> None:
    """Scale the whole gradient down to `max_norm`; 0 leaves it as it is."""
    if max_norm:
        nn.utils.clip_grad_norm_(network.parameters(), max_norm, foreach=True)
