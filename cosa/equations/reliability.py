"""How far a CAM pseudo-label can be trusted: perplexity, and the weights (RAW) made from it.

All is finite everywhere: a pixel at the threshold has a large perplexity, not an infinite one.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

# Eq. (4) is infinite at distance 0; at this one it is 14 for lambda_alpha = 0.8.
_SMALLEST_DISTANCE = 1e-6
# 1 / perplexity is infinite where lambda_alpha is 1 and the distance, too.
_SMALLEST_PERPLEXITY = 1e-4


def perplexity(
    activation: Float[Tensor, "b h w"], xi: Float[Tensor, ""] | float, alpha: float, beta: float
) -> Float[Tensor, "b h w"]:
    """P: high where the activation lies close to the threshold, low where it lies far from it.

    Paper: Eq. (4).
    Paper: P is infinite at the threshold; we clamp the distance away from 0, so that P stays finite.

    Args:
        activation: nu, the maximum activation, in [0, 1].
        xi: Confidence threshold in [0, 1].
        alpha: lambda_alpha in (0, 1]; the smallest perplexity is (-log alpha) ** beta.
        beta: lambda_beta, > 0: sharpness of the distribution.

    Returns:
        Perplexities >= 0, finite for every xi in [0, 1].
    """
    span = torch.where(activation >= xi, 1 - xi, xi)
    distance = (activation - xi).abs() / span.clamp_min(_SMALLEST_DISTANCE)
    return (-(alpha * distance.clamp(_SMALLEST_DISTANCE, 1)).log()) ** beta


def reliability(perplexity: Float[Tensor, "b h w"]) -> Float[Tensor, "b h w"]:
    """1/P: the reciprocal of the perplexity, > 0 and finite."""
    return 1 / perplexity.clamp_min(_SMALLEST_PERPLEXITY)


def reliability_sum(perplexity: Float[Tensor, "b h w"], valid: Bool[Tensor, "b h w"]) -> Float[Tensor, "2"]:
    """Sum of the reliabilities of the valid pixels, and their number, as one float64 tensor.

    The mean that `reliability_weights` divides by belongs to the whole batch. Workers and micro-batches
    therefore add up these two numbers first (one reduction) and only then divide.
    """
    total = torch.where(valid, reliability(perplexity), 0.0).sum(dtype=torch.float64)
    return torch.stack([total, valid.sum(dtype=torch.float64)])


def reliability_weights(
    perplexity: Float[Tensor, "b h w"],
    valid: Bool[Tensor, "b h w"],
    mean_reliability: Float[Tensor, ""],
) -> Float[Tensor, "b h w"]:
    """W, the reliability-based adaptive weights: each pixel's reliability over the batch's mean.

    Paper: RAW, Sec. 3.3.
    Paper: prints no fraction bar between P_ij and P_xy; we read W = |R| (1 / P_xy) / sum_ij (1 / P_ij),
    the normalised reliability that its text describes.

    Args:
        perplexity: P of these pixels.
        valid: False on padding; |R| counts the valid pixels.
        mean_reliability: Sum over count of `reliability_sum`, over ALL pixels of the batch.

    Returns:
        Weights with mean 1 over the batch's valid pixels, 0 on padding.
    """
    return torch.where(valid, reliability(perplexity) / mean_reliability, 0.0)
