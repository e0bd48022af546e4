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
classification alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from cosa.config import Config, EvaluationConfig, nearest
from cosa.equations.cam import to_activation
from cosa.equations.pseudo_labels import keep_labelled
from cosa.equations.reliability import perplexity
from cosa.evaluation.crf import refined_maps, require_crf
from cosa.evaluation.metrics import CplCounts, ImageCounts, ScoreCounts, confusion_matrix, iou, mean_iou
from cosa.networks.multiscale import multiscale, resize
from cosa.networks.network import CosaNetwork
from cosa.structures import EvaluationBatch, FusedOutput

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


class _Counts:
    """Everything that is counted over a split."""

    def __init__(self, classes: int, config: Config, xi: float, device: torch.device) -> None:
        self.config, self.xi = config, xi
        self.images = torch.zeros(2, dtype=torch.int64, device=device)
        """Images in all, and those of them with a mask."""
        self.seg = torch.zeros(classes + 1, classes + 1, dtype=torch.int64, device=device)
        self.labelled = torch.zeros_like(self.seg)
        self.cpl, self.aux_cpl, self.ensemble = (CplCounts(classes, device) for _ in range(3))
        self.cls, self.aux_cls = (ScoreCounts(classes, device) for _ in range(2))
        self.single = ImageCounts(device)
        self.refined, self.refined_labelled = torch.zeros_like(self.seg), torch.zeros_like(self.seg)
        self.seconds = torch.zeros(2, dtype=torch.float64, device=device)
        """Spent on label-free predictions, without and with the CRF."""

    def add(
        self,
        fused: FusedOutput,
        labels: Float[Tensor, "b c"],
        masks: Sequence[Int[Tensor, "_h _w"]],
        *,
        segmentation: bool,
    ) -> None:
        """Count a batch: each image in the size of its own mask."""
        self.cls.update(fused.cls_logits, labels)
        self.aux_cls.update(fused.aux_cls_logits, labels)
        self.images += torch.tensor([len(labels), len(masks)], device=self.images.device)
        for i, mask in enumerate(masks):
            one = slice(i, i + 1)
            if segmentation:
                self._add_segmentation(fused.seg_logits[one], labels[one], mask)
            self._add_cams(fused.cam[one], fused.aux_cam[one], labels[one], mask)

    def _add_segmentation(
        self, seg_logits: Float[Tensor, "1 k _h _w"], labels: Float[Tensor, "1 c"], target: Int[Tensor, "h w"]
    ) -> None:
        logits = resize(seg_logits, (target.shape[0], target.shape[1]))[0]
        self.seg += confusion_matrix(logits.argmax(0), target, len(logits))
        own = labels[0].nonzero().flatten() + 1
        allowed = torch.cat([own.new_zeros(1), own])  # the background is always there
        self.labelled += confusion_matrix(allowed[logits[allowed].argmax(0)], target, len(logits))

    def _add_cams(
        self,
        cam: Float[Tensor, "1 c _h _w"],
        aux_cam: Float[Tensor, "1 c _h _w"],
        labels: Float[Tensor, "1 c"],
        target: Int[Tensor, "h w"],
    ) -> None:
        size = (target.shape[0], target.shape[1])
        everywhere = torch.ones_like(target, dtype=torch.bool)[None]
        present = _present(labels)  # maps of other classes are 0: of COCO's 80 that is nearly all
        activation, aux_activation = (
            to_activation(resize(raw[:, present], size), labels[:, present], everywhere)
            for raw in (cam, aux_cam)
        )
        ensemble = (activation + aux_activation) / 2
        for counts, maps in (
            (self.cpl, activation),
            (self.aux_cpl, aux_activation),
            (self.ensemble, ensemble),
        ):
            nu, strongest = maps[0].max(0)
            counts.update(nu, present[strongest], target)
        nu, strongest = activation.max(1)
        cpl = torch.where(nu >= self.xi, present[strongest] + 1, 0)[0]
        perplexities = perplexity(nu, self.xi, self.config.raw.alpha, self.config.raw.beta)
        quality = iou(confusion_matrix(cpl, target, len(self.seg))).nanmean()
        self.single.update(quality, perplexities.double().mean())

    def add_refined(
        self, fused: FusedOutput, batch: EvaluationBatch, masks: Sequence[Tensor], begun: float
    ) -> None:
        """Count what the CRF makes of a batch; `begun` is when the network was first asked about it."""
        maps = [
            resize(fused.seg_logits[i : i + 1], (mask.shape[0], mask.shape[1]))
            for i, mask in enumerate(masks)
        ]
        for logits in maps:
            logits.argmax(1).cpu()  # what the network's own prediction takes
        seconds = [time.perf_counter() - begun]
        workers = self.config.data.loader_workers
        free = refined_maps(batch.originals, [_probs(logits) for logits in maps], workers=workers)
        seconds.append(time.perf_counter() - begun)
        self.seconds += torch.tensor(seconds, dtype=torch.float64, device=self.seconds.device)
        own = [
            _probs(keep_labelled(logits, batch.labels[i : i + 1].to(logits.device)))
            for i, logits in enumerate(maps)
        ]
        self.refined += self._confusion(free, masks)
        self.refined_labelled += self._confusion(refined_maps(batch.originals, own, workers=workers), masks)

    def _confusion(
        self, predictions: Sequence[UInt8[np.ndarray, "_h _w"]], masks: Sequence[Int[Tensor, "_h _w"]]
    ) -> Int[Tensor, "k k"]:
        """Of all images of a batch."""
        found = torch.zeros_like(self.seg)
        for prediction, mask in zip(predictions, masks, strict=True):
            found += confusion_matrix(
                torch.from_numpy(prediction.astype(np.int64)).to(mask.device), mask, len(found)
            )
        return found

    def reduce(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Take the sum over all workers for each count."""
        self.images, self.seg, self.labelled = map(reduce, (self.images, self.seg, self.labelled))
        self.refined, self.refined_labelled = reduce(self.refined), reduce(self.refined_labelled)
        self.seconds = reduce(self.seconds)
        for part in (self.cpl, self.aux_cpl, self.ensemble, self.cls, self.aux_cls, self.single):
            part.counts = reduce(part.counts)


def _present(labels: Float[Tensor, "1 c"]) -> Int[Tensor, " n"]:
    """Indices of an image's classes; of one without any the first class, whose map is then 0."""
    found = labels[0].nonzero().flatten()
    return found if len(found) else torch.zeros_like(labels[0, :1], dtype=torch.int64)


def _probs(logits: Float[Tensor, "1 k h w"]) -> Float[np.ndarray, "k h w"]:
    probs: Float[np.ndarray, "k h w"] = logits.softmax(1)[0].cpu().numpy()
    return probs


def _alone(count: Tensor) -> Tensor:
    return count


@torch.no_grad()
def evaluate(
    network: CosaNetwork,
    batches: Iterable[EvaluationBatch],
    *,
    config: Config,
    classes: tuple[str, ...],
    xi: float,
    aux_xi: float,
    device: torch.device,
    reduce: Callable[[Tensor], Tensor] = _alone,
    segmentation: bool = True,
) -> Evaluation:
    """Evaluate a network on the images of a split.

    Paper: does not say how M' and M-dagger' are ensembled (Tab. 1); we average their activations.

    Args:
        network: In evaluation mode, on `device`.
        batches: This worker's images; those of all workers together are the split.
        config: Sections evaluation, raw and csc are read.
        classes: Names of the foreground classes.
        xi: The training's threshold of M.
        aux_xi: The training's threshold of M-dagger.
        device: Where to compute.
        reduce: Sum of a tensor over all workers; every worker then returns the same.
        segmentation: False judges CAMs and classification alone, as Tab. 1 does on the training images.

    Raises:
        ValueError: `evaluation.coexistence` names a class that the data set does not have, or
            `evaluation.crf` asks for what is not installed.
    """
    settings = config.evaluation
    affected = coexistence_indices(settings, classes)
    counts = _Counts(len(classes), config, xi, device)
    crf = settings.crf and segmentation
    if crf:
        _start_crf(config.data.loader_workers)
    for batch in batches:
        begun = time.perf_counter()
        images = batch.images.to(device)
        size = (images.shape[2], images.shape[3])
        fused = multiscale(network, images, scales=settings.scales, flip=settings.flip, size=size)
        masks = [mask.to(device) for mask in batch.masks]
        if crf:
            counts.add_refined(fused, batch, masks, begun)
        counts.add(fused, batch.labels.to(device), masks, segmentation=segmentation)
    counts.reduce(reduce)
    return _summarise(
        counts, config, classes, affected, {"cpl": xi, "aux_cpl": aux_xi}, segmentation=segmentation
    )


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
    counts: _Counts,
    config: Config,
    classes: tuple[str, ...],
    affected: list[int],
    own: dict[str, float],
    *,
    segmentation: bool,
) -> Evaluation:
    """Metrics from the counts over the whole split; `own` holds the training's threshold of each CAM."""
    metrics = _classification(counts)
    images, with_mask = counts.images.tolist()
    if images and not with_mask:
        return Evaluation(metrics=metrics, per_class={}, curves={}, analysis={})
    cpl = {"cpl": counts.cpl, "aux_cpl": counts.aux_cpl}
    curves = {head: heads_counts.curve(_CURVE) for head, heads_counts in cpl.items()}
    xi = config.evaluation.xi
    confusions = {
        **({("seg", ""): counts.seg, ("seg", "_labelled"): counts.labelled} if segmentation else {}),
        **{(head, ""): cpl[head].confusion(xi) for head in cpl},
        **{(head, "_own"): cpl[head].confusion(own[head]) for head in cpl},
        ("ensemble_cpl", ""): counts.ensemble.confusion(xi),
    }
    if segmentation and config.evaluation.crf:
        confusions |= {("seg", "_crf"): counts.refined, ("seg", "_labelled_crf"): counts.refined_labelled}
        speeds = (images / counts.seconds).tolist()
        metrics |= dict(zip(("images_per_second", "crf_images_per_second"), speeds, strict=True))
    metrics |= {f"{head}_miou{suffix}": mean_iou(matrix) for (head, suffix), matrix in confusions.items()}
    if affected:
        for (head, suffix), matrix in confusions.items():
            metrics[f"{head}_cmiou{suffix}"] = mean_iou(matrix, affected)
    for head, curve in curves.items():
        metrics[f"{head}_best_xi"], metrics[f"{head}_best_miou"] = max(curve, key=lambda point: point[1])
    for head, heads_counts in cpl.items():
        metrics |= {
            f"{head}{name}": value for name, value in _by_perplexity(heads_counts, own[head], config).items()
        }
    return Evaluation(
        metrics=metrics,
        per_class={
            f"{head}_iou{suffix}": _by_class(matrix, classes)
            for (head, suffix), matrix in confusions.items()
            if suffix != "_own" and head != "ensemble_cpl"
        },
        curves={"cam": curves["cpl"], "aux_cam": curves["aux_cpl"]},
        analysis={
            "cam": _accuracies(counts.cpl, own["cpl"], config),
            "aux_cam": _accuracies(counts.aux_cpl, own["aux_cpl"], config),
            "images": _distributions(counts.single),
        },
    )


