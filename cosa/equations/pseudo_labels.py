"""The two assignments that are swapped: CAM pseudo-labels (CPL) and segmentation pseudo-labels (SPL).

Both know the image-level labels: neither ever names a class that the image does not hold.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cosa.structures import IGNORE


def max_activation(activation_map: Float[Tensor, "b c h w"]) -> Float[Tensor, "b h w"]:
    """nu: the maximum activation of each pixel over the classes, in [0, 1]."""
    return activation_map.amax(1)


def cam_pseudo_labels(
    activation_map: Float[Tensor, "b n h w"],
    xi: Float[Tensor, ""] | float,
    valid: Bool[Tensor, "b h w"],
    band: tuple[float, ...] = (),
    classes: Int[Tensor, "b n"] | None = None,
) -> Int[Tensor, "b h w"]:
    """CPL: the most activated class where its activation reaches xi, the background elsewhere.

    Paper: Eq. (3).
    Paper: knows no band; the authors' logs have one of two fixed thresholds.

    Args:
        activation_map: Filtered and normalised CAMs in [0, 1].
        xi: Confidence threshold in (0, 1); above 0, so that no filtered class is ever chosen.
        valid: False on padding.
        band: Two thresholds in place of xi: the class from the upper one on, the background below the lower
            one, no label between; empty where there is none.
        classes: Index in [0, c) of the class of each map; by default they are all classes in order.

    Returns:
        Classes in [0, k), IGNORE on padding and within the band.
    """
    nu, strongest = activation_map.max(1)
    if classes is not None:
        strongest = classes.gather(1, strongest.flatten(1)).view_as(strongest)
    low, high = band or (xi, xi)
    cpl = torch.where(nu >= high, strongest + 1, torch.where(nu < low, 0, IGNORE))
    return torch.where(valid, cpl, IGNORE)


def seg_pseudo_labels(
    seg_logits: Float[Tensor, "b k h w"], labels: Float[Tensor, "b c"], tau: float
) -> Float[Tensor, "b k h w"]:
    """SPL: the segmentation's probabilities over the classes of the image, sharpened.

    Paper: Eq. (7).

    Args:
        seg_logits: Unnormalised scores of the assigning network.
        labels: Image-level labels, 0 or 1.
        tau: Softmax temperature, > 0; towards 0 the SPL become one-hot.
    """
    return (keep_labelled(seg_logits, labels) / tau).softmax(1)


def keep_labelled(
    seg_logits: Float[Tensor, "b k h w"], labels: Float[Tensor, "b c"]
) -> Float[Tensor, "b k h w"]:
    """Filter segmentation scores by the weak labels: classes that the image does not hold become -inf.

    Paper: filters by labels that know no background; we always keep it.
    """
    absent = torch.cat([torch.zeros_like(labels[:, :1]), 1 - labels], dim=1) > 0
    return seg_logits.masked_fill(absent[:, :, None, None], -torch.inf)
