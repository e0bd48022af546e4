"""How good a network is on a split: segmentation by both protocols, CPL over all thresholds, classification.

Counts are summed over the whole split, and over all workers, before anything is divided; nothing grows with
the number of images. Metrics:

    seg_miou, seg_cmiou                     segmentation, label-free: the usual protocol, the one to select by
    seg_miou_labelled, seg_cmiou_labelled   the paper's protocol on val: never a class that the image lacks
    seg_miou_crf, seg_miou_labelled_crf     the same after a dense CRF, with `evaluation.crf`
    images_per_second, crf_images_per_second    label-free, of one process, without and with the CRF
    cpl_miou, cpl_cmiou                     CPL of M at `evaluation.xi`
    cpl_miou_own, cpl_cmiou_own             CPL of M at the training's threshold
    cpl_miou_sure                           the same on the pixels with a perplexity up to `csc.epsilon`
    cpl_perplexity                          mean perplexity of the pixels at the training's threshold
    cpl_best_miou, cpl_best_xi              CPL of M at the best threshold of the curve
    aux_cpl_...                             the same of M-dagger
    ensemble_cpl_miou, ensemble_cpl_cmiou   CPL of the mean of both activations at `evaluation.xi`
    cls_map, aux_cls_map                    mean average precision of Z and Z-dagger
    cls_precision, cls_recall, aux_cls_...  at probability 0.5, over all images and classes

C-mIoU (`..._cmiou`) averages the classes of `evaluation.coexistence` and is left out where none are given.
CPL always know the image-level labels, as they do in training. A split without masks has the metrics of
classification alone. A standalone network has those of segmentation alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from cosa.config import Config, EvaluationConfig, nearest
from cosa.equations.cam import to_activation
from cosa.equations.pseudo_labels import keep_labelled
from cosa.equations.reliability import perplexity
from cosa.equations.threshold import BINS
from cosa.evaluation.crf import refined_maps, require_crf
from cosa.evaluation.metrics import (
    IMAGE_BINS,
    IMAGE_STEPS,
    SCORE_BINS,
    average_precision,
    confusion_matrix,
    cpl_accuracy,
    cpl_confusion,
    cpl_counts,
    image_counts,
    iou,
    mean_iou,
    precision_recall,
    score_counts,
)
from cosa.networks.multiscale import AnyNetwork, look, resize, view_count
from cosa.structures import EvaluationBatch, FusedOutput, FusedSegmentation, present_classes, split

# Names of the confusion matrices of S; {} takes miou, cmiou or iou.
_SEGMENTATIONS = ("seg_{}", "seg_{}_labelled")
_REFINED = ("seg_{}_crf", "seg_{}_labelled_crf")
_CURVE = tuple(i / 40 for i in range(1, 40))
_CONFIDENCE_BINS = 50
_PERPLEXITY_EDGES = tuple(i / 5 for i in range(26))  # and one more bin beyond


@dataclass(frozen=True)
class Evaluation:
    """Fractions in [0, 1] throughout, perplexities excepted."""

    metrics: dict[str, float]
    """By name, as the module's docstring lists them; NaN where the split has nothing to count."""
    per_class: dict[str, dict[str, float]]
    """IoU by protocol (`seg_iou`, `seg_iou_labelled`, both with `_crf`, `cpl_iou`, `aux_cpl_iou`), then by
    class; a class that is neither in the ground truth nor predicted is left out."""
    curves: dict[str, list[tuple[float, float]]]
    """CPL mIoU over the threshold, of `cam` and `aux_cam`."""
    analysis: dict[str, Any]
    """What the analysis figures need: for `cam` and `aux_cam` pixels and right CPL by confidence and by
    perplexity, for `images` how many have which mIoU, perplexity and distance of the two from (1, 0); a
    last edge of None is an open end."""


