"""One network's view of an image over several scales and flips."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (torch's own convention)

from cosa.networks.network import CosaNetwork
from cosa.networks.segmentation import SegmentationNetwork
from cosa.structures import FusedOutput, FusedSegmentation, NetworkOutput

AnyNetwork = CosaNetwork | SegmentationNetwork
"""A network that can be judged and asked about images."""


@torch.no_grad()
def look(
    network: AnyNetwork,
    images: Float[Tensor, "b 3 _h _w"],
    *,
    scales: Sequence[float],
    flip: bool,
    size: tuple[int, int],
    cam_classes: Int[Tensor, "b n"] | None = None,
) -> FusedSegmentation:
    """What any network says over scales and flips: a FusedOutput of CoSA's, of a standalone one S alone."""
    if isinstance(network, CosaNetwork):
        return multiscale(network, images, scales=scales, flip=flip, size=size, cam_classes=cam_classes)
    total = None
    for scale in scales:
        for output, mirrored in _views(network, images, scale, flip):
            logits = resize(output.seg_logits.flip(-1) if mirrored else output.seg_logits, size)
            total = logits if total is None else total + logits
    assert total is not None
    return FusedSegmentation(seg_logits=total / view_count(scales, flip=flip))


@torch.no_grad()
def multiscale(
    network: CosaNetwork,
    images: Float[Tensor, "b 3 _h _w"],
    *,
    scales: Sequence[float],
    flip: bool,
    size: tuple[int, int],
    fusion: Literal["max", "sum"] = "max",
    aux_fusion: Literal["max", "sum", "last"] = "max",
    cam_classes: Int[Tensor, "b n"] | None = None,
    seg_classes: Int[Tensor, "b m"] | None = None,
) -> FusedOutput:
    """Fuse what the network says at each scale, as it is and mirrored: CAMs by maximum, the rest by mean.

    Paper: Alg. 1, l. 6-8. Maps are mirrored back and resized before they are fused; no more than one view,
    the maps of its scale and the running result are held at a time.

    Args:
        network: In evaluation mode.
        images: Normalised images.
        scales: One or more factors on the sides of `images`; a scaled side is rounded to whole patches.
        flip: Whether each scale is also seen mirrored.
        size: Height and width of the fused maps.
        fusion: How the M of the scales become one: by maximum, or as the sum of ReLU(M), as in the authors'
            code; the flips of a scale always by maximum.
        aux_fusion: The same of M-dagger; `last` takes that of the last scale alone, as in the authors' code.
        cam_classes: Indices in [0, c) of the maps of M and M-dagger that are wanted of each image; all by
            default. Others are dropped on the patch grid, before they cost anything.
        seg_classes: The same of S, in [0, k).
    """
    cam = aux_cam = None
    sums: tuple[Tensor, ...] = ()
    for scale in scales:
        seen: tuple[Tensor, ...] = ()
        for output, mirrored in _views(network, images, scale, flip):
            view = _upright(output, mirrored, size, cam_classes, seg_classes)
            maps, logits = (view.cam, view.aux_cam), (view.seg_logits, view.cls_logits, view.aux_cls_logits)
            # in place: maps in the size of the images leave the cache, and new memory costs as much again
            seen = tuple(map(_maximum_, seen, maps)) if seen else maps
            sums = tuple(map(Tensor.add_, sums, logits)) if sums else logits
        assert seen
        cam = seen[0] if cam is None else _fused(cam, seen[0], fusion)
        aux_cam = seen[1] if aux_cam is None else _fused(aux_cam, seen[1], aux_fusion)
    assert cam is not None
    assert aux_cam is not None
    seg_logits, cls_logits, aux_cls_logits = (total.div_(view_count(scales, flip=flip)) for total in sums)
    return FusedOutput(
        cam=cam,
        aux_cam=aux_cam,
        seg_logits=seg_logits,
        cls_logits=cls_logits,
        aux_cls_logits=aux_cls_logits,
    )


def view_count(scales: Sequence[float], *, flip: bool) -> int:
    """Views that `multiscale` fuses: each scale, and each mirrored where `flip`."""
    return len(scales) * (2 if flip else 1)


def resize(maps: Float[Tensor, "b n _h _w"], size: tuple[int, int]) -> Float[Tensor, "b n h w"]:
    """Bilinear interpolation to (height, width); pixels are areas, so corners are not aligned."""
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def _views(network: AnyNetwork, images: Tensor, scale: float, flip: bool) -> Iterator[tuple[Any, bool]]:
    """What the network says of a scale, as it is and, where `flip`, mirrored, which it is told beside it."""
    patch = network.patch_size
    height, width = (max(1, round(side * scale / patch)) * patch for side in images.shape[2:])
    scaled = resize(images, (height, width))
    for mirrored in (False, True) if flip else (False,):
        yield network(scaled.flip(-1) if mirrored else scaled), mirrored


def _fused(
    before: Float[Tensor, "b c h w"], cam: Float[Tensor, "b c h w"], how: Literal["max", "sum", "last"]
) -> Float[Tensor, "b c h w"]:
    """The maps of the scales `before` with that of one more scale."""
    if how == "last":
        return cam
    return _maximum_(before, cam) if how == "max" else before.relu_().add_(cam.relu_())


def _maximum_(before: Tensor, cam: Tensor) -> Tensor:
    """The larger of each two values, in the memory of the first."""
    return torch.maximum(before, cam, out=before)


def _upright(
    output: NetworkOutput,
    mirrored: bool,
    size: tuple[int, int],
    cam_classes: Int[Tensor, "b n"] | None,
    seg_classes: Int[Tensor, "b m"] | None,
) -> FusedOutput:
    """The wanted maps of a view, mirrored back and resized."""

    def upright(maps: Tensor, classes: Tensor | None) -> Tensor:
        wanted = maps if classes is None else maps.take_along_dim(classes[:, :, None, None], 1)
        return resize(wanted.flip(-1) if mirrored else wanted, size)

    assert output.seg_logits is not None
    return FusedOutput(
        cam=upright(output.cam, cam_classes),
        aux_cam=upright(output.aux_cam, cam_classes),
        seg_logits=upright(output.seg_logits, seg_classes),
        cls_logits=output.cls_logits,
        aux_cls_logits=output.aux_cls_logits,
    )