def _classification(counts: _Counts) -> dict[str, float]:
    """What Z and Z-dagger are worth."""
    metrics = {}
    for head, scores in (("cls", counts.cls), ("aux_cls", counts.aux_cls)):
        metrics[f"{head}_map"] = scores.average_precision()
        metrics[f"{head}_precision"], metrics[f"{head}_recall"] = scores.precision_recall()
    return metrics


def _perplexities(counts: CplCounts, xi: float, config: Config) -> Float[Tensor, " bins"]:
    """Perplexity in the middle of each bin of activation."""
    middles = counts.activations[None, None]
    return perplexity(middles, xi, config.raw.alpha, config.raw.beta)[0, 0]


def _by_perplexity(counts: CplCounts, xi: float, config: Config) -> dict[str, float]:
    """Mean perplexity, and CPL quality where it is low, at the training's threshold."""
    perplexities = _perplexities(counts, xi, config)
    pixels, _ = counts.accuracy(xi)
    return {
        "_perplexity": ((perplexities * pixels).sum() / pixels.sum()).item(),
        "_miou_sure": mean_iou(counts.confusion(xi, only=perplexities <= config.csc.epsilon)),
    }


def _accuracies(counts: CplCounts, xi: float, config: Config) -> dict[str, Any]:
    """Pixels and right CPL by confidence and by perplexity (Fig. 3), at the training's threshold."""
    pixels, correct = counts.accuracy(xi)
    edges = torch.tensor(_PERPLEXITY_EDGES[1:], dtype=torch.float64, device=pixels.device)
    places = torch.bucketize(_perplexities(counts, xi, config), edges, right=True)
    by_perplexity = torch.zeros(2, len(_PERPLEXITY_EDGES), dtype=torch.int64, device=pixels.device)
    by_perplexity.index_add_(1, places, torch.stack([pixels, correct]))
    merged = torch.stack([pixels, correct]).view(2, _CONFIDENCE_BINS, -1).sum(2)
    return {
        "confidence": {
            "edges": [i / _CONFIDENCE_BINS for i in range(_CONFIDENCE_BINS + 1)],
            "pixels": merged[0].tolist(),
            "correct": merged[1].tolist(),
        },
        "perplexity": {
            "edges": [*_PERPLEXITY_EDGES, None],
            "pixels": by_perplexity[0].tolist(),
            "correct": by_perplexity[1].tolist(),
        },
    }


def _distributions(single: ImageCounts) -> dict[str, Any]:
    """Images by mIoU, mean perplexity and distance from (1, 0) (Fig. 7)."""
    found = {}
    for name, step, counts in zip(
        ("iou", "perplexity", "distance"), single.STEPS, single.counts.tolist(), strict=True
    ):
        edges = [round(i * step, 6) for i in range(single.BINS)]
        found[name] = {"edges": [*edges, None], "count": counts}
    return found


def _by_class(confusion: Int[Tensor, "k k"], classes: tuple[str, ...]) -> dict[str, float]:
    """IoU by the class's name, of the classes that are anywhere."""
    scores = zip(("background", *classes), iou(confusion).tolist(), strict=True)
    return {name: score for name, score in scores if not math.isnan(score)}