@torch.no_grad()
def evaluate(
    network: AnyNetwork,
    batches: Iterable[EvaluationBatch],
    *,
    config: Config,
    classes: tuple[str, ...],
    xi: float | None,
    aux_xi: float | None,
    device: torch.device,
    reduce: Callable[[Tensor], Tensor] = lambda count: count,
    segmentation: bool = True,
) -> Evaluation:
    """Evaluate a network on the images of a split.

    Paper: does not say how M' and M-dagger' are ensembled (Tab. 1); we average their activations.

    Args:
        network: In evaluation mode, on `device`.
        batches: This worker's images; those of all workers together are the split.
        config: Sections evaluation, raw and csc are read.
        classes: Names of the foreground classes.
        xi: The training's threshold of M; None of a standalone network.
        aux_xi: The training's threshold of M-dagger; None of a standalone network.
        device: Where to compute.
        reduce: Sum of a tensor over all workers; every worker then returns the same.
        segmentation: False judges CAMs and classification alone, as Tab. 1 does on the training images.

    Raises:
        ValueError: `evaluation.coexistence` names a class that the data set does not have, or
            `evaluation.crf` asks for what is not installed.
    """
    affected = coexistence_indices(config.evaluation, classes)
    crf = config.evaluation.crf and segmentation
    if crf:
        _start_crf(config.data.loader_workers)
    counts = _nothing(len(classes), device)
    for batch in batches:
        begun = time.perf_counter_ns()
        scales, flip = config.evaluation.scales, config.evaluation.flip
        size = (batch.images.shape[2], batch.images.shape[3])
        present = present_classes(batch.labels).to(device)
        fused = look(
            network,
            batch.images.to(device, non_blocking=True),
            scales=scales,
            flip=flip,
            size=size,
            cam_classes=present,
        )
        images = split(fused, len(batch.names))
        held = batch.labels.sum(1).int().tolist()
        labels, masks = batch.labels.to(device), [mask.to(device) for mask in batch.masks]
        if crf and masks:
            _count_refined(counts, images, batch, masks, config, begun)
        counts["images"] += torch.tensor([len(labels), len(masks)], device=device)
        if isinstance(fused, FusedOutput):
            counts["cls"] += score_counts(fused.cls_logits, labels)
            counts["aux_cls"] += score_counts(fused.aux_cls_logits, labels)
        # masks of all or none
        rows = zip(images, labels[:, None], masks, present, held, strict=False)
        for image, own, mask, row, count in rows:
            if segmentation:
                _count_segmentation(counts, image, row[:count], mask)
            if isinstance(image, FusedOutput):
                assert xi is not None, "there is a threshold wherever there are CAMs"
                _count_cams(counts, image, own, row[: max(1, count)], mask, xi, config)
    counts = {name: reduce(count) for name, count in counts.items()}
    own_xi = {}
    if xi is not None and aux_xi is not None:
        own_xi = {"cpl": xi, "aux_cpl": aux_xi}
    return _summarise(counts, config, classes, affected, own_xi, segmentation=segmentation)


def _nothing(classes: int, device: torch.device) -> dict[str, Int[Tensor, "..."]]:
    """Everything that is counted over a split, none of it yet."""
    shapes: dict[str, tuple[int, ...]] = {
        "images": (2,),  # in all, and those of them with a mask
        "nanoseconds": (2,),  # spent on label-free predictions, without and with the CRF
        **dict.fromkeys((*_SEGMENTATIONS, *_REFINED), (classes + 1, classes + 1)),
        **dict.fromkeys(("cpl", "aux_cpl", "ensemble_cpl"), (classes + 1, classes, BINS)),
        **dict.fromkeys(("cls", "aux_cls"), (2, classes, SCORE_BINS)),
        "single": (len(IMAGE_STEPS), IMAGE_BINS),
    }
    return {name: torch.zeros(shape, dtype=torch.int64, device=device) for name, shape in shapes.items()}


def _count_segmentation(
    counts: dict[str, Tensor],
    image: FusedSegmentation,
    present: Int[Tensor, " n"],
    target: Int[Tensor, "h w"],
) -> None:
    """Count an image's segmentation by both protocols, in the size of its mask.

    Labelled, the classes in `present` and the background compete: what `keep_labelled` leaves of the others.
    """
    logits = resize(image.seg_logits, (target.shape[0], target.shape[1]))[0]
    kept = torch.cat([present.new_zeros(1), present + 1])
    # on a CPU argmax takes three times as long as max where classes come first
    predictions = (logits.max(0).indices, kept[logits[kept].max(0).indices])
    for name, prediction in zip(_SEGMENTATIONS, predictions, strict=True):
        counts[name] += confusion_matrix(prediction, target, len(logits))


