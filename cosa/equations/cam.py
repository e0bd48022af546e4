"""Class activation maps: from a network's raw maps to activations in [0, 1].

A map that is to be thresholded is resized BEFORE it comes here: min-max on the patch grid gives every
image an exact 1.0, and the upper Gaussian of the threshold search collapses onto that spike.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def to_activation(
    cam: Float[Tensor, "b c h w"], labels: Float[Tensor, "b c"], valid: Bool[Tensor, "b h w"]
) -> Float[Tensor, "b c h w"]:
    """Filter CAMs by the weak labels and scale each to [0, 1].

    Paper: Alg. 1, l. 9.
    Paper: takes activations in [0, 1] for granted; we scale by min and max per image and class, after
    the maps were resized and fused.
    """
    return normalise(filter_by_labels(cam, labels), valid)


def filter_by_labels(cam: Float[Tensor, "b c h w"], labels: Float[Tensor, "b c"]) -> Float[Tensor, "b c h w"]:
    """Keep the positive part of the maps whose class is in the image; all else is 0."""
    return cam.relu() * labels[:, :, None, None]


def normalise(cam: Float[Tensor, "b c h w"], valid: Bool[Tensor, "b h w"]) -> Float[Tensor, "b c h w"]:
    """Min-max of each map over its image's valid pixels, to [0, 1].

    Args:
        cam: Maps in any range.
        valid: False on padding, which decides no range and ends as 0.

    Returns:
        Maps that reach 0 and 1 on valid pixels. A constant map, or one without a valid pixel, is all 0.
    """
    inside = valid[:, None]
    low = cam.masked_fill(~inside, torch.inf).amin((-2, -1), keepdim=True)
    high = cam.masked_fill(~inside, -torch.inf).amax((-2, -1), keepdim=True)
    return torch.where(inside & (high > low), (cam - low) / (high - low), 0.0)
