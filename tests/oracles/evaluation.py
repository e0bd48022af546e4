"""The evaluation of CPL and segmentation a second time: one image, one pixel, one class after the other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from cosa.networks.network import CosaNetwork
from cosa.structures import IGNORE, EvaluationBatch

Labelling = list[tuple[int, int]]
"""(true class, predicted class) of every pixel that counts."""


def slow_evaluation(
    network: CosaNetwork, batches: Sequence[EvaluationBatch], xis: dict[str, float]
) -> dict[str, float]:
    """mIoU of the label-free and the labelled segmentation, and of the CPL of M at each of `xis`.

    At one scale, without flips.
    """
    pixels: dict[str, Labelling] = {name: [] for name in ("seg", "seg_labelled", *xis)}
    for batch in batches:
        for index, mask in enumerate(batch.masks):
            output = network(batch.images[index : index + 1])
            grid = batch.images.shape[2:]
            size = mask.shape
            present = [c for c, label in enumerate(batch.labels[index].tolist()) if label]
            seg_logits = _enlarge(output.seg_logits, grid, size)
            cam = _activation(_enlarge(output.cam, grid, size))
            for y, x in _counted(mask):
                target = int(mask[y, x])
                scores = seg_logits[:, y, x].tolist()
                pixels["seg"].append((target, _best(scores, range(len(scores)))))
                pixels["seg_labelled"].append((target, _best(scores, [0, *(c + 1 for c in present)])))
                strongest = _best(cam[:, y, x].tolist(), present) if present else 0
                for name, xi in xis.items():
                    foreground = bool(present) and cam[strongest, y, x].item() >= xi
                    pixels[name].append((target, strongest + 1 if foreground else 0))
    return {name: _mean_iou(labelling) for name, labelling in pixels.items()}


def _enlarge(maps: Tensor, *sizes: tuple[int, ...]) -> Tensor:
    for size in sizes:
        maps = interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)
    return maps[0]


def _activation(cam: Tensor) -> Tensor:
    scaled = []
    for plane in cam.clamp(min=0):
        low, high = plane.min(), plane.max()
        scaled.append((plane - low) / (high - low) if high > low else torch.zeros_like(plane))
    return torch.stack(scaled)


def _counted(mask: Tensor) -> Iterator[tuple[int, int]]:
    height, width = mask.shape
    return ((y, x) for y in range(height) for x in range(width) if mask[y, x] != IGNORE)


def _best(scores: Sequence[float], among: Sequence[int]) -> int:
    return max(among, key=lambda c: scores[c])


def _mean_iou(labelling: Labelling) -> float:
    classes = {c for pair in labelling for c in pair}
    scores = []
    for c in classes:
        hits = sum(true == c and said == c for true, said in labelling)
        union = sum(c in (true, said) for true, said in labelling)
        scores.append(hits / union)
    return sum(scores) / len(scores) if scores else math.nan