def _count_cams(
    counts: dict[str, Tensor],
    image: FusedOutput,
    labels: Float[Tensor, "1 c"],
    present: Int[Tensor, " n"],
    target: Int[Tensor, "h w"],
    xi: float,
    config: Config,
) -> None:
    """Count an image's CPL, of both CAMs and of their mean, and how good and sure those of M are.

    The first n maps of the image are those of the classes in `present`; all others would be 0.
    """
    size = (target.shape[0], target.shape[1])
    everywhere = torch.ones_like(target, dtype=torch.bool)[None]
    activation, aux_activation = (
        to_activation(resize(raw[:, : len(present)], size), labels[:, present], everywhere)[0]
        for raw in (image.cam, image.aux_cam)
    )
    nu, strongest = activation.max(0)
    cpl = torch.where(nu >= xi, present[strongest] + 1, 0)
    quality = iou(confusion_matrix(cpl, target, labels.shape[1] + 1)).nanmean()
    perplexities = perplexity(nu[None], xi, config.raw.alpha, config.raw.beta)
    counts["single"] += image_counts(quality, perplexities.double().mean())
    ensemble = (activation + aux_activation) / 2
    for name, maps in (("cpl", activation), ("aux_cpl", aux_activation), ("ensemble_cpl", ensemble)):
        nu, strongest = maps.max(0)
        counts[name] += cpl_counts(nu, present[strongest], target, labels.shape[1])


def _count_refined(
    counts: dict[str, Tensor],
    images: Sequence[FusedSegmentation],
    batch: EvaluationBatch,
    masks: Sequence[Int[Tensor, "_h _w"]],
    config: Config,
    begun: int,
) -> None:
    """Count what the CRF makes of a batch; at `begun` the network was first asked about it.

    Paper: does not say what the CRF is given; as the authors' code we give it the softmax of the sum of the
    views' logits, not of their mean.
    """
    views = view_count(config.evaluation.scales, flip=config.evaluation.flip)
    free = [resize(one.seg_logits, size) for one, size in zip(images, batch.sizes, strict=True)]
    for logits in free:
        logits.argmax(1).cpu()  # what the network's own prediction takes
    spent = [time.perf_counter_ns() - begun]
    labels = batch.labels.to(free[0].device)[:, None]
    for name, scores in zip(_REFINED, (free, map(keep_labelled, free, labels)), strict=True):
        probs = [(views * logits).softmax(1)[0].cpu().numpy() for logits in scores]
        refined = refined_maps(batch.originals, probs, workers=config.data.loader_workers)
        spent.append(time.perf_counter_ns() - begun)
        for prediction, mask in zip(refined, masks, strict=True):
            found = torch.from_numpy(prediction).long().to(mask.device)
            counts[name] += confusion_matrix(found, mask, len(counts[name]))
    counts["nanoseconds"] += torch.tensor(spent[:2], device=free[0].device)


def _start_crf(workers: int) -> None:
    """Have the CRF's processes up and running, so that no image waits for their start."""
    require_crf()
    grey, probs = np.full((8, 8, 3), 128, np.uint8), np.full((2, 8, 8), 0.5, np.float32)
    refined_maps([grey] * workers, [probs] * workers, workers=workers)


def coexistence_indices(config: EvaluationConfig, classes: tuple[str, ...]) -> list[int]:
    """Indices in [1, k) of the classes that C-mIoU averages.

    Raises:
        ValueError: A name is none of `classes`.
    """
    for name in config.coexistence:
        if name not in classes:
            raise ValueError(
                f"evaluation.coexistence must name classes of the data set, got {name!r}"
                + (nearest(name, classes) or f"; the classes are {', '.join(classes)}")
            )
    return [1 + classes.index(name) for name in config.coexistence]


