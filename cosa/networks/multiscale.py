"""One network's view of an image over several scales and flips."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (torch's own convention)

from cosa.networks.network import CosaNetwork
from cosa.structures import FusedOutput


def multiscale(
    network: CosaNetwork,
    images: Float[Tensor, "b 3 _h _w"],
    *,
    scales: Sequence[float],
    flip: bool,
    size: tuple[int, int],
) -> FusedOutput:
    """Fuse what the network says at each scale, as it is and mirrored: CAMs by maximum, the rest by mean.

    Paper: Alg. 1, l. 6-8. Maps are mirrored back and resized before they are fused; no more than one view
    and the running result are held at a time.

    Args:
        network: In evaluation mode.
        images: Normalised images.
        scales: One or more factors on the sides of `images`; a scaled side is rounded to whole patches.
        flip: Whether each scale is also seen mirrored.
        size: Height and width of the fused maps.
    """
    views = _views(network, images, scales, flip, size)
    total, count = next(views), 1
    for view in views:
        total = FusedOutput(
            cam=torch.maximum(total.cam, view.cam),
            aux_cam=torch.maximum(total.aux_cam, view.aux_cam),
            seg_logits=total.seg_logits + view.seg_logits,
            cls_logits=total.cls_logits + view.cls_logits,
            aux_cls_logits=total.aux_cls_logits + view.aux_cls_logits,
        )
        count += 1
    return FusedOutput(
        cam=total.cam,
        aux_cam=total.aux_cam,
        seg_logits=total.seg_logits / count,
        cls_logits=total.cls_logits / count,
        aux_cls_logits=total.aux_cls_logits / count,
    )


def resize(maps: Float[Tensor, "b n _h _w"], size: tuple[int, int]) -> Float[Tensor, "b n h w"]:
    """Bilinear interpolation to (height, width); pixels are areas, so corners are not aligned."""
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def _views(
    network: CosaNetwork, images: Tensor, scales: Sequence[float], flip: bool, size: tuple[int, int]
) -> Iterator[FusedOutput]:
    """What the network says of each scale and flip, one after the other, mirrored back and resized."""
    patch = network.patch_size
    for scale in scales:
        height, width = (max(1, round(side * scale / patch)) * patch for side in images.shape[2:])
        scaled = resize(images, (height, width))
        for mirrored in (False, True) if flip else (False,):
            output = network(scaled.flip(-1) if mirrored else scaled)
            yield FusedOutput(
                cam=_upright(output.cam, mirrored, size),
                aux_cam=_upright(output.aux_cam, mirrored, size),
                seg_logits=_upright(output.seg_logits, mirrored, size),
                cls_logits=output.cls_logits,
                aux_cls_logits=output.aux_cls_logits,
            )


def _upright(maps: Tensor, mirrored: bool, size: tuple[int, int]) -> Tensor:
    return resize(maps.flip(-1) if mirrored else maps, size)