def _summarise(
    counts: dict[str, Tensor],
    config: Config,
    classes: tuple[str, ...],
    affected: list[int],
    own: dict[str, float],
    *,
    segmentation: bool,
) -> Evaluation:
    """Metrics from the counts over the whole split; `own` has the training's threshold of each CAM."""
    found = Evaluation(metrics={}, per_class={}, curves={}, analysis={})
    metrics = found.metrics
    for head in ("cls", "aux_cls") if own else ():
        metrics[f"{head}_map"] = average_precision(counts[head])
        metrics[f"{head}_precision"], metrics[f"{head}_recall"] = precision_recall(counts[head])
    images, with_mask = counts["images"].tolist()
    if images and not with_mask:
        return found
    confusions = {name: counts[name] for name in _SEGMENTATIONS if segmentation}
    for suffix, thresholds in (("", dict.fromkeys(own, config.evaluation.xi)), ("_own", own)):
        for head, xi in thresholds.items():
            confusions[f"{head}_{{}}{suffix}"] = cpl_confusion(counts[head], xi)
    if own:
        confusions["ensemble_cpl_{}"] = cpl_confusion(counts["ensemble_cpl"], config.evaluation.xi)
    if segmentation and config.evaluation.crf:
        confusions |= {name: counts[name] for name in _REFINED}
        speeds = (1e9 * images / counts["nanoseconds"].double()).tolist()
        metrics["images_per_second"], metrics["crf_images_per_second"] = speeds
    for name, matrix in confusions.items():
        metrics[name.format("miou")] = mean_iou(matrix)
        if affected:
            metrics[name.format("cmiou")] = mean_iou(matrix, affected)
        if not name.startswith("ensemble") and not name.endswith("own"):
            scores = dict(zip(("background", *classes), iou(matrix).tolist(), strict=True))
            found.per_class[name.format("iou")] = {k: v for k, v in scores.items() if not math.isnan(v)}
    for head, cam in zip(own, ("cam", "aux_cam"), strict=False):
        curve = [(xi, mean_iou(cpl_confusion(counts[head], xi))) for xi in _CURVE]
        metrics[f"{head}_best_xi"], metrics[f"{head}_best_miou"] = max(curve, key=lambda point: point[1])
        middles = (torch.arange(BINS, device=counts[head].device, dtype=torch.float64) + 0.5) / BINS
        perplexities = perplexity(middles[None, None], own[head], config.raw.alpha, config.raw.beta)[0, 0]
        pixels, correct = cpl_accuracy(counts[head], own[head])
        metrics[f"{head}_perplexity"] = ((perplexities * pixels).sum() / pixels.sum()).item()
        sure = cpl_confusion(counts[head], own[head], only=perplexities <= config.csc.epsilon)
        metrics[f"{head}_miou_sure"] = mean_iou(sure)
        found.curves[cam], found.analysis[cam] = curve, _accuracies(pixels, correct, perplexities)
    if own:
        found.analysis["images"] = _distributions(counts["single"])
    return found


def _distributions(single: Int[Tensor, "n bins"]) -> dict[str, Any]:
    """How many images have which mIoU, perplexity and distance."""
    return {
        name: {"edges": [*(round(i * step, 6) for i in range(IMAGE_BINS)), None], "count": count}
        for (name, step), count in zip(IMAGE_STEPS.items(), single.tolist(), strict=True)
    }


def _accuracies(
    pixels: Int[Tensor, " bins"], correct: Int[Tensor, " bins"], perplexities: Float[Tensor, " bins"]
) -> dict[str, Any]:
    """Pixels and right CPL by confidence and by perplexity (Fig. 3)."""
    both = torch.stack([pixels, correct])
    edges = torch.tensor(_PERPLEXITY_EDGES[1:], dtype=torch.float64, device=both.device)
    by_perplexity = both.new_zeros(2, len(_PERPLEXITY_EDGES))
    by_perplexity.index_add_(1, torch.bucketize(perplexities, edges, right=True), both)
    confidence_edges = [i / _CONFIDENCE_BINS for i in range(_CONFIDENCE_BINS + 1)]
    return {
        name: {"edges": edges, "pixels": found[0].tolist(), "correct": found[1].tolist()}
        for name, edges, found in (
            ("confidence", confidence_edges, both.view(2, _CONFIDENCE_BINS, -1).sum(2)),
            ("perplexity", [*_PERPLEXITY_EDGES, None], by_perplexity),
        )
    }
